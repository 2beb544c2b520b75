"""Grouped GEMMs in Triton that stay on as many SMs as they are given, or that make room.

What belongs here: the two products of a layer of experts as one kernel each, for 16-bit operands
and for FP8 with a scale per block of 128, and their launchers. Who may call them with what is the
matter of ``grouped_gemm.py`` (16 bits) and ``fp8_gemm.py``.

A CTA finds the rows of an output tile from the offsets on the device: nothing is read back, and a
tile's bits depend neither on who computes it nor on its size. A launch has one of two grids:

- Persistent: ``max_sms`` CTAs at most, each taking one tile after the other from a queue. They take
  so much shared memory that no two fit on one SM. With fixed shares of tiles, a CTA whose SM is
  taken by communication at first would end late by all that time; from a queue the others take its
  tiles meanwhile.
- Short CTAs (``max_sms=SHORT_CTAS``): one for every few tiles, over in some tens of microseconds
  (longer where few groups have most of the rows that a weight gradient sums). Whenever one ends, a
  kernel on a stream of higher priority may have its SM, so communication waits no longer than that,
  and takes no more SMs than it has CTAs.

Shapes: M rows, G groups, K inputs, N outputs, P rows padded to whole blocks of 128 per group.
``offsets`` int32 [G] holds the END row of each group. Offsets that decrease or exceed M leave
undefined values, but never an access outside the tensors.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from dualpipe_ext.kernels.gemm_tiles import padded_groups
from dualpipe_ext.kernels.grouped_gemm import SHORT_CTAS, added
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from dualpipe_ext.kernels.gemm_tiles import (
        add_scaled,
        call_to_l2,
        group_rows,
        load_weights,
        next_tile,
        place,
    )
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # not on every platform that torch runs on
    triton = None

# TMA and warp-group matrix instructions.
MIN_CAPABILITY = (9, 0)
# Rows of output tiles that are computed column by column before the next ones: 2048 rows of
# operands stay in the L2 cache while every CTA works on them.
_SWEEP = 16
# CTAs of a launch in the interpreter, which has no SMs.
_INTERPRETED_SMS = 4
# Steps along the inner size that a short CTA has at least, if it has more than one tile: 0.4 us
# each on an H200 (`dualpipe bench gemm`), against two microseconds to start a CTA.
_SHORT_STEPS = 128
# CTAs that each SM has one after the other, at least, if they have more than one tile.
_SHORT_WAVES = 4
# Rows to a group, on average, below which two small tiles to an SM are faster than a large one, in
# BF16: 5080 us instead of 5695 with 256 rows, 3417 instead of 3176 with 1024 (7168 x 4096 outputs).
_FEW_ROWS = 512
# As many steps take as long as storing a tile and starting on the next.
_STORE_STEPS = 8


def usable_on(device: torch.device) -> bool:
    """Whether the kernels run on this device."""
    if triton is None or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def multiply_rows(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    *,
    x_scales: Tensor | None = None,
    w_scales: Tensor | None = None,
    out_dtype: torch.dtype,
    max_sms: int | None = None,
) -> Tensor:
    """``out[rows of g] = x[rows of g] @ w[g]``; rows past the last group are zero.

    With scales, ``x[m, k]`` counts ``x_scales[m, k // 128]`` times and ``w[g, k, n]``
    ``w_scales[g, k // 128, n // 128]`` times; the products of each 128 inputs are summed by
    themselves before their scales are applied and they join the float32 sum.

    Args:
        x: [M, K], rows contiguous, their stride a multiple of 16 bytes.
        w: [G, K, N], contiguous or the transpose (1, 2) of something contiguous. With scales always
            such a transpose: the matrix instructions for FP8 read both operands along K.
        offsets: int32 [G].
        x_scales: float32 [M, K / 128], contiguous.
        w_scales: float32 [G, K / 128, N / 128], any strides.

    Returns:
        [M, N].
    """
    num_rows, size_k = x.shape
    num_groups, _, size_n = w.shape
    out = torch.empty(num_rows, size_n, dtype=out_dtype, device=x.device)
    if num_rows == 0 or size_n == 0 or size_k == 0:
        return out.zero_()
    sizes = rows_tile(scaled=x_scales is not None, itemsize=x.element_size())
    block_m, block_n, block_k = sizes["BLOCK_M"], sizes["BLOCK_N"], sizes["BLOCK_K"]
    transposed = w.stride(2) != 1
    box = [1, block_n, block_k] if transposed else [1, block_k, block_n]
    # Every group adds at most one tile that is not full, and so do the rows of none.
    most = (num_rows // block_m + num_groups + 1) * -(-size_n // (block_n * sizes["PARTS"]))
    # Triton launches on the current device, whichever one the tensors are on.
    with torch.cuda.device_of(x):
        grid = _grid(x.device, max_sms, most, -(-size_k // block_k))
        _rows_kernel[(grid.num_ctas,)](
            TensorDescriptor.from_tensor(x, [block_m, block_k]),
            TensorDescriptor.from_tensor(w.transpose(1, 2) if transposed else w, box),
            out,
            offsets.contiguous(),
            grid.queue,
            x_scales,
            w_scales,
            num_rows,
            size_k,
            size_n,
            num_groups,
            grid.tiles_each,
            *((0, 0, 0) if w_scales is None else w_scales.stride()),
            W_TRANSPOSED=transposed,
            GROUPS=padded_groups(num_groups + 1),
            **sizes,
        )
    return out


def multiply_columns(
    x: Tensor,
    grad: Tensor,
    offsets: Tensor,
    *,
    x_scales: Tensor | None = None,
    grad_scales: Tensor | None = None,
    num_rows: int,
    out_dtype: torch.dtype,
    total: Tensor | None = None,
    max_sms: int | None = None,
) -> Tensor:
    """``out[g] = x[rows of g].T @ grad[rows of g]``; zero for empty groups.

    With ``total``, contiguous [G, K, N], that is added to it in place: rounded by itself and once
    more as a sum, which gives the bits of ``total.add_(out)``. By the kernel if ``total`` is in
    ``out_dtype``; by torch otherwise.

    Without scales x is [M, K] and grad [M, N], both with contiguous rows. With scales they are
    transposed, every group's rows padded with zeros to whole blocks of 128 (P in all, from the
    first group's on without gaps), because FP8 operands are read along the rows that are summed:
    x [K, P], grad [N, P], ``x_scales`` float32 [P / 128, K], ``grad_scales`` float32 [P / 128, N].

    Args:
        offsets: int32 [G], in rows without padding.
        num_rows: M.

    Returns:
        [G, K, N]: ``total``, if there is one.
    """
    scaled = x_scales is not None
    size_k, size_n = (x.shape[0], grad.shape[0]) if scaled else (x.shape[1], grad.shape[1])
    num_groups = offsets.shape[0]
    if num_rows == 0 or size_n == 0 or size_k == 0:
        if total is not None:
            return total
        return torch.zeros(num_groups, size_k, size_n, dtype=out_dtype, device=x.device)
    in_place = total is not None and total.dtype == out_dtype
    out = total
    if not in_place:
        out = torch.empty(num_groups, size_k, size_n, dtype=out_dtype, device=x.device)
    narrow = max_sms == SHORT_CTAS and (scaled or num_rows < _FEW_ROWS * num_groups)
    sizes = columns_tile(scaled=scaled, itemsize=x.element_size(), narrow=narrow)
    block_m, block_n, block_k = sizes["BLOCK_M"], sizes["BLOCK_N"], sizes["BLOCK_K"]
    boxes = (
        ([block_m, block_k], [block_n, block_k])
        if scaled
        else ([block_k, block_m], [block_k, block_n])
    )
    most = num_groups * -(-size_k // block_m) * -(-size_n // block_n)
    with torch.cuda.device_of(x):
        grid = _grid(x.device, max_sms, most, -(-num_rows // (num_groups * block_k)))
        _columns_kernel[(grid.num_ctas,)](
            TensorDescriptor.from_tensor(x, boxes[0]),
            TensorDescriptor.from_tensor(grad, boxes[1]),
            x,
            grad,
            out,
            offsets.contiguous(),
            grid.queue,
            x_scales,
            grad_scales,
            num_rows,
            size_k,
            size_n,
            num_groups,
            grid.tiles_each,
            x.stride(0),
            grad.stride(0),
            GROUPS=padded_groups(num_groups),
            ADD=in_place,
            **sizes,
        )
    if in_place:
        # Autograd sees by the version that what it may have saved has changed.
        torch.autograd.graph.increment_version(total)
    return added(out, total)


def rows_tile(*, scaled: bool, itemsize: int) -> dict[str, Any]:
    """Constants and options of the kernel behind :func:`multiply_rows`, reasoned for H200.

    128 x 256 outputs: every byte that comes out of the L2 cache is used 128 or 256 times; the
    smaller tile, 128 x 128, would ask more of it than it gives. Two warp groups hold them in 128
    registers per thread. A step reads 128 bytes of each row, what one swizzled box holds. FP8 keeps
    the sum of a step apart until it is scaled: in two halves, so that it takes 64 registers more,
    not 128. Four stages are 192 KiB, which also keeps a second CTA off the SM.
    """
    return {
        "SCALED": scaled,
        "PARTS": 2 if scaled else 1,
        "BLOCK_N": 128 if scaled else 256,
        **_tile(scaled, itemsize),
    }


def columns_tile(*, scaled: bool, itemsize: int, narrow: bool) -> dict[str, Any]:
    """The same for :func:`multiply_columns`.

    With FP8 every column has a scale of its own, 32 registers more: 128 x 128 outputs.

    With few rows a tile is over as soon as it has begun. A ``narrow`` one is for one warp group and
    three stages, so that an SM holds two, and one computes while the other begins or stores.
    """
    tile = {"SCALED": scaled, "BLOCK_N": 128 if scaled or narrow else 256}
    tile |= _tile(scaled, itemsize)
    if narrow:
        tile |= {"BLOCK_M": 64 if scaled else 128, "num_warps": 4, "num_stages": 3}
    return tile


def _tile(scaled: bool, itemsize: int) -> dict[str, Any]:
    return {
        "BLOCK_M": 128,
        "BLOCK_K": 128 if scaled else 128 // itemsize,
        "SWEEP": _SWEEP,
        "IN_ORDER": not _interpreted(),
        "num_warps": 8,
        "num_stages": 4,
    }


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


class _Grid(NamedTuple):
    """How a launch divides its tiles among CTAs."""

    num_ctas: int
    tiles_each: int
    """Of each CTA, before it asks the queue."""
    queue: Tensor | None
    """int32 [1], tiles taken from it so far: none. None if nobody asks."""


def _grid(device: torch.device, max_sms: int | None, num_tiles: int, steps_of_tile: int) -> _Grid:
    if device.type == "cuda":
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    else:
        num_sms = _INTERPRETED_SMS
    if max_sms == SHORT_CTAS:
        # Not so many that SMs have none, nor that few have one more than the others.
        fair = num_tiles // (_SHORT_WAVES * num_sms)
        each = max(1, min(fair, _SHORT_STEPS // (steps_of_tile + _STORE_STEPS)))
        return _Grid(-(-num_tiles // each), each, None)
    num_ctas = min(num_sms, num_tiles, num_sms if max_sms is None else max_sms)
    return _Grid(num_ctas, 1, torch.zeros(1, dtype=torch.int32, device=device))


if triton is not None:
    # Not compiled again for numbers of rows that are multiples of 16: they change in every step.
    @triton.jit(do_not_specialize=["num_rows", "num_groups", "tiles_each"])
    def _rows_kernel(
        x_desc,
        w_desc,
        out_ptr,
        offsets_ptr,
        queue_ptr,
        x_scales_ptr,
        w_scales_ptr,
        num_rows,
        size_k,
        size_n,
        num_groups,
        tiles_each,
        w_scales_group,
        w_scales_k,
        w_scales_n,
        SCALED: tl.constexpr,  # noqa: N803
        W_TRANSPOSED: tl.constexpr,  # noqa: N803
        GROUPS: tl.constexpr,  # noqa: N803
        PARTS: tl.constexpr,  # noqa: N803
        BLOCK_M: tl.constexpr,  # noqa: N803
        BLOCK_N: tl.constexpr,  # noqa: N803
        BLOCK_K: tl.constexpr,  # noqa: N803
        SWEEP: tl.constexpr,  # noqa: N803
        IN_ORDER: tl.constexpr,  # noqa: N803
    ):
        sizes, ends = group_rows(offsets_ptr, num_rows, num_groups, GROUPS)
        last_row_tile = tl.cumsum(tl.cdiv(sizes, BLOCK_M), 0)
        col_tiles = tl.cdiv(size_n, PARTS * BLOCK_N)
        num_steps = tl.cdiv(size_k, BLOCK_K)
        num_tiles = tl.max(last_row_tile, 0) * col_tiles
        tile = tl.program_id(0) * tiles_each
        while tile < num_tiles:
            following = next_tile(queue_ptr, tile, tiles_each, num_tiles)
            before = last_row_tile * col_tiles <= tile
            group = tl.sum(before.to(tl.int32), 0)
            first = tl.max(tl.where(before, last_row_tile, 0), 0) * col_tiles
            start = tl.max(tl.where(before, ends, 0), 0)
            end = tl.min(tl.where(before, num_rows, ends), 0)
            row_tiles = tl.cdiv(end - start, BLOCK_M)
            row_tile, col_tile = place(tile - first, row_tiles, col_tiles, SWEEP)
            # Rows of the next group may be read along with this one's; they are not stored.
            row = start + row_tile * BLOCK_M
            rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
            first_col = col_tile * PARTS * BLOCK_N
            sums = (tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32),)
            for _ in tl.static_range(PARTS - 1):
                sums = sums + (tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32),)  # noqa: RUF005
            # The rows of no group: no step, so zeros are stored.
            for step in range(tl.where(group < num_groups, num_steps, 0)):
                k = step * BLOCK_K
                x = x_desc.load([row, k])
                if SCALED:
                    x_scales = tl.load(
                        x_scales_ptr + rows * num_steps + step, rows < end, other=0.0
                    )
                    w_scales = w_scales_ptr + group.to(tl.int64) * w_scales_group
                    w_scales += step * w_scales_k
                new_sums = ()
                for part in tl.static_range(PARTS):
                    col = first_col + part * BLOCK_N
                    w = load_weights(w_desc, group, k, col, W_TRANSPOSED, BLOCK_N, BLOCK_K)
                    if SCALED:
                        w_scale = tl.load(
                            w_scales + col // BLOCK_N * w_scales_n, col < size_n, other=0.0
                        )
                        scales = (x_scales * w_scale)[:, None]
                        new_sum = add_scaled(sums[part], tl.dot(x, w), scales, IN_ORDER)
                    else:
                        new_sum = tl.dot(x, w, sums[part])
                    new_sums = new_sums + (new_sum,)  # noqa: RUF005
                sums = new_sums
            for part in tl.static_range(PARTS):
                cols = first_col + part * BLOCK_N + tl.arange(0, BLOCK_N)
                inside = (rows < end)[:, None] & (cols < size_n)[None, :]
                at = out_ptr + rows[:, None] * size_n + cols[None, :]
                tl.store(at, sums[part].to(out_ptr.dtype.element_ty), inside)
            tile = following

    @triton.jit(do_not_specialize=["num_rows", "num_groups", "tiles_each"])
    def _columns_kernel(
        x_desc,
        grad_desc,
        x_ptr,
        grad_ptr,
        out_ptr,
        offsets_ptr,
        queue_ptr,
        x_scales_ptr,
        grad_scales_ptr,
        num_rows,
        size_k,
        size_n,
        num_groups,
        tiles_each,
        x_stride,
        grad_stride,
        SCALED: tl.constexpr,  # noqa: N803
        GROUPS: tl.constexpr,  # noqa: N803
        ADD: tl.constexpr,  # noqa: N803
        BLOCK_M: tl.constexpr,  # noqa: N803
        BLOCK_N: tl.constexpr,  # noqa: N803
        BLOCK_K: tl.constexpr,  # noqa: N803
        SWEEP: tl.constexpr,  # noqa: N803
        IN_ORDER: tl.constexpr,  # noqa: N803
    ):
        sizes, ends = group_rows(offsets_ptr, num_rows, num_groups, GROUPS)
        index = tl.arange(0, GROUPS)
        row_tiles = tl.cdiv(size_k, BLOCK_M)
        col_tiles = tl.cdiv(size_n, BLOCK_N)
        tiles = row_tiles * col_tiles
        num_tiles = num_groups * tiles
        tile = tl.program_id(0) * tiles_each
        while tile < num_tiles:
            following = next_tile(queue_ptr, tile, tiles_each, num_tiles)
            group = tile // tiles
            row_tile, col_tile = place(tile - group * tiles, row_tiles, col_tiles, SWEEP)
            row, col = row_tile * BLOCK_M, col_tile * BLOCK_N
            rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
            out_group = out_ptr + group.to(tl.int64) * size_k * size_n
            if ADD and IN_ORDER:
                call_to_l2(out_group, row, col, size_k, size_n, BLOCK_M, BLOCK_N)
            size = tl.sum(tl.where(index == group, sizes, 0), 0)
            total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            if SCALED:
                earlier = tl.where(index < group, tl.cdiv(sizes, BLOCK_K), 0)
                first = tl.sum(earlier, 0)
                x_scales_at = x_scales_ptr + first.to(tl.int64) * size_k
                grad_scales_at = grad_scales_ptr + first.to(tl.int64) * size_n
                # No more blocks than there are, whatever the offsets say.
                last = tl.minimum(first + tl.cdiv(size, BLOCK_K), num_rows // BLOCK_K + num_groups)
                for block in range(first, last):
                    x_scales = tl.load(x_scales_at + rows, rows < size_k, other=0.0)
                    grad_scales = tl.load(grad_scales_at + cols, cols < size_n, other=0.0)
                    x_scales_at += size_k
                    grad_scales_at += size_n
                    x = x_desc.load([row, block * BLOCK_K])
                    grad = grad_desc.load([col, block * BLOCK_K])
                    scales = x_scales[:, None] * grad_scales[None, :]
                    total = add_scaled(total, tl.dot(x, grad.T), scales, IN_ORDER)
            else:
                start = tl.sum(tl.where(index == group, ends, 0), 0) - size
                whole = size // BLOCK_K
                for block in range(whole):
                    x = x_desc.load([start + block * BLOCK_K, row])
                    grad = grad_desc.load([start + block * BLOCK_K, col])
                    total = tl.dot(x.T, grad, total)
                if whole * BLOCK_K < size:
                    # What follows the group's last rows is not zero: those one by one.
                    left = (whole * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
                    at = start + left
                    x_inside = (left < size)[:, None] & (rows < size_k)[None, :]
                    x = tl.load(x_ptr + at[:, None] * x_stride + rows[None, :], x_inside, other=0.0)
                    grad_inside = (left < size)[:, None] & (cols < size_n)[None, :]
                    grad = tl.load(
                        grad_ptr + at[:, None] * grad_stride + cols[None, :], grad_inside, other=0.0
                    )
                    total = tl.dot(x.T, grad, total)
            at = out_group + rows[:, None].to(tl.int64) * size_n + cols[None, :]
            inside = (rows < size_k)[:, None] & (cols < size_n)[None, :]
            out = total.to(out_ptr.dtype.element_ty)
            if ADD:
                so_far = tl.load(at, inside)
                out = (so_far.to(tl.float32) + out.to(tl.float32)).to(out_ptr.dtype.element_ty)
            tl.store(at, out, inside)
            tile = following
