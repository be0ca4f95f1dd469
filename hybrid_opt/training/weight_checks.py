"""Whether weights are finite after an update, and still the same before the next. Next: `divergence.py`.

One idea: nobody writes weights between two updates, so what they are after one they must be before the next. Each step looks at another
part of them, so a write of many weights is noticed at once, one of a single parameter soon, and no step takes long.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from hybrid_opt.engines.contract import Engine
from hybrid_opt.engines.inspection import checksum, first_nonfinite
from hybrid_opt.errors import DivergedError, DriftError

NONE = -1


class WeightChecks:
    """Looks at the weights around updates; all ranks together.

    Args:
        engine: holds the weights.
        drift_every: in how many steps each parameter is compared once; 0: none is.
    """

    def __init__(self, engine: Engine, drift_every: int) -> None:
        self.engine, self.drift_every = engine, drift_every
        self.names = [name for name, _ in engine.model.named_parameters()]
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.changed: str | None = None
        self.forget()

    def forget(self) -> None:
        """Weights are about to be written by something that is not checked: a checkpoint, or a ledger's step."""
        self.sums: list[Tensor] = []

    def before_update(self, step: int) -> None:
        """Compare those whose turn it is with what they were after the step before."""
        self.changed = None
        if self.sums:
            names, sums = self._sums(step)
            differ = torch.stack(sums).ne(torch.stack(self.sums)).tolist()  # fetched from the device once
            self.changed = next((name for name, differs in zip(names, differ, strict=True) if differs), None)
        self.forget()

    def after_update(self, step: int, moved: Collection[str]) -> None:
        """Look at what has moved, and remember those whose turn comes in the next step.

        Ranks tell each other what both looks have found in one exchange, so that all of them stop.

        Raises:
            DriftError: a parameter was not before the update what it was after the one before.
            DivergedError: a parameter has values that are not finite.
        """
        weights = ((name, values) for name, values in self.engine.forward_weights() if name in moved)
        found = [self.numbers.get(name, NONE) for name in (self.changed, first_nonfinite(weights))]
        changed, lost = self.engine.ranks.gather(torch.tensor(found, dtype=torch.int32)).amax(dim=0).tolist()
        if changed != NONE:
            raise DriftError(
                f"step {step}: parameter {self.names[changed]} has changed since step {step - 1} while nobody updated it; an objective "
                "or a hook writes weights: let it write to a copy, or write check_drift_every: 0 if that is what you want"
            )
        if lost != NONE:
            raise DivergedError(
                f"step {step}: after the update parameter {self.names[lost]} has values that are not finite; lower the learning rates, "
                "or clip gradients with gradient_clipping"
            )
        if self.drift_every:
            _names, self.sums = self._sums(step + 1)

    def _sums(self, step: int) -> tuple[list[str], list[Tensor]]:
        """The parameters whose turn it is in a step, and their checksums on the engine's device."""
        due = set(self.names[step % self.drift_every :: self.drift_every])
        weights = [(name, values) for name, values in self.engine.forward_weights() if name in due]
        return [name for name, _ in weights], [checksum(values).to(self.engine.device) for _, values in weights]
