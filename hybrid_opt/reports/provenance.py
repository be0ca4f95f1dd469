"""The section on what was run, by which versions, on which machine. Next: `html.py`.

One idea: with this section alone somebody else can run the same again.
"""

from collections.abc import Iterator
from typing import Any

from hybrid_opt.reports.content import Column, Section, Table
from hybrid_opt.reports.wording import size, text_of

MACHINE = {
    "device": "device",
    "processor": "processor",
    "cores": "cores",
    "memory_bytes": "memory",
    "ranks": "ranks",
    "platform": "platform",
    "started": "started",
    "hybrid_opt": "hybrid_opt",
    "python": "Python",
}
NO_MACHINE = "Versions and machine were not recorded."


def provenance(machines: list[dict[str, Any]], config_text: str, file: str) -> Section:
    """The section, for the machines of one run or of several."""
    if len(machines) > 1:  # runs on one machine differ in nothing but their start
        starts = sorted(machine["started"] for machine in machines if machine.get("started"))
        machines = [{**machine, "started": next(iter(starts), None)} for machine in machines]
    rows = [row for machine in machines for row in _rows(machine)]
    rows = tuple({(row["what"], row["value"]): row for row in rows}.values())
    columns = (Column("what", "what", numeric=False), Column("value", "value", numeric=False))
    texts = [] if rows else [NO_MACHINE]
    if not config_text:
        texts.append(f"There is no {file}, so no configuration to show.")
    tables = (Table("machine", "Machine and versions", columns, rows),) if rows else ()
    return Section(
        "what_was_run", "What was run", tuple(texts), tables, code=config_text, code_title=f"{file}, resolved"
    )


def _rows(machine: dict[str, Any]) -> Iterator[dict[str, str]]:
    for key, what in MACHINE.items():
        if machine.get(key) is not None:
            yield {"what": what, "value": size(machine[key]) if key == "memory_bytes" else text_of(machine[key])}
    if packages := machine.get("packages"):
        yield {"what": "packages", "value": ", ".join(f"{package} {version}" for package, version in packages.items())}
