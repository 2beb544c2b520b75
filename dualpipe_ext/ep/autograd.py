"""Gradients of dispatch and combine: the backward of one is the other, with the same handle.

A backward communicates, so all ranks must run it or none. Both functions are given ``ANCHOR``, an
empty tensor that requires grad: with it a rank whose inputs need no gradient (a frozen embedding, a
first stage) still has the node in its graph and joins the others. What stays the caller's duty: on
every rank the loss must depend on the outputs, also where no row arrived (run the experts on the
empty tensor; do not skip them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dualpipe_ext.ep.fp8 import Quantized
from dualpipe_ext.ep.transport import Rows
from dualpipe_ext.kernels.weighted_rows import weighted_rows_grad

with torch.inference_mode(False):  # whoever imports this first
    ANCHOR = torch.empty(0, device="cpu", requires_grad=True)


class Moves(Protocol):
    """The part of a transport that gradients need; compiled code has ops for it (``ops.py``)."""

    dispatch: Callable[..., Rows]
    combine: Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(slots=True, eq=False)
class DispatchCall:
    """The arguments of a dispatch that are not differentiated."""

    transport: Moves
    handle: Any
    """What ``transport`` takes for a handle."""
    fp8: bool
    pow2_scales: bool
    scales: Tensor | None
    """Given with ``x`` already quantised."""


def dispatch(
    x: Tensor, topk_weights: Tensor | None, call: DispatchCall, anchor: Tensor = ANCHOR
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Differentiable :meth:`Transport.dispatch`; returns tokens, scales, weights, grad_carrier."""
    if not torch.is_grad_enabled():
        rows = call.transport.dispatch(
            x if call.scales is None else Quantized(x, call.scales),
            topk_weights,
            call.handle,
            fp8=call.fp8,
            pow2_scales=call.pow2_scales,
        )
        return *rows, None
    return _Dispatch.apply(x, topk_weights, anchor, call)


def combine(
    rows: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    transport: Moves,
    handle: Any,
    anchor: Tensor = ANCHOR,
) -> Tensor:
    """Differentiable :meth:`Transport.combine`."""
    if not torch.is_grad_enabled():
        return transport.combine(rows, handle, weights=weights, bias=bias)[0]
    return _Combine.apply(rows, weights, bias, anchor, transport, handle)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, topk_weights: Tensor | None, anchor: Tensor, call: DispatchCall
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        source = x if call.scales is None else Quantized(x, call.scales)
        tokens, scales, weights = call.transport.dispatch(
            source, topk_weights, call.handle, fp8=call.fp8, pow2_scales=call.pow2_scales
        )
        # Row gradients travel in the dtype of x, or in bfloat16 for quantised input.
        grad_dtype = x.dtype if call.scales is None else torch.bfloat16
        ctx.call = call
        ctx.rows_like = (tokens.shape, grad_dtype, tokens.device)
        ctx.weights_like = None
        if weights is not None:
            ctx.weights_like = (weights.shape, weights.dtype, weights.device)
        ctx.set_materialize_grads(False)
        carrier = None
        if scales is not None:
            ctx.mark_non_differentiable(tokens, scales)
            # Nobody reads its values: filling it would be a kernel for nothing.
            carrier = tokens.new_empty((), dtype=grad_dtype).expand(tokens.shape)
        return tokens, scales, weights, carrier

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_tokens: Tensor | None,
        _grad_scales: None,
        grad_weights: Tensor | None,
        grad_carrier: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        call: DispatchCall = ctx.call
        rows = grad_tokens if grad_carrier is None else grad_carrier
        # Which outputs a rank used is its own affair: what goes over the wire must not depend on
        # it, so a missing gradient is sent as zeros.
        if rows is None:
            rows = _zeros(*ctx.rows_like)
        if grad_weights is None and ctx.weights_like is not None:
            grad_weights = _zeros(*ctx.weights_like)
        grad_x, grad_topk_weights = call.transport.combine(
            rows, call.handle, row_weights=grad_weights
        )
        needs_x, needs_weights, *_ = ctx.needs_input_grad
        return grad_x if needs_x else None, grad_topk_weights if needs_weights else None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Tensor | None,
        bias: Tensor | None,
        anchor: Tensor,
        transport: Moves,
        handle: Any,
    ) -> Tensor:
        ctx.transport = transport
        ctx.handle = handle
        # The rows are only needed for the gradient of their weights.
        needs_weights = ctx.needs_input_grad[1]
        ctx.save_for_backward(rows if needs_weights else None, weights)
        y, _ = transport.combine(rows, handle, weights=weights, bias=bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights = ctx.saved_tensors
        needs_rows, needs_weights, needs_bias, *_ = ctx.needs_input_grad
        arrived = ctx.transport.dispatch(grad_y, None, ctx.handle).tokens
        grad_rows, grad_weights = arrived, None
        if weights is not None:
            # A GEMM may leave anything in padding rows, NaN times zero included.
            padded = (ctx.handle.offsets, ctx.handle.counts) if needs_weights else None
            grad_rows, products = weighted_rows_grad(
                arrived,
                rows if needs_weights else None,
                weights if needs_rows else None,
                groups=padded,
            )
            if needs_weights:
                grad_weights = products.to(weights.dtype)
        return (
            grad_rows if needs_rows else None,
            grad_weights,
            grad_y if needs_bias else None,
            None,
            None,
            None,
        )


def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)
