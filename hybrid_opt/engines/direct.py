"""Updates without the optimizer, shard by shard. Next: `local.py`."""

from collections.abc import Iterable, Sequence

from hybrid_opt.engines.contract import Contribution, Shard
from hybrid_opt.engines.master_weights import MasterWeights


def moved_directly(contributions: Sequence[Contribution]) -> tuple[set[str], set[str]]:
    """Names that go through the optimizer in this step, and those that are moved by the contributions' own rules."""
    through = {name for c in contributions if c.rule is None for name in c.names}
    return through, {name for c in contributions if c.rule is not None for name in c.names} - through


def update_directly(
    shards: Iterable[Shard],
    contributions: Sequence[Contribution],
    masters: MasterWeights,
    step: int,
) -> None:
    """Let each contribution that has a rule move its shards by it, in float32."""
    for shard in shards:
        with masters.wide(shard, step) as wide:
            for c in contributions:
                if c.rule is not None and shard.name in c.names:
                    c.rule.update(wide, c.estimate, c.weight, c.learning_rate)
        del wide  # before the next one is made
