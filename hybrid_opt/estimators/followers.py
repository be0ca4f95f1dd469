"""Estimators that look on while backprop takes its gradients. Next: `remembering.py`, then `../training/hybrid_optimizer.py`.

One idea: a gradient is there only from its backward pass to the optimizer's step, so whoever needs it later is shown it in between.
Without such an estimator nothing is read and nothing is copied.
"""

from collections.abc import Collection, Mapping

from hybrid_opt.engines.contract import Engine
from hybrid_opt.estimators.contract import Estimator, FollowsBackprop, Gradient, chain


class Followers:
    """Those of the estimators that follow backprop.

    Args:
        engine: holds the weights.
        estimators: all that ever act, by name.
        may_move: for each the parameters that it may ever move.
    """

    def __init__(
        self, engine: Engine, estimators: Mapping[str, Estimator], may_move: Mapping[str, Collection[str]]
    ) -> None:
        self.engine = engine
        self.following = [
            (part, may_move[name])
            for name, estimator in estimators.items()
            for part in chain(estimator)
            if isinstance(part, FollowsBackprop)
        ]

    def show(self, gradient: Gradient, names: Collection[str]) -> None:
        """Show everybody what concerns them of the gradient of these parameters; all ranks together.

        One that is not finite is not shown: loss scaling takes no step with it either.
        """
        read = {name for _, may_move in self.following for name in may_move if name in names}
        if not read or self.engine.ranks.any(not self._is_finite(gradient, read)):
            return
        for follower, may_move in self.following:
            follower.follow(self.engine, gradient, may_move & set(names))

    def _is_finite(self, gradient: Gradient, names: Collection[str]) -> bool:
        return all(bool(gradient.read(shard).isfinite().all()) for shard in self.engine.shards(names))
