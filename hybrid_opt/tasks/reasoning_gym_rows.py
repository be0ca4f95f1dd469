"""The process that makes rows of reasoning-gym: an order in JSON on standard input, rows in JSON on standard output. Next:
`reasoning_gym.py`, which starts it.

One idea: a row holds the metadata that the task's scorer needs as JSON text, so judging never depends on making it again.
"""

import contextlib
import json
import random
import sys
from collections.abc import Iterator
from typing import Any

from hybrid_opt.errors import UserError
from hybrid_opt.tasks.sampling import HELD_OUT_ONE_IN, different

PATIENCE = 1000
"""Questions in a row that are not new after which there are taken to be no more; making one may take a second."""

REFUSED = 3
"""Exit code where the last line of standard error is for the user."""


def main() -> None:
    """Make the rows that are ordered."""
    order = json.load(sys.stdin)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # some tasks print
            rows = different(_candidates(order), order["rows"], order["split"], PATIENCE)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)
    json.dump(rows, sys.stdout)


def _candidates(order: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    from reasoning_gym.factory import create_dataset

    random.seed(order["seed"])  # for tasks that draw from the global generator
    # A task's entry i depends on seed + i alone, so seeds of runs are spread far apart.
    settings = {"seed": order["seed"] * 1_000_003 % 2**31, "size": 4 * HELD_OUT_ONE_IN * order["rows"] + PATIENCE}
    try:
        dataset = create_dataset(order["name"], **settings, **order["options"])
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"options: {order['name']} does not take {order['options']}: {error}") from None
    for i in range(settings["size"]):
        made = dataset[i]
        entry = {"name": order["name"], "options": order["options"], "metadata": made["metadata"]}
        yield made["question"], {"question": made["question"], "answer": made["answer"], "entry": json.dumps(entry)}


if __name__ == "__main__":
    main()
