"""Numbers that `numba_kernels.py` and `torch_kernels.py` share. Next: `numba_kernels.py`."""

PER_WORD = {"gaussian": 2, "rademacher": 32, "bits": 2}
"""Values made from one index of the hash."""

MIXER = (0x7FEB352D, 0x846CA68B)
"""Multipliers of the `lowbias32` mixer (C. Wellons, "Prospecting for Hash Functions", 2018)."""

UNIFORM = 2.0**-31
"""u = (n + 1/2) / 2^31 for 31 random bits n: the small values, where the tail comes from, keep full precision."""
BOUNDARY = 0x3F3504F3
"""Bits of sqrt(1/2) in float32."""
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
"""Polynomial of Cephes' logf (S. Moshier)."""

ANGLE = 3.14159265358979 / 2 * 2.0**-30
"""Radians of a step of the angle's lower 30 bits."""
SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
"""Polynomials of Cephes' sinf and cosf (S. Moshier)."""
