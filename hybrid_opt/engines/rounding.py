"""Rounding float32 weights to narrower ones so that small changes are not lost. Next: `local.py`.

One idea: a weight that lies between two representable values is rounded up with the probability of its place between
them, so it is right on average. The random number of an element moves on by the golden ratio from step to step instead of
being drawn anew: over n steps the share of roundings up is then right to about 1/n rather than 1/sqrt(n).
"""

import torch
from torch import Tensor

from hybrid_opt.noise import numba_kernels, torch_kernels
from hybrid_opt.noise.drawing import block_size, key_blocks
from hybrid_opt.noise.keys import Key

GOLDEN = 40503
"""2^16 / golden ratio, odd, so that all of the 2^16 thresholds come up equally often."""


def round_stochastically(wide: Tensor, out: Tensor, key: Key, step: int, start: int = 0) -> None:
    """Rounds to bfloat16, up or down at random, seeded and without a state.

    With u uniform in [0, 1): `out = low + (high - low) [u < (wide - low) / (high - low)]` for the neighbours low <= |wide| <
    high in bfloat16. Element i's u at a step t is `frac(u_i + t / golden ratio)`, u_i from the counter-based noise.

    Args:
        wide: float32 (numel,).
        out: bfloat16 (numel,), written.
        key: origin of the noise; the same at all steps of a run.
        step: number of the step.
        start: index of the first element in its parameter.
    """
    shift = step * GOLDEN & 0xFFFF
    for words, index, place in key_blocks([key], start, len(wide)):
        if wide.device.type == "cpu":
            numba_kernels.round_up_or_down(words, index, shift, wide[place], out[place])
        else:
            _round_by_torch(words, index, shift, wide[place], out[place])


def _round_by_torch(words: Tensor, start: int, shift: int, wide: Tensor, out: Tensor) -> None:
    """The same by torch operations, for GPUs."""
    block = block_size(wide.device)
    for at in range(0, len(wide), block):
        part = wide[at : at + block]
        drawn = torch.empty(1, len(part), device=wide.device)
        torch_kernels.fill("bits", words, start + at, drawn)
        # Adding a number below 2^16 to the bits of a float32 and cutting off the lower 16 rounds its magnitude up or down;
        # an infinite or NaN value would be changed to another such one, so it is left alone.
        dither = (drawn[0].int() + shift).bitwise_and_(0xFFFF)
        rounded = (part.view(torch.int32) + dither).bitwise_and_(-0x10000).view(torch.float32)
        out[at : at + block] = torch.where(part.isfinite(), rounded, part)
