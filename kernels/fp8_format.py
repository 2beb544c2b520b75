"""The FP8 format of this package: E4M3 values by blocks of 128, each block with a float32 scale.

What belongs here: what the kernels and the torch operations that define them share. No Triton,
which takes long to import.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0
# Blocks below this are treated as if this were their largest value: keeps 448 / amax finite in
# float32 and gives an all-zero block a scale that is not zero. Far below any activation.
SMALLEST_AMAX = 2.0**-100


def power_of_two_scales(amax: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest powers of two s with ``amax <= 448 * s``, and their inverses.

    Args:
        amax: float32, any shape, at least ``SMALLEST_AMAX``.

    Returns:
        Two of the shape of ``amax``, float32; exact.

    >>> power_of_two_scales(torch.tensor([448.0, 449.0]))
    (tensor([1., 2.]), tensor([1.0000, 0.5000]))
    """
    # Without rounding: 448 is 0.875 * 2^9.
    mantissa, exponent = torch.frexp(amax)
    exponent = exponent - 9 + (mantissa > 0.875).to(exponent.dtype)
    ones = torch.ones_like(amax)
    return torch.ldexp(ones, exponent), torch.ldexp(ones, -exponent)
