"""The gradients of rows that were multiplied by a weight each, from one reading of the rows.

They belong to ``y = weights[:, None] * rows``: the gradient of the rows is ``weights * grad``, that
of a weight the product of its row and ``grad``. In torch operations these are five passes, three of
them in float32. Arithmetic is float32 whatever the dtype of the rows (float64 for float64), rounded
once on the way out.

M rows, H hidden size.
"""

from __future__ import annotations

import torch
from dualpipe_ext.kernels.backend import accumulator_dtype, runs_triton
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform that torch runs on
    triton = None

# Columns that one program handles at a time: 8 values per thread, 16 bytes of bfloat16.
_MAX_BLOCK = 1024


def weighted_rows_grad(
    grad: Tensor,
    rows: Tensor | None,
    weights: Tensor | None,
    *,
    groups: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the rows and of their weights.

    Args:
        grad: [M, H], of the weighted rows, any float dtype.
        rows: [M, H], what was weighted; None if the gradient of the weights is not wanted.
        weights: [M], any float dtype; None if the gradient of the rows is not wanted.
        groups: where there are padding rows, whose weights get no gradient whatever they hold:
            int32 [G], the END row of each group, and int64 [G], how many of its rows, its first
            ones, hold something. Both contiguous.

    Returns:
        [M, H] in the dtype of ``grad``, or None without ``weights``; and float32 (float64 for a
        float64 ``grad``) [M], or None without ``rows``. A row is summed in a fixed order, so the
        result has the same bits every time.

    Example: grad [[1, 2]], rows [[3, 4]], weights [0.5] give [[0.5, 1]] and [11].
    """
    wide = accumulator_dtype(grad.dtype)
    # Not where a compiler traces, which fuses the torch operations itself.
    if type(grad) is not Tensor or not runs_triton(grad):
        exact = grad.to(wide)
        products = None if rows is None else (exact * rows.to(wide)).sum(dim=1)
        if products is not None and groups is not None:
            # Not times zero: the rows may hold NaN.
            products = torch.where(filled_rows(*groups, grad.shape[0]), products, 0)
        if weights is None:
            return None, products
        return (exact * weights.to(wide).unsqueeze(1)).to(grad.dtype), products
    num_rows, size = grad.shape
    grad_rows = (
        None if weights is None else torch.empty_like(grad, memory_format=torch.contiguous_format)
    )
    products = None if rows is None else torch.zeros(num_rows, dtype=wide, device=grad.device)
    if grad.numel() == 0 or (rows is None and weights is None):
        return grad_rows, products
    # Gradients may be expanded, their strides 0.
    grad = grad.contiguous()
    rows = None if rows is None else rows.contiguous()
    offsets, counts = groups if rows is not None and groups is not None else (None, None)
    num_groups = 0 if offsets is None else len(offsets)
    with torch.cuda.device_of(grad):
        _kernel[(num_rows,)](
            grad,
            rows,
            None if weights is None else weights.contiguous(),
            grad_rows,
            products,
            offsets,
            counts,
            size,
            num_groups,
            GROUPS=triton.next_power_of_2(max(1, num_groups)),
            BLOCK=min(_MAX_BLOCK, triton.next_power_of_2(size)),
        )
    return grad_rows, products


def filled_rows(offsets: Tensor, counts: Tensor, num_rows: int) -> Tensor:
    """bool [M]: which rows of groups hold something, and which are padding.

    Example: groups that end at [2, 6] with [1, 3] rows, out of 7: [1, 0, 1, 1, 1, 0, 0].
    """
    starts = offsets.roll(1)
    starts[:1] = 0
    # One group more, without rows, for what lies past the last group.
    last_filled = torch.cat([starts + counts, counts.new_zeros(1)])
    place = torch.arange(num_rows, device=offsets.device)
    return place < last_filled[torch.searchsorted(offsets, place, right=True)]


if triton is not None:

    @triton.jit
    def _kernel(
        grad_ptr,
        rows_ptr,
        weights_ptr,
        grad_rows_ptr,
        products_ptr,
        offsets_ptr,
        counts_ptr,
        size,
        num_groups,
        GROUPS: tl.constexpr,  # noqa: N803  Triton's convention for compile-time arguments
        BLOCK: tl.constexpr,  # noqa: N803
    ):
        # 64 bits: rows times their size passes 2^31 well within the memory of one GPU.
        row = tl.program_id(0).to(tl.int64)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + row).to(tl.float32)
        partial = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < size
            at = row * size + column
            grad = tl.load(grad_ptr + at, inside, other=0.0).to(tl.float32)
            if rows_ptr is not None:
                partial += grad * tl.load(rows_ptr + at, inside, other=0.0).to(tl.float32)
            if weights_ptr is not None:
                weighted = grad * weight
                tl.store(grad_rows_ptr + at, weighted.to(grad_rows_ptr.dtype.element_ty), inside)
        if products_ptr is not None:
            product = tl.sum(partial, axis=0)
            if offsets_ptr is not None:
                index = tl.arange(0, GROUPS)
                end = tl.load(offsets_ptr + index, index < num_groups, other=0)
                before = (end <= row) & (index < num_groups)
                group = tl.sum(before.to(tl.int32), axis=0)
                start = tl.max(tl.where(before, end, 0), axis=0)
                count = tl.load(counts_ptr + group, group < num_groups, other=0)
                product = tl.where(row - start < count, product, 0.0)
            tl.store(products_ptr + row, product)
