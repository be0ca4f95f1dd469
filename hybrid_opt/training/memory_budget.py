"""How much backprop may own within a memory budget, found by trying. Next: `../scheduling/ownership.py`, `../machine/memory.py`.

One idea: what backprop takes grows with every further layer towards the input, so the model's parameters are a row of blocks, backprop owns as
many of the last ones as fit, and the estimators that share them with it own the rest. Whether they fit is measured, with steps that are
taken back.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from hybrid_opt.config.estimators import Backprop
from hybrid_opt.config.schedule import ScheduleFile, acting_names
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.backprop import can_checkpoint
from hybrid_opt.estimators.build import build_estimator
from hybrid_opt.machine.memory import forget_peak, peak_memory_bytes, release_memory, return_freed_memory
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import Objective, count_examples
from hybrid_opt.scheduling.ownership import Ownership
from hybrid_opt.scheduling.policy import acting_in, block_of, may_ever_move
from hybrid_opt.training.measured_peak import largest_that_fits, peak_of_backprop

GB = 1e9
HEADROOM = 0.01
"""Share of the budget that trials leave free, for what a step does besides: comparing weights, norms of updates."""


@dataclass(frozen=True)
class Saving:
    """How a backprop step saves memory: the further down in `savings_of`, the fewer activations there are at once, and the longer it takes."""

    micro_batch_size: int | None
    gradient_checkpointing: bool

    def applied_to(self, config: Backprop) -> Backprop:
        """The estimator's options with these."""
        whole = {} if self.micro_batch_size is None else {"accumulation": 1}
        return config.model_copy(update={**asdict(self), **whole})

    def __str__(self) -> str:
        parts = [f"micro_batch_size {self.micro_batch_size}"] if self.micro_batch_size else []
        return " and ".join(parts + ["gradient_checkpointing"] * self.gradient_checkpointing)


def savings_of(config: Backprop, examples: int | None, checkpoints: bool) -> list[Saving]:
    """What may be tried, from what the configuration says to ever smaller parts of the batch, then the same with checkpointing.

    Args:
        examples: in the batch; None: it cannot be split.
        checkpoints: whether the model can recompute activations.
    """
    sizes: list[int | None] = [config.micro_batch_size]
    largest = config.micro_batch_size or (math.ceil(examples / config.accumulation) if examples else 1)
    while (largest := largest // 2) >= 1:
        sizes.append(largest)
    forms = [True] if config.gradient_checkpointing else [False, True] if checkpoints else [False]
    return [Saving(size, form) for form in forms for size in sizes]


class MemoryBudget:
    """Fits what backprop owns, and how it takes gradients, into so many bytes: on CUDA of what torch allocates there, elsewhere of the
    process, libraries included.

    Args:
        budget: bytes.
        estimators: the run's, by name; backprop's options are changed here.

    Raises:
        UserError: under ZeRO, or a policy gives parameters to backprop alone, or by their importance.
    """

    def __init__(
        self,
        budget: int,
        config: ScheduleFile,
        engine: LocalEngine,
        ownership: Ownership,
        estimators: Mapping[str, Any],
    ) -> None:
        self.budget, self.config, self.engine, self.ownership = budget, config, engine, ownership
        self.estimators = estimators
        self.name = config.acting_backprop
        self.blocks = (
            [list(names) for _, names in groupby(self._may_ever_move(self.name), key=block_of)] if self.name else []
        )
        """Parameters that backprop may ever move, from the input to the output."""
        self.is_chosen = False
        self.fit: tuple[int, Saving, float] | None = None
        """Blocks, how memory is saved, and the peak that was measured with them; None: nothing takes gradients, or is chosen yet."""
        self.examples: int | None = None
        """In the largest batch of backprop's."""
        self.exceeded = 0
        """Backprop's latest steps in a row that took more than the budget."""
        self.told = ""
        self._refuse_what_nobody_else_moves()
        engine.memory_limit = budget
        return_freed_memory()

    # ------------------------------------------------------------ trying

    def choose(self, evaluated: Callable[[str], tuple[Objective, Any]]) -> str:
        """Find the most of the last blocks that backprop may own, and the quickest way to take their gradients; in words.

        Args:
            evaluated: gives what an estimator minimises, and its batch, the largest that is to be expected.

        Raises:
            UserError: an estimator alone takes more than the budget, or backprop with the last block.
        """
        others = {
            name: self._others_peak(name, *evaluated(name))
            for name in acting_names(self.config.schedule)
            if name != self.name and self.config.estimators[name].forwards_a_step
        }
        for name, peak in others.items():
            if (peak := peak + self._kept_between_steps(0)) > self.budget:
                raise UserError(
                    f"memory_budget: {self.budget / GB:.4g} GB, but {name} takes {peak / GB:.4g} GB by itself; raise the budget, or lower its "
                    "batch_size, micro_batch_size or members_per_forward"
                )
        if self.name is not None:
            self._fit_backprop(*evaluated(self.name), max(others.values(), default=0))
        self.is_chosen = True
        kept = self._kept_between_steps(self.fit[0] if self.fit else 0)
        peaks = {name: peak + kept for name, peak in others.items()} | ({self.name: self.fit[2]} if self.fit else {})
        self.told = f"{self._words()}; measured: " + ", ".join(f"{n} {p / GB:.4g} GB" for n, p in peaks.items())
        return self.told

    def _fit_backprop(self, objective: Objective, batch: Any, others: int) -> None:
        self.examples = count_examples(batch)
        savings = self._savings(self.examples)
        peaks: dict[tuple[int, Saving], float] = {}

        def peak(blocks: int, saving: Saving) -> float:
            if (blocks, saving) not in peaks:
                own = self._backprop_peak(blocks, saving, objective, batch)
                peaks[blocks, saving] = max(own, others + self._kept_between_steps(blocks))
            return peaks[blocks, saving]

        # The last saves most where activations take most; where gradients do, adding parts up takes more than the whole batch at once.
        ends, target = (savings[0], savings[-1]), (1 - HEADROOM) * self.budget
        blocks = largest_that_fits(len(self.blocks), lambda count: any(peak(count, end) <= target for end in ends))
        if not blocks:
            lowest = min(peak(1, end) for end in ends)
            raise UserError(
                f"memory_budget: {self.budget / GB:.4g} GB, but with backprop on {self.blocks[-1][0]} and what follows it takes {lowest / GB:.4g} "
                "GB; raise the budget, or use a schedule of es alone"
            )
        saving = next(saving for saving in savings if peak(blocks, saving) <= target)
        self._take(blocks, saving, peak(blocks, saving))

    def _backprop_peak(self, blocks: int, saving: Saving, objective: Objective, batch: Any) -> float:
        """The peak of a step, with what others keep between steps."""
        config = saving.applied_to(self.config.estimators[self.name])
        return peak_of_backprop(self.engine, config, self._last(blocks), objective, batch) + self._kept_between_steps(0)

    def _others_peak(self, name: str, objective: Objective, batch: Any) -> int:
        """The peak of another estimator's estimate, before anybody keeps anything between steps."""
        release_memory(self.engine.device)
        forget_peak(self.engine.device)
        estimator = build_estimator(self.config.estimators[name])  # another one, so that nothing is remembered of this
        estimator.estimate(self.engine, objective, batch, self._may_ever_move(name), StepKey(0, 0, name))
        return peak_memory_bytes(self.engine.device)

    def _kept_between_steps(self, blocks: int) -> int:
        """Bytes that estimators will keep, by what their configurations say, without what is there in an estimate alone.

        Args:
            blocks: how many of the last ones backprop owns.
        """
        total = 0
        for name in acting_names(self.config.schedule):
            config = self.config.estimators[name]
            owned = self._last(blocks) if name == self.name else self._may_ever_move(name)
            shapes = {parameter: tuple(self.engine.parameters[parameter].shape) for parameter in owned}
            total += sum(config.lasting(shapes).values())
        return total

    # ------------------------------------------------------------ adjusting

    def shrink(self, name: str, why: str) -> bool:
        """Let backprop own a block less, or of the last one save more memory; whether there was anything left to do about an estimator's."""
        if name != self.name or self.fit is None:
            return False
        blocks, saving, peak = self.fit
        savings = self._savings(self.examples)
        following = savings[savings.index(saving) + 1 :]
        if not following and blocks == 1:
            return False
        self._take(*((blocks - 1, saving) if blocks > 1 else (1, following[0])), peak)
        release_memory(self.engine.device)
        self.told = f"{why}; {self._words()}"
        return True

    def observe(self, peak: int, acted: Collection[str]) -> None:
        """See the peak of a step that was taken. What was freed but not given back counts as well, so the first one that is too high
        leads to that, and the second in a row to less for backprop."""
        if self.name not in acted:
            return
        self.exceeded = self.exceeded + 1 if peak > self.budget else 0
        if self.exceeded == 1:
            release_memory(self.engine.device)
        elif self.exceeded and self.shrink(self.name, f"a step took {peak / GB:.4g} GB of {self.budget / GB:.4g}"):
            self.exceeded = 0

    def take_told(self) -> str:
        """What has changed since this was last asked, in words; empty if nothing has."""
        told, self.told = self.told, ""
        return told

    def state_dict(self) -> dict[str, Any]:
        """What was chosen, in plain values."""
        fit = {"blocks": self.fit[0], "saving": asdict(self.fit[1]), "peak": self.fit[2]} if self.fit else None
        return {"is_chosen": self.is_chosen, "examples": self.examples, "exceeded": self.exceeded, "fit": fit}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.is_chosen, self.examples, self.exceeded = state["is_chosen"], state["examples"], state["exceeded"]
        if fit := state["fit"]:
            self._take(fit["blocks"], Saving(**fit["saving"]), fit["peak"])

    # ------------------------------------------------------------ pieces

    def _take(self, blocks: int, saving: Saving, peak: float) -> None:
        self.fit = (blocks, saving, peak)
        self.ownership.limit(self.name, self._last(blocks))
        self.estimators[self.name].config = saving.applied_to(self.config.estimators[self.name])

    def _savings(self, examples: int | None) -> list[Saving]:
        return savings_of(self.config.estimators[self.name], examples, can_checkpoint(self.engine.model))

    def _last(self, blocks: int) -> list[str]:
        return [name for block in self.blocks[len(self.blocks) - blocks :] for name in block]

    def _may_ever_move(self, name: str) -> list[str]:
        owned = may_ever_move(self.config, self.ownership.widest, name)
        return [parameter for parameter in self.engine.parameters if parameter in owned]

    def _words(self) -> str:
        if self.fit is None:
            return "memory_budget: nothing takes gradients"
        blocks, saving, _ = self.fit
        how = f", with {saving}" if str(saving) else ""
        return f"memory_budget: {self.name} owns {blocks} of {len(self.blocks)} blocks, from {self.blocks[-blocks][0]} on{how}"

    def _refuse_what_nobody_else_moves(self) -> None:
        if self.engine.layout()["zero_stage"]:
            raise UserError(
                "memory_budget: DeepSpeed lays out the memory of all that backprop may ever own before the first step, so nothing can be tried; "
                "give backprop fewer layers by the policy (hybrid-opt plan tells what they take), or write engine: {type: local}"
            )
        if measured := next((place for rules in self.ownership.rules.values() for place in rules), None):
            raise UserError(
                f"memory_budget: it gives backprop the last layers, and {measured} gives it those that matter most, so what is cut off would be nobody's; "
                "drop one of them, or lower top"
            )
        for phase, policy in self.ownership.widest.items():
            acts = self.name in acting_in(self.config.schedule, phase) if self.name else False
            alone = next((p for p, who in policy.owners.items() if who == (self.name,)), None)
            if acts and alone:
                raise UserError(
                    f"memory_budget: what of {self.name}'s does not fit is left to others, but the policy gives {alone} to it alone; write use: "
                    f"[es, {self.name}] with an es estimator of the schedule's"
                )
