"""Grouped products to test kernels with: sizes, operands, and what they must give.

Whole-number operands make every sum exact, in float32 and in the narrower sums of the FP8 matrix
units, in whatever order: kernels are compared with them bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

# END rows of the groups, and the rows there are: not a multiple of a tile, empty groups first, last
# and in between, one row, a tail of no group, nothing at all.
ENDS = [
    ([3, 3, 150, 150, 300], 310),
    ([0, 128, 256, 256], 256),
    ([1], 1),
    ([0, 0, 0], 5),
]


def whole_numbers(shape: tuple[int, ...], largest: int, seed: int) -> Tensor:
    """Integers from -largest to largest as float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


def powers_of_two(shape: tuple[int, ...], seed: int) -> Tensor:
    """Scales 1/2, 1 and 2."""
    return torch.exp2(whole_numbers(shape, 1, seed))


def spread(scales: Tensor, *dims: int) -> Tensor:
    """Each scale for its 128 entries along ``dims``, as float64."""
    for dim in dims:
        scales = scales.repeat_interleave(128, dim)
    return scales.double()


def product_by_rows(x: Tensor, w: Tensor, ends: list[int]) -> Tensor:
    """``x[rows of g] @ w[g]`` in float64, zero elsewhere."""
    out = x.new_zeros(x.shape[0], w.shape[2], dtype=torch.float64)
    start = 0
    for group, end in enumerate(ends):
        out[start:end] = x[start:end].double() @ w[group].double()
        start = end
    return out


def product_by_columns(x: Tensor, grad: Tensor, ends: list[int]) -> Tensor:
    """``x[rows of g].T @ grad[rows of g]`` in float64."""
    starts = [0, *ends[:-1]]
    parts = [x[a:b].double().t() @ grad[a:b].double() for a, b in zip(starts, ends, strict=True)]
    return torch.stack(parts)


def padded_blocks(ends: list[int]) -> list[range]:
    """Rows of each block of 128, group by group: what a transposed operand holds."""
    blocks, start = [], 0
    for end in ends:
        blocks += [range(first, min(first + 128, end)) for first in range(start, end, 128)]
        start = end
    return blocks


def turned(x: Tensor, ends: list[int], num_blocks: int) -> Tensor:
    """Rows [M, K] as columns [K, 128 * num_blocks], every group padded to whole blocks."""
    out = x.new_zeros(x.shape[1], 128 * num_blocks)
    for block, rows in enumerate(padded_blocks(ends)):
        out[:, 128 * block : 128 * block + len(rows)] = x[rows.start : rows.stop].t()
    return out
