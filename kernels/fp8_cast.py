"""FP8 by blocks of 128 values: rows to float8_e4m3fn and float32 scales, and back.

What the kernels compute is defined by ``dualpipe_ext.ep.fp8``, which calls them for CUDA tensors;
their results have the same bits. Each reads its input once and writes its output once.

B blocks: a tensor [T, H] has T * H / 128 of them, one after the other in memory.
"""

from __future__ import annotations

import torch
from dualpipe_ext.kernels.fp8_format import BLOCK, E4M3_MAX
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform that torch runs on
    triton = None

# The first GPUs with instructions for FP8; Triton compiles float8_e4m3fn for no older ones.
MIN_CAPABILITY = (8, 9)
QUANTIZED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Blocks that one program handles: 2048 values, 16 for each of its 128 threads.
_BLOCKS = 16


def usable_on(device: torch.device) -> bool:
    """Whether the kernels run on this CUDA device."""
    return triton is not None and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def quantize_blocks(
    x: Tensor, *, smallest_amax: float, pow2_scales: bool = False
) -> tuple[Tensor, Tensor]:
    """Cast blocks to FP8, each with its own scale.

    Args:
        x: [..., H], float32, bfloat16, float16 or float64; H a multiple of 128.
        smallest_amax: a block whose largest magnitude is below counts as having this one; a normal
            float32.
        pow2_scales: round each scale up to a power of two.

    Returns:
        float8_e4m3fn [..., H] and the float32 scales [..., H / 128].

    Example: 128 values 1, -0.5, 0.3, 0, ... give 448, -224, 128, 0, ... and the scale 1 / 448, or
    with a power of two 256, -128, 80, 0, ... and the scale 1 / 256.
    """
    _check_hidden(x)
    if x.dtype not in QUANTIZED_DTYPES:
        raise ValueError(f"expected x in one of {QUANTIZED_DTYPES}, got {x.dtype}")
    x = x.contiguous()
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales_shape = (*x.shape[:-1], x.shape[-1] // BLOCK)
    scales = torch.empty(scales_shape, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return values, scales
    # Triton launches on the current device, whichever one the tensors are on.
    with torch.cuda.device_of(x):
        _quantize_kernel[(triton.cdiv(scales.numel(), _BLOCKS),)](
            x,
            values,
            scales,
            scales.numel(),
            POW2=pow2_scales,
            SMALLEST_AMAX=smallest_amax,
            E4M3_MAX=E4M3_MAX,
            BLOCK=BLOCK,
            BLOCKS=_BLOCKS,
            enable_fp_fusion=False,
        )
    return values, scales


def dequantize_blocks(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``values * scales`` in float32, rounded once to ``dtype``.

    Args:
        values: float8_e4m3fn [..., H], H a multiple of 128.
        scales: float32 [..., H / 128].
        dtype: one of ``QUANTIZED_DTYPES``.

    Returns:
        [..., H].

    Example: 448, -224, 128, 0, ... with the scale 1 / 256 are 1.75, -0.875, 0.5, 0, ...
    """
    _check_hidden(values)
    expected = (*values.shape[:-1], values.shape[-1] // BLOCK)
    if scales.shape != expected or scales.dtype != torch.float32 or scales.device != values.device:
        raise ValueError(
            f"expected scales float32 {list(expected)} on {values.device}, "
            f"got {scales.dtype} {list(scales.shape)} on {scales.device}"
        )
    if values.dtype != torch.float8_e4m3fn or dtype not in QUANTIZED_DTYPES:
        raise ValueError(
            f"expected values float8_e4m3fn and one of {QUANTIZED_DTYPES} to make of them, "
            f"got {values.dtype} and {dtype}"
        )
    values, scales = values.contiguous(), scales.contiguous()
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(values):
        _dequantize_kernel[(triton.cdiv(scales.numel(), _BLOCKS),)](
            values,
            scales,
            out,
            scales.numel(),
            BLOCK=BLOCK,
            BLOCKS=_BLOCKS,
            enable_fp_fusion=False,
        )
    return out


if triton is not None:

    @triton.jit
    def largest_magnitude(x, axis: tl.constexpr, SMALLEST_AMAX: tl.constexpr):  # noqa: N803
        """Bits of the largest magnitude of float32 ``x`` along ``axis``, or of SMALLEST_AMAX."""
        # Magnitudes are ordered like their bits, and NaN above them all: unlike a maximum of
        # floats, that of the bits does not lose it.
        magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.max(magnitude, axis=axis)
        smallest = tl.full(largest.shape, SMALLEST_AMAX, tl.float32).to(tl.int32, bitcast=True)
        return tl.maximum(largest, smallest)

    @triton.jit
    def pow2_scales_of(bits):
        """``fp8_format.power_of_two_scales`` of magnitudes that are given as their bits."""
        # The smallest 2^e with amax <= 448 * 2^e; 448 is 1.75 * 2^8. The fraction decides
        # whether to round up. No arithmetic, so nothing is rounded.
        exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
        # torch.frexp finds exponent 0 in infinity and NaN, and only infinity is above 0.875.
        exponent = tl.where(bits == 0x7F800000, 127 - 8, exponent)
        exponent = tl.where(bits > 0x7F800000, 127 - 9, exponent)
        scales = (exponent << 23).to(tl.float32, bitcast=True)
        return scales, ((254 - exponent) << 23).to(tl.float32, bitcast=True)

    @triton.jit
    def _quantize_kernel(
        x_ptr,
        values_ptr,
        scales_ptr,
        num_blocks,
        POW2: tl.constexpr,  # noqa: N803  Triton's convention for compile-time arguments
        SMALLEST_AMAX: tl.constexpr,  # noqa: N803
        E4M3_MAX: tl.constexpr,  # noqa: N803
        BLOCK: tl.constexpr,  # noqa: N803
        BLOCKS: tl.constexpr,  # noqa: N803
    ):
        # 64 bits: a tensor passes 2^31 values well within the memory of one GPU.
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        inside = block < num_blocks
        at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_ptr + at, inside[:, None], other=0.0).to(tl.float32)
        bits = largest_magnitude(x, 1, SMALLEST_AMAX)
        if POW2:
            scales, inverse = pow2_scales_of(bits)
        else:
            amax = bits.to(tl.float32, bitcast=True)
            scales = amax * (1.0 / E4M3_MAX)
            # div_rn: a plain division is an approximation on GPUs.
            inverse = tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), amax) * E4M3_MAX
        tl.store(scales_ptr + block, scales, inside)
        values = (x * inverse[:, None]).to(tl.float8e4nv)
        tl.store(values_ptr + at, values, inside[:, None])

    @triton.jit
    def _dequantize_kernel(
        values_ptr,
        scales_ptr,
        out_ptr,
        num_blocks,
        BLOCK: tl.constexpr,  # noqa: N803
        BLOCKS: tl.constexpr,  # noqa: N803
    ):
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        inside = block < num_blocks
        at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        values = tl.load(values_ptr + at, inside[:, None]).to(tl.float32)
        scales = tl.load(scales_ptr + block, inside, other=0.0)
        out = values * scales[:, None]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), inside[:, None])


def _check_hidden(x: Tensor) -> None:
    if x.shape[-1] % BLOCK:
        raise ValueError(
            f"expected a hidden size that is a multiple of {BLOCK} for FP8, got {x.shape[-1]}"
        )
