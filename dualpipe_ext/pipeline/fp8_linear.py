"""Grouped linear layers that multiply in FP8, forward and backward.

What belongs here: autograd over ``dualpipe_ext.kernels.fp8_gemm``, with a weight gradient that can
wait as those in ``weight_grad.py`` do, and the quantised weights that the micro-batches of a step
share.

For the backward, rows are kept in FP8: half of their bfloat16; or as the caller says, and quantised
again when the weight gradient is computed. The gradient of the output is
quantised once and serves both gradients. Weights are kept by their owner; their quantised copies,
one for each direction, are as large as the bfloat16 weights and live until the weights change.

Shapes: x [M, K], weight [G, K, N], K and N multiples of 128; see ``kernels/fp8_gemm.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from dualpipe_ext.ep.fp8 import Quantized, quantize
from dualpipe_ext.kernels.fp8_gemm import (
    QuantizedWeights,
    grouped_mm_fp8,
    grouped_mm_fp8_weight_grad,
    quantize_weights,
)
from dualpipe_ext.pipeline.weight_grad import (
    KeptInput,
    MaxSms,
    compute_dtype,
    limit_now,
    take_or_defer,
)

if TYPE_CHECKING:
    from dualpipe_ext.memory import Kept


class _Kept(NamedTuple):
    """Quantised weights and what they were made from: version, address and stream."""

    source: tuple[int, int, int]
    weights: tuple[QuantizedWeights, QuantizedWeights]


_kept = WeakTensorKeyDictionary()


def quantized_weights(weight: Tensor) -> tuple[QuantizedWeights, QuantizedWeights]:
    """``quantize_weights(weight)``, made once until ``weight`` changes.

    Changes are seen by the tensor's version, which every operation in place raises, under
    ``torch.no_grad()`` and on ``weight.detach()`` too; but not those on ``weight.data`` or by
    replaying a CUDA graph: call :func:`forget_quantized` after such. What a CUDA graph records
    quantises anew, so that its replays see the weights of their time.
    """
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return quantize_weights(weight.detach())
    # Made on one stream, it is not ready on another, nor kept from reuse there.
    stream = torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else 0
    source = (weight._version, weight.data_ptr(), stream)
    kept: _Kept | None = _kept.get(weight)
    if kept is None or kept.source != source:
        _kept.pop(weight, None)  # before the new one, which takes as much memory
        _kept[weight] = kept = _Kept(source, quantize_weights(weight.detach()))
    return kept.weights


def forget_quantized(weight: Tensor) -> None:
    """Drop the quantised copies of ``weight``; the next call makes them anew."""
    _kept.pop(weight, None)


def _kept_rows(x: Tensor, rows: Quantized, kept: Kept | None) -> KeptInput:
    """``rows`` is ``x`` quantised, which is what the weight gradient multiplies."""
    nbytes = sum(t.nbytes for t in rows)
    if kept is None:
        return KeptInput(rows, Quantized, nbytes=nbytes)
    restore, dtype = kept.restore, x.dtype  # not kept or x, which would live on in the node

    def requantise(*saved: Tensor) -> Quantized:
        return quantize(restore(*saved).to(dtype), pow2_scales=True)

    return KeptInput(kept.tensors, requantise, nbytes=nbytes)


class _GroupedLinearFp8(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor,
        dtype: torch.dtype,
        kept: Kept | None,
        max_sms: MaxSms,
    ) -> Tensor:
        ctx.input_dtype, ctx.weight, ctx.max_sms = x.dtype, weight, max_sms
        rows = quantize(x, pow2_scales=True)
        forward_weights, _ = quantized_weights(weight)
        # The weight for its version: changed before the backward, autograd refuses to go on.
        ctx.kept = _kept_rows(x, rows, kept)
        ctx.save_for_backward(weight, offsets, *ctx.kept.take())
        how = {"out_dtype": dtype, "max_sms": limit_now(max_sms)}
        return grouped_mm_fp8(rows, forward_weights, offsets, **how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, offsets, *saved = ctx.saved_tensors
        owner, max_sms = ctx.weight, ctx.max_sms
        grads = quantize(grad, pow2_scales=True)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            _, backward_weights = quantized_weights(owner)
            how = {"out_dtype": ctx.input_dtype, "max_sms": limit_now(max_sms)}
            grad_x = grouped_mm_fp8(grads, backward_weights, offsets, **how)
        if ctx.needs_input_grad[1]:

            def compute(rows: Quantized, total: Tensor | None) -> Tensor:
                how = {"out_dtype": owner.dtype, "total": total, "max_sms": limit_now(max_sms)}
                return grouped_mm_fp8_weight_grad(rows, grads, offsets, **how)

            grad_weight = take_or_defer(owner, compute, ctx.kept, saved)
        return grad_x, grad_weight, None, None, None, None


def grouped_linear_fp8(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    kept: Kept | None = None,
    max_sms: MaxSms = None,
) -> Tensor:
    """``grouped_linear`` with FP8 products, whose weight gradient can be deferred.

    Rows and output gradients are quantised by 1 x 128, weights by 128 x 128, and for the weight
    gradient both operands by 128 rows, all to E4M3 with scales that are powers of two; sums are
    float32.

    Args:
        x: [M, K], rows sorted by group; K a multiple of 128.
        weight: [G, K, N], any floating dtype; N a multiple of 128. Change it by operations on
            itself or on ``weight.detach()``, see :func:`quantized_weights`.
        offsets: int32 [G], the END row of each group; rows past the last one give zeros and get no
            gradient.
        kept: keep ``x`` like this for the weight gradient, which quantises what it restores; by
            default as it was quantised for the product.
        max_sms: SMs for the products, to leave the others to communication; None for all, and a
            function is asked at every product.

    Returns:
        [M, N] in the dtype of ``x`` (that of autocast, under autocast).

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    return _GroupedLinearFp8.apply(x, weight, offsets, compute_dtype(x), kept, max_sms)
