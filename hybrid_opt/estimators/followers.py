"""Estimators that look on while backprop takes its gradients. Next: `../training/hybrid_optimizer.py`, which shows them.

One idea: a gradient is there only from its backward pass to the optimizer's step, so whoever needs it later is shown it in between.
Without such an estimator nothing is read and nothing is copied.
"""

from collections.abc import Collection, Mapping
from typing import Any

from hybrid_opt.engines.contract import Engine
from hybrid_opt.estimators.contract import Estimate, Estimator, FollowsBackprop


class Followers:
    """Those of the estimators that follow backprop.

    Args:
        engine: holds the weights.
        estimators: all that ever act, by name.
        may_move: for each the parameters that it may ever move.
    """

    def __init__(self, engine: Engine, estimators: Mapping[str, Estimator], may_move: Mapping[str, Collection[str]]):
        self.engine, self.may_move = engine, may_move
        self.by_name = {name: e for name, e in estimators.items() if isinstance(e, FollowsBackprop)}

    def show(self, gradient: Estimate, names: Collection[str]) -> None:
        """Show everybody what concerns them of the gradient of these parameters; all ranks together.

        One that is not finite is not shown: loss scaling takes no step with it either.
        """
        shown = {follower: self.may_move[follower] & set(names) for follower in self.by_name}
        read = frozenset().union(*shown.values())
        if not read or self.engine.ranks.any(not self._is_finite(gradient, read)):
            return
        for follower, parameters in shown.items():
            self.by_name[follower].follow(self.engine, gradient, parameters)

    def _is_finite(self, gradient: Estimate, names: Collection[str]) -> bool:
        return all(bool(gradient.read(shard).isfinite().all()) for shard in self.engine.shards(names))

    def state_dict(self) -> dict[str, Any]:
        """What each remembers on this rank, by name."""
        return {name: follower.state_dict() for name, follower in self.by_name.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        for name, follower in self.by_name.items():
            follower.load_state_dict(state[name], self.engine)
