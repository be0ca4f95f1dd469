"""How much a run keeps of itself as it goes. Next: `training.py`."""

from typing import Literal

from hybrid_opt.config.strict import NonNegativeInt, PositiveInt, Strict


class Keeping(Strict):
    """Which checkpoints stay, and when they hold weights."""

    keep_checkpoints: PositiveInt = 2
    """How many of the latest checkpoints stay; where the newest is damaged, `--resume` goes back to the one before."""
    snapshots: Literal["checkpoint", "switch"] | PositiveInt = "checkpoint"
    """When all weights and the optimizer's state are saved after steps that the ledger cannot bring back, those of backprop,
    stale_gradient and guided: only in a `checkpoint` that is due; at each `switch` to estimators that the ledger does hold; or after so
    many such steps, 1 being every one. Any but `checkpoint` also leaves the latest snapshots in the folder of a finished run."""
    replay_at_most: NonNegativeInt = 100
    """Most steps since the last snapshot that `--resume` takes again from the ledger, without evaluating anything; up to there a
    checkpoint holds no weights and takes kilobytes. 0: every checkpoint holds them."""
