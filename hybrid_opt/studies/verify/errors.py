"""How far estimates of a linear loss's gradient are from it. Next: `guided.py`.

One idea: each law is a row of a list. `n` is the number of values, `q` of directions, `g` the gradient, `a` its estimate.
"""

from collections.abc import Iterator

from hybrid_opt.studies.verify.quantity import Quantity, error_of, function_of_means, mean_of, squared_cosine
from hybrid_opt.studies.verify.sampling import DENSE, Trials

M, N = 6, 8
VALUES = M * N
PAIRS = 4


def mean_square_errors(trials: Trials) -> Iterator[Quantity]:
    """`E|a - g|^2 / |g|^2` is (n + 1)/q with Gaussian, (n - 1)/q with Rademacher and sphere directions, n/q - 1 with orthogonal ones.

    Source: fourth moments of the distributions (Isserlis' theorem); for orthogonal directions a is n/q times a projection.
    """
    laws = {
        "gaussian": (VALUES + 1) / PAIRS,
        "rademacher": (VALUES - 1) / PAIRS,
        "sphere": (VALUES - 1) / PAIRS,
        "orthogonal": VALUES / PAIRS - 1,
    }
    for distribution, law in laws.items():
        form = {"type": "dense", "distribution": distribution}
        samples = trials.of_linear(700, type="spsa", pairs=PAIRS, perturbation=form)
        yield mean_of(f"MSE of spsa, {distribution}", law, error_of(samples))


def forward_gradient_errors(trials: Trials) -> Iterator[Quantity]:
    """Slopes by forward-mode differentiation have the error of exact ones: `(n - 1)/k` for k Rademacher tangents (arXiv 2202.08587)."""
    samples = trials.of_linear(600, type="forward_gradient", tangents=PAIRS)
    yield mean_of("MSE of forward_gradient, rademacher", (VALUES - 1) / PAIRS, error_of(samples))


def low_rank_errors(trials: Trials) -> Iterator[Quantity]:
    """`E|a - g|^2 / |g|^2 = (mn + 1 + 2 (m + n + 1)/r) / q` for directions `B^T A / sqrt(r)` of one matrix (EGGROLL, arXiv 2511.16652)."""
    for rank, repeats in ((1, 3500), (4, 1500), (64, 900)):
        law = (VALUES + 1 + 2 * (M + N + 1) / rank) / PAIRS
        form = {"type": "low_rank", "noise_rank": rank}
        samples = trials.of_linear(repeats, type="spsa", pairs=PAIRS, perturbation=form)
        yield mean_of(f"MSE of spsa, low rank r = {rank}", law, error_of(samples))


def cosine_and_shrinkage(trials: Trials) -> Iterator[Quantity]:
    """`E cos(a, g)^2 = 1 / (1 + (n - 1)/q)`, a Beta(q/2, (n - 1)/2) variable, for Gaussian directions; no multiple of a is
    nearer to g than `q / (q + n + 1)` times it.

    The cosine's is the law `cos = 1 / sqrt(1 + n/q)` without its approximation.
    """
    options = {"type": "es", "population_size": 2 * PAIRS, "fitness_shaping": "none", "perturbation": DENSE}
    samples = trials.of_linear(800, **options)
    along, squared = samples.unbind(1)
    yield mean_of("squared cosine of es with the gradient", 1 / (1 + (VALUES - 1) / PAIRS), along.square() / squared)
    best = PAIRS / (PAIRS + VALUES + 1)
    yield function_of_means("best factor of es", best, samples, lambda mean: mean[..., 0] / mean[..., 1])


def averaging(trials: Trials) -> Iterator[Quantity]:
    """Averaging the slopes of as many Gaussian directions as there are values explains only n/(2n + 1) of |g|^2: half of it.

    The best multiple of a mean of q slopes explains `q / (q + n + 1)`, since `E|a|^2 = |g|^2 (1 + (n + 1)/q)`.
    """
    samples = trials.of_linear(60, type="spsa", pairs=VALUES, perturbation=DENSE)
    law = VALUES / (2 * VALUES + 1)
    yield function_of_means("share of |g|^2 in averages of q = n", law, samples, squared_cosine)


def projection(trials: Trials) -> Iterator[Quantity]:
    """Projecting on the span of q directions explains `q/n` of |g|^2, so the mean square error is `1 - q/n`, and is 0 for q = n."""
    for pairs in (VALUES // 4, VALUES // 2):
        samples = trials.of_linear(100, type="align", pairs=pairs, perturbation=DENSE)
        yield mean_of(f"MSE of align, q = {pairs} of n = {VALUES}", 1 - pairs / VALUES, error_of(samples))
