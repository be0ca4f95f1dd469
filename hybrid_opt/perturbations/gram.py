"""Gram matrices of directions, factored. Next: `mixed_directions.py`, `../estimators/align.py`.

One idea: how q directions lie to each other is a q x q matrix, and all that makes them orthogonal or projects onto their span is in its
Cholesky factor.
"""

import torch
from torch import Tensor

from hybrid_opt.errors import UserError

LEAST_SHARE = 1e-6
"""Least share of a direction's energy outside the span of those before it; the matrix, a sum of float32 products, tells no less."""


def cholesky(gram: Tensor, values: int) -> Tensor:
    """Lower triangular L with `L L^T = K` and a positive diagonal; `L_jj^2` is the energy of direction j outside the span of those before.

    Args:
        gram: K, (q, q) float64.
        values: n, how many values the directions have.

    Raises:
        UserError: the directions are not independent: there are more than n, or one lies in the span of others.
    """
    q = len(gram)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if q > values or failed or (factor.diagonal().square() < LEAST_SHARE * gram.diagonal()).any():
        raise UserError(
            f"the {q} directions of a step are not linearly independent in the {values} values that they move; lower pairs (es and "
            "fzoo: population_size; forward_gradient: tangents), or give the estimator more parameters by the policy or its wrappers"
        )
    return factor
