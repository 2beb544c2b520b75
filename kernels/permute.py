"""Rows from token layout to expert layout and back, for transports whose rows arrive token-major.

What the kernels compute is defined by ``dualpipe_ext.ep.expand``, which calls them for CUDA
tensors; their results have the same bits. Both walk the token rows: expanding reads each row once
and writes it as often as it is wanted, reducing reads all its copies and writes it once.

N token rows, M expert rows, K top-k, P (row, choice) pairs that have a local expert, C values in a
row.

Example used below: token row 0 belongs to expert row 2, token row 1 to expert rows 0 and 3, and
expert row 1 is padding. As pairs: row [0, 1, 1], turn [0, 0, 1], position [2, 0, 3]; as a table
of N x K: [[2, -1], [0, 3]].
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform that torch runs on
    triton = None

AVAILABLE = triton is not None
SUMMED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Bytes of a row that one program handles: 32 or 16 for each of its 128 threads. Less in the sum,
# where a thread has a piece of each of K rows in flight.
_COPIED_BYTES = 4096
_SUMMED_BYTES = 2048


def expert_rows_of(
    row: Tensor, turn: Tensor, position: Tensor, *, num_rows: int, top_k: int
) -> Tensor:
    """The table of each token row's expert rows, in the order in which they are summed.

    Args:
        row: int64 [P], the pair's token row.
        turn: int64 [P], how many pairs of the same row come before it; less than ``top_k``.
        position: int64 [P], its expert row.
        num_rows: N.

    Returns:
        int64 [N, K], -1 after the last pair of a row.
    """
    table = position.new_full((num_rows, top_k), -1)
    table[row, turn] = position
    return table


def expand_rows(tokens: Tensor, table: Tensor, position: Tensor, num_rows: int) -> Tensor:
    """Copy each token row to its expert rows; expert rows without a token become zero.

    Args:
        tokens: [N, ...], any dtype: rows are copied as bytes.
        table: int64 [N, K], from :func:`expert_rows_of`.
        position: int64 [P], all expert rows in the table, in any order.
        num_rows: M, more than any of them.

    Returns:
        [M, ...] in the dtype of tokens.

    Example: tokens [[5, 6], [7, 8]] give [[7, 8], [0, 0], [5, 6], [7, 8]].
    """
    _check_table(table, tokens)
    tokens = tokens.contiguous()
    out = torch.empty((num_rows, *tokens.shape[1:]), dtype=tokens.dtype, device=tokens.device)
    if out.numel() == 0:
        return out
    integer = _widest_integer(tokens, out.nbytes // num_rows)
    target = _as_integers(out, integer)
    if num_rows > len(position):
        target.index_fill_(0, _rows_not_in(position, num_rows), 0)
    if tokens.numel() == 0:
        return out
    source = _as_integers(tokens, integer)
    size = source.shape[1]
    block = _block(size, _COPIED_BYTES // integer.itemsize)
    # Triton launches on the current device, whichever one the tensors are on.
    with torch.cuda.device_of(tokens):
        _expand_kernel[(source.shape[0], triton.cdiv(size, block))](
            source, target, table, size, TOP_K=table.shape[1], BLOCK=block, enable_fp_fusion=False
        )
    return out


def reduce_rows(rows: Tensor, table: Tensor, weights: Tensor | None) -> Tensor:
    """Sum the expert rows of each token row from left to right, and round once.

    Product and sum are rounded one after the other, in float32 (float64 for float64 rows).

    Args:
        rows: [M, C], float32, bfloat16, float16 or float64; rows may be strided.
        table: int64 [N, K], from :func:`expert_rows_of`.
        weights: floating [M], the factor of each expert row, or None.

    Returns:
        [N, C] in the dtype of rows; zero for a token row without expert rows.

    Example: rows [[1, 2], [9, 9], [3, 4], [5, 6]] with weights [2, 9, 1, 10] give
    [[3, 4], [52, 64]], and without weights [[3, 4], [6, 8]].
    """
    _check_table(table, rows)
    if rows.dim() != 2 or rows.dtype not in SUMMED_DTYPES:
        raise ValueError(
            f"expected rows [M, C] in one of {SUMMED_DTYPES}, got {rows.dtype} {list(rows.shape)}"
        )
    if weights is not None:
        if weights.shape != rows.shape[:1] or weights.device != rows.device:
            raise ValueError(
                f"expected weights [{rows.shape[0]}] on {rows.device}, "
                f"got {list(weights.shape)} on {weights.device}"
            )
        weights = weights.contiguous()
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    (num_rows, top_k), size = table.shape, rows.shape[1]
    out = torch.empty(num_rows, size, dtype=rows.dtype, device=rows.device)
    if out.numel() == 0:
        return out
    block = _block(size, _SUMMED_BYTES // rows.element_size())
    with torch.cuda.device_of(rows):
        _reduce_kernel[(num_rows, triton.cdiv(size, block))](
            rows,
            weights,
            out,
            table,
            size,
            rows.stride(0),
            TOP_K=top_k,
            HAS_WEIGHTS=weights is not None,
            SUM=tl.float64 if rows.dtype == torch.float64 else tl.float32,
            BLOCK=block,
            # A fused multiply-add would round once where the definition rounds twice.
            enable_fp_fusion=False,
        )
    return out


if AVAILABLE:

    @triton.jit
    def _expand_kernel(
        source_ptr,
        target_ptr,
        table_ptr,
        size,
        TOP_K: tl.constexpr,  # noqa: N803  Triton's convention for compile-time arguments
        BLOCK: tl.constexpr,  # noqa: N803
    ):
        # 64 bits: rows times size passes 2^31 well within the memory of one GPU.
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(source_ptr + row * size + column, column < size)
        for turn in tl.static_range(TOP_K):
            position = tl.load(table_ptr + row * TOP_K + turn)
            limit = tl.where(position >= 0, size, 0)
            tl.store(target_ptr + position * size + column, values, column < limit)

    @triton.jit
    def _reduce_kernel(
        rows_ptr,
        weights_ptr,
        out_ptr,
        table_ptr,
        size,
        rows_stride,
        TOP_K: tl.constexpr,  # noqa: N803
        HAS_WEIGHTS: tl.constexpr,  # noqa: N803
        SUM: tl.constexpr,  # noqa: N803
        BLOCK: tl.constexpr,  # noqa: N803
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], dtype=SUM)
        # Unrolled and without branches, so that the loads of all turns are in flight together. The
        # +0 that a turn without a row adds changes no bit: a sum that starts at +0 is never -0.
        for turn in tl.static_range(TOP_K):
            position = tl.load(table_ptr + row * TOP_K + turn)
            here = position >= 0
            limit = tl.where(here, size, 0)
            part = tl.load(rows_ptr + position * rows_stride + column, column < limit, other=0.0)
            part = part.to(SUM)
            if HAS_WEIGHTS:
                part = part * tl.load(weights_ptr + position, here, other=0.0).to(SUM)
            total += part
        total = total.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * size + column, total, column < size)


def _rows_not_in(position: Tensor, num_rows: int) -> Tensor:
    free = torch.ones(num_rows, dtype=torch.bool, device=position.device)
    free[position] = False
    # Their number is known, so the host need not wait for it.
    return torch.nonzero_static(free, size=num_rows - len(position)).flatten()


def _widest_integer(rows: Tensor, row_bytes: int) -> torch.dtype:
    """The widest integers that contiguous rows consist of.

    Copies need no arithmetic, so every dtype comes down to one of four kernels.
    """
    start = rows.data_ptr() | rows.storage_offset() * rows.element_size()
    return next(
        dtype
        for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
        if (row_bytes | start) % dtype.itemsize == 0
    )


def _as_integers(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.view(len(rows), -1).view(torch.uint8).view(dtype)


def _block(size: int, most: int) -> int:
    return min(most, triton.next_power_of_2(size))


def _check_table(table: Tensor, rows: Tensor) -> None:
    if table.dim() != 2 or table.dtype != torch.int64 or table.device != rows.device:
        raise ValueError(
            f"expected a table int64 [N, K] on {rows.device}, "
            f"got {table.dtype} {list(table.shape)} on {table.device}"
        )
