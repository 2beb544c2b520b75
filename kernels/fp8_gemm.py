"""FP8 products of a layer of experts: E4M3 operands, a scale per block, float32 sums.

What belongs here: quantising weights by blocks of 128 x 128, turning quantised rows into operands
of the weight gradient, and the two grouped products; each a Triton kernel on Hopper GPUs, and torch
operations that define it elsewhere. Quantising rows (1 x 128) is in ``dualpipe_ext.ep.fp8``;
autograd is in ``dualpipe_ext.pipeline.fp8_linear``.

The recipe is that of the DeepSeek-V3 report, section 3.3: E4M3 everywhere; activations and output
gradients scaled by 1 x 128, weights by 128 x 128; for the weight gradient both operands by 128 x 1,
128 rows of one expert; the products of 128 terms are summed in the matrix units and then, scaled,
in float32 registers. Scales are powers of two: rows that are quantised again in columns lose only
what the columns' scales cannot hold. ``torch._scaled_grouped_mm`` is no help: on Hopper it takes
one scale per row, not blocks.

Shapes: M rows, G groups, K inputs, N outputs, both multiples of 128; P rows padded to whole blocks
of 128 per group. ``offsets`` int32 [G] holds the END row of each group, as in ``grouped_gemm.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from dualpipe_ext.kernels import persistent_gemm
from dualpipe_ext.kernels.backend import accumulator_dtype
from dualpipe_ext.kernels.fp8_format import BLOCK, SMALLEST_AMAX, power_of_two_scales
from dualpipe_ext.kernels.gemm_tiles import padded_groups
from dualpipe_ext.kernels.grouped_gemm import (
    added,
    check_max_sms,
    check_offsets,
    check_total,
    group_bounds,
)
from torch import Tensor

if TYPE_CHECKING:
    from dualpipe_ext.ep.fp8 import Quantized

try:
    import triton
    import triton.language as tl
    from dualpipe_ext.kernels.fp8_cast import largest_magnitude, pow2_scales_of
    from dualpipe_ext.kernels.gemm_tiles import group_rows
except ImportError:  # not on every platform that torch runs on
    triton = None

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Weights that the kernel casts. From 32-bit ones Triton 3.6 makes a wrong transpose on an H200
# (docs/LOG.md, "FP8 experts"), so torch casts those: slower, and nobody's weights at scale.
_KERNEL_DTYPES = (torch.bfloat16, torch.float16)


class QuantizedWeights(NamedTuple):
    """Weights [G, K, N] to multiply rows with from the right.

    ``values`` float8_e4m3fn [G, K, N], the transpose of something contiguous: K has stride 1, as
    the matrix units read them. ``scales`` float32 [G, K / 128, N / 128], any strides.
    """

    values: Tensor
    scales: Tensor


class QuantizedColumns(NamedTuple):
    """Rows [M, K] turned: ``values`` float8_e4m3fn [K, P] and ``scales`` float32 [P / 128, K].

    Each group's rows begin with a block of 128 and are padded with zeros to whole blocks; blocks
    behind the last group's hold anything.
    """

    values: Tensor
    scales: Tensor


def quantize_weights(w: Tensor) -> tuple[QuantizedWeights, QuantizedWeights]:
    """Cast weights to FP8 by blocks of 128 x 128, read once for both directions.

    Example: a block of 1, -0.5, 0.3, 0, ... has the scale 1 / 256 and 256, -128, 80, 0, ...

    Args:
        w: [G, K, N], float32, bfloat16, float16 or float64.

    Returns:
        The weights [G, K, N], for :func:`grouped_mm_fp8` of the inputs; and [G, N, K] with the same
        values, for that of the output's gradient.

    Raises:
        ValueError: K or N is no multiple of 128, or w is not three-dimensional.
    """
    if w.dim() != 3 or w.shape[1] % BLOCK or w.shape[2] % BLOCK or not w.is_floating_point():
        raise ValueError(
            f"expected floating weights [G, K, N] with K and N multiples of {BLOCK}, "
            f"got {w.dtype} {list(w.shape)}"
        )
    num_groups, size_k, size_n = w.shape
    blocks = (num_groups, size_k // BLOCK, size_n // BLOCK)
    if persistent_gemm.usable_on(w.device) and w.dtype in _KERNEL_DTYPES and w.numel():
        values = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device)
        turned = values.new_empty(num_groups, size_n, size_k)
        scales = torch.empty(blocks, dtype=torch.float32, device=w.device)
        quantize_weights_into(w.contiguous(), values, turned, scales)
    else:
        parts = w.float().view(num_groups, blocks[1], BLOCK, blocks[2], BLOCK)
        amax = parts.abs().amax(dim=(2, 4), keepdim=True).clamp_min(SMALLEST_AMAX)
        scales, inverse = power_of_two_scales(amax)
        values = (parts * inverse).to(torch.float8_e4m3fn).view(w.shape)
        turned, scales = values.transpose(1, 2).contiguous(), scales.view(blocks)
    return (
        QuantizedWeights(turned.transpose(1, 2), scales),
        QuantizedWeights(values.transpose(1, 2), scales.transpose(1, 2)),
    )


def quantize_columns(x: Quantized, offsets: Tensor) -> QuantizedColumns:
    """Turn quantised rows and quantise them again, by 128 rows of one group.

    Args:
        x: values float8_e4m3fn [M, K] and scales float32 [M, K / 128].
        offsets: int32 [G].

    Returns:
        The columns, P = 128 (M // 128 + G): enough for every way to divide M rows into G groups.
    """
    _check_rows(x, offsets)
    (num_rows, size), num_groups = x.values.shape, offsets.shape[0]
    num_blocks = num_rows // BLOCK + num_groups
    values = x.values.new_empty(size, num_blocks * BLOCK)
    scales = x.scales.new_empty(num_blocks, size)
    if persistent_gemm.usable_on(offsets.device) and x.values.numel():
        quantize_columns_into(x.values, x.scales, offsets, values, scales)
        return QuantizedColumns(values, scales)
    values.zero_()
    scales.zero_()
    wide, block = _dequantize(x.values, x.scales, torch.float32), 0
    for start, end in group_bounds(offsets):
        for first in range(start, end, BLOCK):
            part = wide[first : min(first + BLOCK, end)]
            amax = part.abs().amax(dim=0).clamp_min(SMALLEST_AMAX)
            scales[block], inverse = power_of_two_scales(amax)
            column = block * BLOCK
            values[:, column : column + len(part)] = (part * inverse).to(values.dtype).t()
            block += 1
    return QuantizedColumns(values, scales)


def grouped_mm_fp8(
    x: Quantized,
    w: QuantizedWeights,
    offsets: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    max_sms: int | None = None,
) -> Tensor:
    """Multiply each group of rows by its own matrix: ``out[rows of g] = x[rows of g] @ w[g]``.

    Args:
        x: values float8_e4m3fn [M, K] and scales float32 [M, K / 128], both contiguous.
        w: weights [G, K, N].
        offsets: int32 [G], non-decreasing, at most M.
        out_dtype: bfloat16, float16 or float32; on a CPU also float64.
        max_sms: SMs to use at most, to leave the others to communication say, or ``SHORT_CTAS``
            (``grouped_gemm.py``); None for all.

    Returns:
        [M, N]; rows past ``offsets[-1]`` are zero. The same bits whatever ``max_sms``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    check_max_sms(max_sms)
    _check_rows(x, offsets)
    _check_weights(w, (offsets.shape[0], x.values.shape[1]), x.values.device)
    if persistent_gemm.usable_on(x.values.device):
        _check_out_dtype(out_dtype)
        return persistent_gemm.multiply_rows(
            x.values,
            w.values,
            offsets,
            x_scales=x.scales,
            w_scales=w.scales,
            out_dtype=out_dtype,
            max_sms=max_sms,
        )
    wide = accumulator_dtype(out_dtype)
    rows = _dequantize(x.values, x.scales, wide)
    out = rows.new_zeros(rows.shape[0], w.values.shape[2])
    for group, (start, end) in enumerate(group_bounds(offsets)):
        if end > start:
            scales = w.scales[group].repeat_interleave(BLOCK, 0).to(wide)
            torch.mm(
                rows[start:end],
                w.values[group].to(wide) * scales.repeat_interleave(BLOCK, 1),
                out=out[start:end],
            )
    return out.to(out_dtype)


def grouped_mm_fp8_weight_grad(
    x: Quantized,
    grad: Quantized,
    offsets: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    total: Tensor | None = None,
    max_sms: int | None = None,
) -> Tensor:
    """``out[g] = x[rows of g].T @ grad[rows of g]``, both quantised again along the rows.

    Args:
        x: values float8_e4m3fn [M, K] and scales float32 [M, K / 128], both contiguous.
        grad: the same of [M, N].
        offsets: int32 [G], non-decreasing, at most M.
        out_dtype: bfloat16, float16 or float32; on a CPU also float64.
        total: the gradient so far, [G, K, N] and contiguous, to add to in place: the bits of
            ``total.add_(...)`` with the gradient in ``out_dtype``.
        max_sms: the same for the product; the quantising before it takes no notice of it.

    Returns:
        [G, K, N], zero for empty groups; or ``total``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    check_max_sms(max_sms)
    _check_rows(x, offsets)
    _check_rows(grad, offsets)
    num_rows = x.values.shape[0]
    if grad.values.shape[0] != num_rows:
        raise ValueError(f"expected grad with {num_rows} rows, got {grad.values.shape[0]}")
    shape = (offsets.shape[0], x.values.shape[1], grad.values.shape[1])
    check_total(total, shape)
    if num_rows == 0:
        return added(x.scales.new_zeros(shape, dtype=out_dtype), total)
    x_columns, grad_columns = quantize_columns(x, offsets), quantize_columns(grad, offsets)
    if persistent_gemm.usable_on(offsets.device):
        _check_out_dtype(out_dtype)
        return persistent_gemm.multiply_columns(
            x_columns.values,
            grad_columns.values,
            offsets,
            x_scales=x_columns.scales,
            grad_scales=grad_columns.scales,
            num_rows=num_rows,
            out_dtype=out_dtype,
            total=total,
            max_sms=max_sms,
        )
    wide, first = accumulator_dtype(out_dtype), 0
    x_wide, grad_wide = (_dequantize_columns(c, wide) for c in (x_columns, grad_columns))
    out = x_wide.new_zeros(offsets.shape[0], x_wide.shape[0], grad_wide.shape[0])
    for group, (start, end) in enumerate(group_bounds(offsets)):
        last = first + -(-(end - start) // BLOCK) * BLOCK
        torch.mm(x_wide[:, first:last], grad_wide[:, first:last].t(), out=out[group])
        first = last
    return added(out.to(out_dtype), total)


def quantize_weights_into(w: Tensor, values: Tensor, turned: Tensor, scales: Tensor) -> None:
    """The kernel behind :func:`quantize_weights`: fills the last three from contiguous ``w``."""
    with torch.cuda.device_of(w):
        _weights_kernel[(scales.numel(),)](
            w,
            values,
            turned,
            scales,
            w.shape[1],
            w.shape[2],
            SMALLEST_AMAX=SMALLEST_AMAX,
            BLOCK=BLOCK,
            num_warps=8,
            enable_fp_fusion=False,
        )


def quantize_columns_into(
    x: Tensor, x_scales: Tensor, offsets: Tensor, values: Tensor, scales: Tensor
) -> None:
    """The kernel behind :func:`quantize_columns`: fills the last two."""
    num_groups = offsets.shape[0]
    with torch.cuda.device_of(x):
        _columns_kernel[(scales.numel() // BLOCK,)](
            x,
            x_scales,
            offsets.contiguous(),
            values,
            scales,
            x.shape[0],
            x.shape[1],
            num_groups,
            values.stride(0),
            GROUPS=padded_groups(num_groups),
            SMALLEST_AMAX=SMALLEST_AMAX,
            BLOCK=BLOCK,
            num_warps=8,
            enable_fp_fusion=False,
        )


if triton is not None:

    @triton.jit
    def _weights_kernel(
        w_ptr,
        values_ptr,
        turned_ptr,
        scales_ptr,
        size_k,
        size_n,
        SMALLEST_AMAX: tl.constexpr,  # noqa: N803  Triton's convention for compile-time arguments
        BLOCK: tl.constexpr,  # noqa: N803
    ):
        # 64 bits: the experts of one layer pass 2^31 values.
        block = tl.program_id(0).to(tl.int64)
        blocks_n = size_n // BLOCK
        row_block = block // blocks_n  # of all groups' rows, one below the other
        first_k, first_n = row_block * BLOCK, (block - row_block * blocks_n) * BLOCK
        index = tl.arange(0, BLOCK)
        rows, cols = first_k + index, first_n + index
        at = rows[:, None] * size_n + cols[None, :]
        w = tl.load(w_ptr + at).to(tl.float32)
        scale, inverse = pow2_scales_of(tl.max(largest_magnitude(w, 1, SMALLEST_AMAX), axis=0))
        tl.store(scales_ptr + block, scale)
        values = (w * inverse).to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + at, values)
        # [G, N, K]: the group's first row, then the column, then the row within the group.
        first_row = first_k // size_k * size_k
        at = first_row * size_n + cols[:, None] * size_k + (rows - first_row)[None, :]
        tl.store(turned_ptr + at, values.T)

    @triton.jit(do_not_specialize=["num_rows", "num_groups"])
    def _columns_kernel(
        x_ptr,
        x_scales_ptr,
        offsets_ptr,
        values_ptr,
        scales_ptr,
        num_rows,
        size,
        num_groups,
        out_stride,
        GROUPS: tl.constexpr,  # noqa: N803
        SMALLEST_AMAX: tl.constexpr,  # noqa: N803
        BLOCK: tl.constexpr,  # noqa: N803
    ):
        num_parts = size // BLOCK
        block = tl.program_id(0) // num_parts
        part = tl.program_id(0) - block * num_parts
        sizes, ends = group_rows(offsets_ptr, num_rows, num_groups, GROUPS)
        in_group = tl.arange(0, GROUPS) < num_groups
        last_block = tl.cumsum(tl.where(in_group, tl.cdiv(sizes, BLOCK), 0), 0)
        if block < tl.max(last_block, 0):
            before = last_block <= block
            start = tl.max(tl.where(before, ends, 0), 0)
            end = tl.min(tl.where(before, num_rows, ends), 0)
            index = tl.arange(0, BLOCK)
            in_order = block - tl.max(tl.where(before, last_block, 0), 0)
            rows = (start + in_order * BLOCK + index).to(tl.int64)
            cols = part * BLOCK + index
            inside = rows < end
            x = tl.load(
                x_ptr + rows[:, None] * size + cols[None, :], inside[:, None], other=0.0
            ).to(tl.float32)
            x *= tl.load(x_scales_ptr + rows * num_parts + part, inside, other=0.0)[:, None]
            scales, inverse = pow2_scales_of(largest_magnitude(x, 0, SMALLEST_AMAX))
            tl.store(scales_ptr + block.to(tl.int64) * size + cols, scales)
            values = (x * inverse[None, :]).to(values_ptr.dtype.element_ty)
            at = cols.to(tl.int64)[:, None] * out_stride + (block * BLOCK + index)[None, :]
            tl.store(values_ptr + at, values.T)


def _dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype) * scales.to(dtype).repeat_interleave(BLOCK, dim=1)


def _dequantize_columns(columns: QuantizedColumns, dtype: torch.dtype) -> Tensor:
    return _dequantize(columns.values, columns.scales.t(), dtype)


def _check_rows(x: Quantized, offsets: Tensor) -> None:
    values, scales = x
    if values.dim() != 2 or values.shape[1] % BLOCK or values.dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"expected values float8_e4m3fn [M, K] with K a multiple of {BLOCK}, "
            f"got {values.dtype} {list(values.shape)}"
        )
    expected = (values.shape[0], values.shape[1] // BLOCK)
    if scales.shape != expected or scales.dtype != torch.float32:
        raise ValueError(
            f"expected scales float32 {list(expected)}, got {scales.dtype} {list(scales.shape)}"
        )
    if not values.is_contiguous() or not scales.is_contiguous():
        raise ValueError(
            f"expected contiguous values and scales, got strides {values.stride()} and "
            f"{scales.stride()}"
        )
    check_offsets(offsets)
    if {scales.device, offsets.device} != {values.device}:
        raise ValueError(
            f"expected scales and offsets on {values.device}, "
            f"got them on {scales.device} and {offsets.device}"
        )


def _check_weights(w: QuantizedWeights, leading: tuple[int, int], device: torch.device) -> None:
    values, scales = w
    if values.dim() != 3 or values.shape[:2] != leading or values.dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"expected weights float8_e4m3fn [{leading[0]}, {leading[1]}, N], "
            f"got {values.dtype} {list(values.shape)}"
        )
    if values.shape[2] % BLOCK or not values.transpose(1, 2).is_contiguous():
        raise ValueError(
            f"expected weights with N a multiple of {BLOCK} and the transpose contiguous, "
            f"got {list(values.shape)} with strides {values.stride()}"
        )
    expected = (leading[0], leading[1] // BLOCK, values.shape[2] // BLOCK)
    if scales.shape != expected or scales.dtype != torch.float32:
        raise ValueError(
            f"expected the weights' scales float32 {list(expected)}, "
            f"got {scales.dtype} {list(scales.shape)}"
        )
    if {values.device, scales.device} != {device}:
        raise ValueError(
            f"expected weights and their scales on {device}, "
            f"got them on {values.device} and {scales.device}"
        )


def _check_out_dtype(out_dtype: torch.dtype) -> None:
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"expected out_dtype in {OUT_DTYPES}, got {out_dtype}")
