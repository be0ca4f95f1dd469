"""Parameters that backprop is to move but has no gradient of. Next: `hybrid_optimizer.py`.

One idea: what lies behind a hard step, an argmax, a rounding or a quantiser has a gradient that is missing or zero wherever one looks, so each
parameter is looked at until a gradient of it was seen, and after two looks without one it is not backprop's to move. Two, because a gradient
can be zero where the run begins: that of LoRA's A is, while B is zero.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from hybrid_opt.config.schedule import ScheduleFile
from hybrid_opt.engines.contract import Engine
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.contract import Gradient
from hybrid_opt.scheduling.policy import Policy

LOOKS = 2
"""Steps of backprop in which a parameter's gradient must be zero."""


class MissingGradients:
    """Looks at the gradients of what backprop owns alone; what an estimator without a gradient moves too need not have one.

    Args:
        policies: by phase, the widest.
    """

    def __init__(self, config: ScheduleFile, engine: Engine, policies: Mapping[int | None, Policy]) -> None:
        self.engine, self.policies = engine, policies
        self.refuses = config.backprop is not None and config.backprop.missing_gradients == "refuse"
        self.others = {
            name for name, c in config.estimators.items() if not c.differentiates and c.type != "stale_gradient"
        }
        """Estimators that need no gradient."""
        self.looks_at_all = False
        """Whether to look also at what others move too."""
        self.found: list[str] = []
        """What had no gradient in the latest step, nor before."""
        self.seen: set[str] = set()
        """Parameters of which a gradient was seen."""
        self.looks: dict[str, int] = {}
        """How often there was none, of the rest."""

    def look(self, gradient: Gradient, names: Collection[str], phase: int | None, estimator: str) -> None:
        """See the gradient of a step; all ranks together. It costs nothing once every parameter has had one.

        Args:
            names: parameters that it is of.
            estimator: whose it is.

        Raises:
            UserError: some that are left to it alone have had none in `LOOKS` steps.
        """
        alone = [name for name in names if self.others.isdisjoint(self.policies[phase].owners[name])]
        if not (self.refuses or self.looks_at_all):
            return
        self.found = self._missing(gradient, names if self.looks_at_all else alone)
        if self.refuses and (refused := [name for name in self.found if name in alone]):
            raise UserError(_message(refused, len(refused) == len(names), estimator, sorted(self.others)))

    def _missing(self, gradient: Gradient, names: Collection[str]) -> list[str]:
        """Those of the parameters that have had no gradient in `LOOKS` steps, this one included."""
        unknown = [name for name in names if name not in self.seen]
        zero = set(self._zero(gradient, unknown)) if unknown else set()
        self.seen.update(name for name in unknown if name not in zero)
        for name in zero:
            self.looks[name] = self.looks.get(name, 0) + 1
        return [name for name in unknown if name in zero and self.looks[name] >= LOOKS]

    def _zero(self, gradient: Gradient, names: Sequence[str]) -> Iterator[str]:
        """Those whose gradient is zero everywhere, on all ranks."""
        places = {name: i for i, name in enumerate(names)}
        found = torch.zeros(len(names))
        for shard in self.engine.shards(names):
            found[places[shard.name]] += float(gradient.read(shard).any())
        anywhere = self.engine.ranks.gather(found).sum(dim=0)
        return (name for name in names if not anywhere[places[name]])


def _message(missing: Sequence[str], is_all: bool, estimator: str, others: Sequence[str]) -> str:
    if is_all:
        return (
            f"no parameter that {estimator!r} may move has a gradient: it was zero in {LOOKS} steps; look whether the objective's losses depend on the "
            "model through torch operations, and are not all the same"
        )
    kinds = list(dict.fromkeys(re.sub(r"\d+", r"\\d+", name.replace(".", r"\.")) for name in missing))
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    who, or_else = (f"[{others[0]}]", "") if others else ("frozen", " (or an es estimator, defined under estimators)")
    return (
        f"policy: {shown} {'has' if len(missing) == 1 else 'have'} no gradient: it was zero in {LOOKS} steps, as behind a hard step, an argmax, a rounding or a "
        f"quantiser, or where a batch does not come by. Before the rule that leaves them to {estimator!r} alone write "
        f"{{match: '{'|'.join(kinds[:3])}', use: {who}}}{or_else}; or for {estimator!r} missing_gradients: ignore"
    )
