"""FP8 tokens: 1x128 block quantisation to E4M3, its inverse, and the gradient that passes it by.

Shapes: T rows of any kind, H hidden (a multiple of 128).

A row is cut into blocks of 128 values; a block stores ``round(x * 448 / amax)`` in float8_e4m3fn
and its scale ``amax / 448`` in float32, so ``x ~ values * scale`` (the tile-wise activation format
of the DeepSeek-V3 report, section 3.3.2). With power-of-two scales the scale is rounded up to the
next power of two, which makes the multiplication by it exact.

Torch operations define the results. For CUDA tensors Triton kernels with the same bits, in
``kernels/fp8_cast.py``, read and write once instead of once per operation.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dualpipe_ext.kernels.fp8_format import (
    BLOCK,
    E4M3_MAX,
    SMALLEST_AMAX,
    power_of_two_scales,
)


class Quantized(NamedTuple):
    """``values`` float8_e4m3fn [T, H] and ``scales`` float32 [T, H / 128]."""

    values: Tensor
    scales: Tensor


def quantize(x: Tensor, *, pow2_scales: bool = False) -> Quantized:
    """Quantise rows block by block; the definition that every fused kernel must equal bit for bit.

    Args:
        x: [T, H], any floating dtype; H a multiple of 128.
        pow2_scales: round each scale up to a power of two.

    >>> x = torch.zeros(1, 128)
    >>> x[0, :3] = torch.tensor([1.0, -0.5, 0.3])
    >>> values, scales = quantize(x)
    >>> values[0, :3].tolist(), round(scales.item() * 448, 6)
    ([448.0, -224.0, 128.0], 1.0)
    >>> values, scales = quantize(x, pow2_scales=True)
    >>> values[0, :3].tolist(), scales.item() == 2.0**-8
    ([256.0, -128.0, 80.0], True)
    """
    if (kernels := _kernels_for(x)) is not None:
        how = {"smallest_amax": SMALLEST_AMAX, "pow2_scales": pow2_scales}
        return Quantized(*kernels.quantize_blocks(x, **how))
    blocks = _blocks(x).float()
    amax = blocks.abs().amax(dim=-1).clamp_min(SMALLEST_AMAX)
    if pow2_scales:
        scales, inverse = power_of_two_scales(amax)
    else:
        # Times the reciprocal: by a number, torch divides on the CPU but multiplies by its
        # reciprocal on CUDA, and the results would differ in the last bit.
        scales = amax * (1.0 / E4M3_MAX)
        inverse = amax.reciprocal() * E4M3_MAX
    values = (blocks * inverse.unsqueeze(-1)).to(torch.float8_e4m3fn)
    return Quantized(values.view(x.shape), scales)


def dequantize(quantized: Quantized, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``values * scales`` in float32, rounded once to ``dtype``; [T, H]."""
    values, scales = quantized
    if (kernels := _kernels_for(values, scales)) is not None:
        return kernels.dequantize_blocks(values, scales, dtype)
    blocks = _blocks(values).float() * scales.unsqueeze(-1)
    return blocks.view(values.shape).to(dtype)


def _blocks(x: Tensor) -> Tensor:
    if x.shape[-1] % BLOCK:
        raise ValueError(
            f"expected a hidden size that is a multiple of {BLOCK} for FP8, got {x.shape[-1]}"
        )
    return x.contiguous().view(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)


def _kernels_for(*tensors: Tensor) -> ModuleType | None:
    """The Triton kernels, if they can do this: on CUDA, eagerly, and without autograd's records."""
    if not tensors[0].is_cuda or torch.compiler.is_compiling():
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    # Not at the top: it imports Triton, which takes longer than all of this package.
    from dualpipe_ext.kernels import fp8_cast

    return fp8_cast if fp8_cast.usable_on(tensors[0].device) else None


class StraightThroughDequantize(torch.autograd.Function):
    """Dequantise received rows; their gradient goes to ``carrier`` as it is.

    An FP8 tensor cannot carry a gradient (autograd would round it to FP8). The dispatch therefore
    also returns ``carrier``, a tensor of the rows' shape in the gradient's dtype without storage of
    its own, whose only purpose is to lead gradients back into the dispatch.
    """

    @staticmethod
    def forward(
        ctx: Any, carrier: Tensor, values: Tensor, scales: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.grad_dtype = carrier.dtype
        return dequantize(Quantized(values, scales), dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad.to(ctx.grad_dtype), None, None, None
