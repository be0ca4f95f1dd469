"""Keys: where a stream of noise begins. Next: `drawing.py`.

One idea: a key is all that must be remembered of noise. It is a seed and what was folded into it, so it depends on neither order nor place.
"""

import hashlib
from collections.abc import Sequence


class Key:
    """The origin of a stream of noise: a seed and everything folded into it, such as step, member and name.

    Two keys with different parts give independent streams; equal keys give equal ones. Immutable.

    Args:
        parts: integers and strings.
    """

    __slots__ = ("text",)

    def __init__(self, parts: Sequence[int | str]) -> None:
        self.text = "".join(f"{part!r}," for part in parts)

    @classmethod
    def from_text(cls, text: str) -> "Key":
        """The key that has this `text`."""
        key = Key(())
        key.text = text
        return key

    def fold(self, *parts: int | str) -> "Key":
        """A new key that also depends on `parts`."""
        key = Key(parts)
        key.text = self.text + key.text
        return key

    def seed(self) -> int:
        """A non-negative integer of 63 bits, for libraries that want a seed."""
        return int.from_bytes(self.digest(8), "little") >> 1

    def digest(self, size: int, suffix: str = "") -> bytes:
        """`size` bytes that depend on all parts, and on a suffix."""
        return hashlib.blake2b((self.text + suffix).encode(), digest_size=size).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"Key(({self.text}))"


class StepKey(Key):
    """The key of an estimator's noise in one step.

    Args:
        seed: of the run.
        step: number of the step.
        estimator: name of the estimator.
    """

    __slots__ = ("origin",)

    def __init__(self, seed: int, step: int, estimator: str) -> None:
        super().__init__((seed, step, estimator))
        self.origin = (seed, step, estimator)

    def stretch(self, steps: int) -> int:
        """In which stretch of so many steps it is, counted from the run's first."""
        return self.origin[1] // steps

    def lasting(self, steps: int, *parts: int | str) -> Key:
        """A key that is the same for `steps` steps, counted from the run's first, and depends on `parts`."""
        seed, _, estimator = self.origin
        return Key((seed, "lasting", self.stretch(steps), estimator)).fold(*parts)
