"""Gradients of dispatch and combine: the backward of one is the other, with the same handle.

A backward communicates, so all ranks must run it or none. Both functions take an ``anchor``, an
empty tensor that requires grad: with it a rank whose inputs need no gradient (a frozen embedding, a
first stage) still has the node in its graph and joins the others. What stays the caller's duty: on
every rank the loss must depend on the outputs, also where no row arrived (run the experts on the
empty tensor; do not skip them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dualpipe_ext.ep.expand import accumulator_dtype, filled_rows
from dualpipe_ext.ep.fp8 import Quantized
from dualpipe_ext.ep.handle import Handle
from dualpipe_ext.ep.transport import Transport


@dataclass(frozen=True, slots=True)
class DispatchCall:
    """The arguments of a dispatch that are not differentiated."""

    transport: Transport
    handle: Handle
    fp8: bool
    pow2_scales: bool
    scales: Tensor | None
    """Given with ``x`` already quantised."""
    grad_dtype: torch.dtype
    """Dtype of row gradients on the wire: that of ``x``, or bfloat16 for quantised input."""


def dispatch(
    x: Tensor, topk_weights: Tensor | None, call: DispatchCall
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Differentiable :meth:`Transport.dispatch`; returns tokens, scales, weights, grad_carrier."""
    return _Dispatch.apply(x, topk_weights, _anchor(x), call)


def combine(
    rows: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    transport: Transport,
    handle: Handle,
) -> Tensor:
    """Differentiable :meth:`Transport.combine`."""
    return _Combine.apply(rows, weights, bias, _anchor(rows), transport, handle)


def _filled(handle: Handle) -> Tensor:
    assert handle.offsets is not None
    return filled_rows(handle.offsets, handle.counts, handle.num_rows)


def _anchor(like: Tensor) -> Tensor:
    return torch.empty(0, device=like.device, requires_grad=True)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, topk_weights: Tensor | None, anchor: Tensor, call: DispatchCall
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        source = x if call.scales is None else Quantized(x, call.scales)
        tokens, scales, weights = call.transport.dispatch(
            source, topk_weights, call.handle, fp8=call.fp8, pow2_scales=call.pow2_scales
        )
        ctx.call = call
        ctx.has_weights = weights is not None
        if weights is not None:
            ctx.weights_like = (weights.shape, weights.dtype)
        ctx.set_materialize_grads(False)
        carrier = None
        if scales is not None:
            ctx.mark_non_differentiable(tokens, scales)
            carrier = tokens.new_zeros((), dtype=call.grad_dtype).expand(tokens.shape)
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
        handle = call.handle
        rows = grad_tokens if grad_carrier is None else grad_carrier
        # Which outputs a rank used is its own affair: what goes over the wire must not depend on
        # it, so a missing gradient is sent as zeros.
        if rows is None:
            shape = (handle.num_rows, call.transport.config.hidden)
            rows = torch.zeros(shape, dtype=call.grad_dtype, device=handle.counts.device)
        if grad_weights is None and ctx.has_weights:
            shape, dtype = ctx.weights_like
            grad_weights = torch.zeros(shape, dtype=dtype, device=rows.device)
        grad_x, grad_topk_weights = call.transport.combine(rows, handle, row_weights=grad_weights)
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
        transport: Transport,
        handle: Handle,
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
            exact = arrived.to(accumulator_dtype(arrived.dtype))
            if needs_weights:
                products = (exact * rows).sum(dim=1).to(weights.dtype)
                # A GEMM may leave anything in padding rows, NaN times zero included.
                grad_weights = torch.where(_filled(ctx.handle), products, 0)
            if needs_rows:
                grad_rows = (exact * weights.to(exact.dtype).unsqueeze(1)).to(arrived.dtype)
        return (
            grad_rows if needs_rows else None,
            grad_weights,
            grad_y if needs_bias else None,
            None,
            None,
            None,
        )
