"""What a schedule file may say: estimators, a policy and a schedule, none of which knows the model.

One idea: a schedule file is complete in itself, so the same file serves every model, and every name used in it
is defined in it. Next: `run.py`, the file that puts a schedule to work on a model.
"""

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator
from typing_extensions import Self

from hybrid_opt.config.adaptive import Adaptive
from hybrid_opt.config.by_length import ByLength
from hybrid_opt.config.estimators import Backprop, Estimator, StaleGradient
from hybrid_opt.config.guided import FirstMoment, Guided
from hybrid_opt.config.importance import Importance
from hybrid_opt.config.strict import NonNegativeFloat, NonNegativeInt, PositiveInt, Strict
from hybrid_opt.config.triggers import Trigger


def _is_a_name(name: str) -> str:
    # It stands in tables, in trackers, and between the keys of a checkpoint.
    if not (0 < len(name) <= 100 and name.isprintable()):
        raise ValueError(
            f"{name[:100]!r} is no name for an estimator; write 1 to 100 characters without tabs and line ends"
        )
    return name


EstimatorName = Annotated[str, AfterValidator(_is_a_name)]

# ---------------------------------------------------------------- policy


class Rule(Strict):
    """Which estimators may move the parameters that this rule selects. The first rule that selects a parameter wins."""

    match: str | None = None
    """Regular expression searched for in the parameter's name."""
    layers: str | Importance | None = Field(
        None, json_schema_extra=lambda schema: schema["anyOf"].insert(1, {"type": "integer"})
    )
    """Layer numbers instead of a regular expression: `20-29`, `7`, `first-2` or `last-4`; or those that matter most by a measurement:
    `{top: 4, by: gradient_norm}`."""
    use: tuple[str, ...] | Literal["frozen"]
    """Names of the estimators that may move the parameters, or `frozen`."""

    @field_validator("match")
    @classmethod
    def _is_regular_expression(cls, pattern: Any) -> Any:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return pattern

    @field_validator("layers", mode="before")
    @classmethod
    def _layers_are_readable(cls, layers: Any) -> Any:
        layers = str(layers) if isinstance(layers, int) and not isinstance(layers, bool) else layers
        if isinstance(layers, str) and not re.fullmatch(r"\d{1,9}(-\d{1,9})?|(first|last)-[1-9]\d{0,8}", layers):
            raise ValueError(f"{layers!r} names no layers; write a number, a range such as 20-29, first-2 or last-4")
        if isinstance(layers, str) and layers[0].isdigit():
            first, _, last = layers.partition("-")
            if last and int(last) < int(first):
                raise ValueError(f"{layers!r} ends before it begins; write {last}-{first}")
        return layers

    @model_validator(mode="after")
    def _one_selector(self) -> Self:
        if (self.match is None) == (self.layers is None):
            raise ValueError("a rule needs either match (a regular expression) or layers (such as 20-29)")
        if self.use == ():
            raise ValueError("use is empty; name the estimators that may move these parameters, or write: use: frozen")
        return self


# ---------------------------------------------------------------- schedules


class Single(Strict):
    """One estimator acts at every step."""

    type: Literal["single"]
    estimator: str
    """Name of the estimator."""


class Alternate(Strict):
    """Estimators take turns: each acts alone for its number of steps, in the order written, over and over."""

    type: Literal["alternate"]
    pattern: Annotated[dict[str, PositiveInt], Field(min_length=1)]
    """Steps of each estimator's turn, such as `{es: 9, backprop: 1}`."""


class Ramp(Strict):
    """A weight that moves in a straight line and then stays."""

    start: NonNegativeFloat
    """Weight at step 0."""
    end: NonNegativeFloat
    """Weight from step `over` on."""
    over: PositiveInt
    """Steps that the change takes."""


class Blend(Strict):
    """Several estimators act in the same step; their estimates are added with these weights."""

    type: Literal["blend"]
    weights: Annotated[dict[str, NonNegativeFloat | Ramp], Field(min_length=1)]
    """Weight of each estimator: a number or a ramp. An estimator whose weight is 0 rests."""

    @field_validator("weights")
    @classmethod
    def _somebody_always_acts(cls, weights: Any) -> Any:
        ramps = [w if isinstance(w, Ramp) else Ramp(start=w, end=w, over=1) for w in weights.values()]
        if all(ramp.start == 0 for ramp in ramps) or all(ramp.end == 0 for ramp in ramps):
            raise ValueError("all weights are 0 at the start or at the end, so no estimator would act")
        return weights


class Phase(Strict):
    """A stretch of the run with its own schedule and, where given, its own policy."""

    steps: PositiveInt | None = None
    """Length in steps."""
    tokens: PositiveInt | None = None
    """Length in tokens that the estimators have processed; the phase ends at the first step that reaches it."""
    until: Trigger | None = None
    """The phase ends when a signal crosses a limit."""
    at_least: PositiveInt | None = None
    """With `until`: fewest steps."""
    at_most: PositiveInt | None = None
    """With `until`: most steps."""
    cool_down: NonNegativeInt = 0
    """With `until`: steps after the trigger has ended the phase in which it may not end it again."""
    then: NonNegativeInt | None = None
    """Number of the phase that follows, which may be an earlier one; left out: the next."""
    schedule: Annotated[Single | Alternate | Blend, Field(discriminator="type")]
    """Who acts during the phase, with steps counted from its start."""
    policy: tuple[Rule, ...] | None = None
    """Replaces the file's policy during the phase."""


def _problem_of_length(phase: Phase, is_last: bool) -> str:
    """What is wrong with what a phase says of its length; empty if nothing is."""
    lengths = [name for name in ("steps", "tokens", "until") if getattr(phase, name) is not None]
    if len(lengths) > 1:
        return f"has a length both in {lengths[0]} and in {lengths[1]}; keep one"
    if not lengths and not is_last:
        return "has no length; give it steps, tokens or until (only the last may have none)"
    if not lengths and phase.then is not None:
        return "says what follows (then), but has no length; give it steps, tokens or until"
    if phase.until is None and (phase.at_least or phase.at_most or phase.cool_down):
        return "has at_least, at_most or cool_down, which go with until; drop them, or write until: {signal: ...}"
    if phase.until and is_last and phase.then is None:
        return "has until, but nothing follows; write then: 0, or drop until"
    if phase.at_least and phase.at_most and phase.at_most < phase.at_least:
        return f"has at_most {phase.at_most}, less than at_least {phase.at_least}"
    return ""


class Phases(Strict):
    """Schedules one after another."""

    type: Literal["phases"]
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)]
    """The phases in order; the last one may leave out its length and then lasts to the end of the run."""

    @field_validator("phases")
    @classmethod
    def _lengths_are_clear(cls, phases: Any) -> Any:
        for number, phase in enumerate(phases):
            if problem := _problem_of_length(phase, is_last=number == len(phases) - 1):
                raise ValueError(f"phase {number} {problem}")
            if phase.then is not None and (phase.then >= len(phases) or phase.then == number):
                others = ", ".join(str(other) for other in range(len(phases)) if other != number) or "there is none"
                raise ValueError(f"phase {number}: then {phase.then} is no other phase; write one of {others}")
        return phases

    def following(self, number: int) -> int | None:
        """The phase that comes after one; None: it lasts."""
        then = self.phases[number].then
        return then if then is not None else number + 1 if number + 1 < len(self.phases) else None


AnySchedule = Single | Alternate | Blend | Phases | Adaptive | ByLength
Schedule = Annotated[AnySchedule, Field(discriminator="type")]


def acting_names(schedule: AnySchedule) -> list[str]:
    """Names of the estimators that a schedule ever lets act, in order of first mention."""
    match schedule:
        case Single():
            names = [schedule.estimator]
        case Alternate():
            names = list(schedule.pattern)
        case Blend():
            names = list(schedule.weights)
        case Phases():
            names = [name for phase in schedule.phases for name in acting_names(phase.schedule)]
        case Adaptive():
            names = list(schedule.estimators)
        case ByLength():
            names = list(schedule.weights)
    return list(dict.fromkeys(names))


def lasting_names(schedule: AnySchedule) -> list[str]:
    """Names of the estimators that still act however long a schedule goes on."""
    if isinstance(schedule, Phases):
        return list(
            dict.fromkeys(n for i in _lasting_phases(schedule) for n in lasting_names(schedule.phases[i].schedule))
        )
    if isinstance(schedule, Blend):
        return [name for name, w in schedule.weights.items() if (w.end if isinstance(w, Ramp) else w)]
    return acting_names(schedule)


def _lasting_phases(schedule: Phases) -> list[int]:
    """The phase that lasts, or those that are gone through over and over."""
    way, number = [], 0
    while number is not None and number not in way:
        way.append(number)
        number = schedule.following(number)
    return way[-1:] if number is None else way[way.index(number) :]


class ScheduleFile(Strict):
    """The whole of a schedule file."""

    description: str = ""
    """What the recipe is for, in a sentence."""
    estimators: Annotated[dict[EstimatorName, Estimator], Field(min_length=1)]
    """The estimators, under names of your own."""
    policy: tuple[Rule, ...] | None = None
    """Ordered rules, parameter -> estimators; left out: every estimator may move every parameter."""
    schedule: Schedule
    """Who acts when."""

    @model_validator(mode="after")
    def _names_are_defined(self) -> Self:
        left_out = [self.schedule.long] if isinstance(self.schedule, ByLength) else []
        for name in acting_names(self.schedule) + left_out:
            self._known(name, "the schedule")
        for number, phase in enumerate(self.phases):
            if phase.until and phase.until.estimator:
                self._known(phase.until.estimator, f"the trigger of phase {number}")
        for where, rules in [
            ("the policy", self.policy),
            *((f"the policy of phase {i}", p.policy) for i, p in enumerate(self.phases)),
        ]:
            for rule in rules or ():
                for name in () if rule.use == "frozen" else rule.use:
                    self._known(name, where)
        return self

    @model_validator(mode="after")
    def _gradients_set_the_threshold(self) -> Self:
        schedule = self.schedule
        automatic = isinstance(schedule, ByLength) and schedule.length_threshold == "auto"
        if automatic and not isinstance(self.estimators[schedule.short], Backprop):
            raise ValueError(
                f"length_threshold: auto goes by what backprop takes, but short names {schedule.short!r}, which is "
                f"{self.estimators[schedule.short].type}; write a number of tokens"
            )
        return self

    @model_validator(mode="after")
    def _one_backprop(self) -> Self:
        names = [name for name, e in self.estimators.items() if isinstance(e, Backprop)]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} are both backprop, but there is one optimizer; keep one of them")
        return self

    @model_validator(mode="after")
    def _backprop_leaves_gradients(self) -> Self:
        acting = acting_names(self.schedule)
        needing = [name for name in acting if self.estimators[name].needs_gradient]
        if needing and not any(isinstance(self.estimators[name], Backprop) for name in acting):
            own = self.estimators[needing[0]]
            using = next((w.type for w in own.wrappers if w.needs_gradient), own.type)
            raise ValueError(
                f"{needing[0]!r}: {using} uses gradients of a backprop estimator again, but none acts; define one under estimators and let it "
                f"act too, such as pattern: {{backprop: 1, {needing[0]}: 9}}"
            )
        return self

    @model_validator(mode="after")
    def _trust_has_a_measure(self) -> Self:
        acting = acting_names(self.schedule)
        trusting = next((name for name in acting if getattr(self.estimators[name], "trust", None)), None)
        if trusting and not any(isinstance(self.estimators[name], Backprop) for name in acting):
            raise ValueError(
                f"estimators.{trusting}.trust compares updates with backprop's, but no backprop estimator acts; drop it, or let one act too, "
                f"such as pattern: {{backprop: 1, {trusting}: 9}}"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_has_first_moment(self) -> Self:
        backprop = self.backprop
        for name in acting_names(self.schedule):
            own = self.estimators[name]
            if isinstance(own, Guided) and isinstance(own.guides, FirstMoment) and not backprop.has_first_moment:
                raise ValueError(
                    f"estimators.{name}.guides: {backprop.optimizer} keeps no first moment; write guides: {{type: gradients}}, or for "
                    "backprop optimizer: AdamW, or optimizer_arguments: {momentum: 0.9} for SGD"
                )
        return self

    @model_validator(mode="after")
    def _tokens_are_processed(self) -> Self:
        for number, phase in enumerate(self.phases):
            if phase.tokens and (names := self.lasts_without_forwards(phase.schedule)):
                raise ValueError(
                    f"phase {number} has a length in tokens, but {names} (stale_gradient) processes none, so it would not end; "
                    "give it steps"
                )
        return self

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The schedule's phases; none in one without."""
        return self.schedule.phases if isinstance(self.schedule, Phases) else ()

    @property
    def backprop_name(self) -> str | None:
        """Name of the backprop estimator, of which there is at most one."""
        return next((name for name, e in self.estimators.items() if isinstance(e, Backprop)), None)

    @property
    def acting_backprop(self) -> str | None:
        """Name of the backprop estimator, if the schedule ever lets it act."""
        return next((name for name in acting_names(self.schedule) if name == self.backprop_name), None)

    @property
    def backprop(self) -> Backprop | None:
        """The backprop estimator."""
        return self.estimators.get(self.backprop_name)

    @property
    def signals(self) -> frozenset[str]:
        """Names of the signals that the schedule goes by (`config.triggers`)."""
        spent = {f"{self.schedule.per}s"} if isinstance(self.schedule, Adaptive) else set()
        return frozenset(spent | {phase.until.signal for phase in self.phases if phase.until})

    def lasts_without_forwards(self, schedule: AnySchedule) -> str:
        """Who acts alone from some step of a schedule on and makes no forward pass; empty if somebody does."""
        names = lasting_names(schedule)
        return " and ".join(names) if all(isinstance(self.estimators[n], StaleGradient) for n in names) else ""

    def _known(self, name: str, where: str) -> None:
        if name not in self.estimators:
            near = difflib.get_close_matches(name, self.estimators, n=1, cutoff=0)
            raise ValueError(
                f"{where} names the estimator {name!r}, which is not defined; defined: "
                f"{', '.join(self.estimators)} (did you mean {near[0]!r}?)"
            )
