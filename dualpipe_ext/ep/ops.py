"""Dispatch and combine as torch.library ops: what ``torch.compile`` puts into a graph.

A graph holds tensors and numbers only: transports and handles are tickets in it (``tickets.py``).
There are two layers of ops, all called ``dualpipe_ext::...``:

- ``route``, ``dispatch_rows`` and ``combine_rows`` call the transport. They are registered as
  effects: a compiler neither drops nor repeats nor reorders them, since all ranks must make the
  same calls whatever each of them does with the results.
- ``dispatch``, ``combine`` and ``dequantize`` are differentiable: the functions of ``autograd.py``
  over these, and that of ``fp8.py``.

Eager calls go past all this, straight to the transport. A result that does not exist (the scales of
rows that are not FP8, say) is an empty tensor where an op returns it and None everywhere else.

Shapes: T tokens of this rank, H hidden, G local experts, K top-k, N received token rows, M expert
rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.library import EffectType, Library
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from dualpipe_ext.ep import autograd, validate
from dualpipe_ext.ep.fp8 import BLOCK, Quantized, StraightThroughDequantize
from dualpipe_ext.ep.handle import Handle, Layout, handle_with_key
from dualpipe_ext.ep.tickets import make_ticket, redeem
from dualpipe_ext.ep.transport import RouteOptions, Rows, Transport

# --- what Buffer calls ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TracedHandle(Handle):
    """The handle of a compiled dispatch; outside of compiled code it works like any other."""

    ticket: Tensor = field(repr=False)
    """Stands for the transport's handle."""

    def __post_init__(self) -> None:
        """It has its ticket and needs no key."""


def resolved(handle: Handle) -> Handle:
    """The transport's own handle."""
    if not isinstance(handle, TracedHandle):
        return handle
    return _redeem_handle(handle.ticket)


def route(
    transport: Transport, transport_ticket: Tensor, topk_idx: Tensor, options: RouteOptions
) -> TracedHandle:
    """:meth:`Transport.route`."""
    ticket = torch.ops.dualpipe_ext.route(
        topk_idx,
        transport_ticket,
        options.layout,
        options.alignment,
        options.max_recv_tokens,
        options.zero_copy,
        options.rows_per_expert,
    )
    counts, row_idx, offsets = torch.ops.dualpipe_ext.describe(
        topk_idx,
        ticket,
        transport.config.num_local_experts,
        options.layout,
        options.max_recv_tokens,
    )
    is_expert = options.layout == "expert"
    return TracedHandle(
        owner=transport,
        layout=options.layout,
        alignment=options.alignment,
        rows_per_expert=options.rows_per_expert,
        num_tokens=topk_idx.shape[0],
        num_rows=row_idx.shape[0],
        topk_idx=None if is_expert else row_idx,
        offsets=offsets if is_expert else None,
        counts=counts,
        zero_copy=options.zero_copy and transport.capabilities.zero_copy,
        ticket=ticket,
    )


def dispatch(
    x: Tensor,
    topk_weights: Tensor | None,
    handle: Handle,
    *,
    scales: Tensor | None,
    fp8: bool,
    pow2_scales: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What :func:`autograd.dispatch` does."""
    tokens, out_scales, weights, carrier = torch.ops.dualpipe_ext.dispatch(
        x,
        scales,
        topk_weights,
        autograd.ANCHOR,
        _ticket_of(handle),
        handle.num_rows,
        handle.layout,
        fp8,
        pow2_scales,
    )
    return (
        tokens,
        out_scales if fp8 else None,
        None if topk_weights is None else weights,
        carrier if fp8 else None,
    )


def combine(rows: Tensor, weights: Tensor | None, bias: Tensor | None, handle: Handle) -> Tensor:
    """What :func:`autograd.combine` does."""
    return torch.ops.dualpipe_ext.combine(
        rows,
        weights,
        bias,
        autograd.ANCHOR,
        _ticket_of(handle),
        handle.num_tokens,
        handle.counts,
        handle.offsets,
    )


def combine_with_weights(
    rows: Tensor, row_weights: Tensor, handle: Handle, top_k: int
) -> tuple[Tensor, Tensor]:
    """What :meth:`Transport.combine` does with numbers of choices; not differentiable."""
    return torch.ops.dualpipe_ext.combine_rows(
        rows, None, None, row_weights, _ticket_of(handle), handle.num_tokens, top_k
    )


def dispatch_weights(topk_weights: Tensor, handle: Handle, transport: Transport) -> Tensor:
    """What :meth:`Transport.dispatch` does with weights alone; not differentiable."""
    _, _, weights = torch.ops.dualpipe_ext.dispatch_rows(
        transport.narrowest_rows(handle.num_tokens, topk_weights.device),
        None,
        topk_weights,
        _ticket_of(handle),
        handle.num_rows,
        handle.layout,
        False,
        False,
    )
    return weights


def _ticket_of(handle: Handle) -> Tensor:
    if isinstance(handle, TracedHandle):
        return handle.ticket
    # Made by an eager call. A graph takes numbers as inputs, so it asks for a ticket by number.
    return torch.ops.dualpipe_ext.lease(handle.key)


def save_communication() -> tuple[Any, Any]:
    """``context_fn`` for a :func:`torch.utils.checkpoint.checkpoint` inside compiled code.

    What communicated once is saved, everything else is recomputed: a compiler cannot recompute
    effects. Checkpoints of eager code, also those around compiled functions, do not need it.
    """
    return create_selective_checkpoint_contexts(_save_communication)


def _save_communication(_ctx: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    saved = getattr(op, "namespace", None) == "dualpipe_ext"
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


# --- ops that call the transport -----------------------------------------------------------------

_library = Library("dualpipe_ext", "FRAGMENT")


def _define(schema: str, kernel: Callable[..., object], fake: Callable[..., object]) -> None:
    """Register an op for every device, and what a compiler, which has no data, runs for it.

    Its first tensor is one of the device that it works on: inductor takes that for the op's. After
    a graph break Dynamo follows calls into Python kernels, too; there it has no business.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, torch._disable_dynamo(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"dualpipe_ext::{name}", fake, lib=_library)


def _define_effect(schema: str, kernel: Callable[..., object], fake: Callable[..., object]) -> None:
    """Register an op that communicates."""
    _define(schema, kernel, fake)
    name = schema.partition("(")[0]
    _library._register_effectful_op(f"dualpipe_ext::{name}", EffectType.ORDERED)


def _lease(key: int) -> Tensor:
    """A ticket for the eager handle of that key, which the caller holds."""
    return make_ticket(handle_with_key(key))


def _fake_lease(key: int) -> Tensor:
    return torch.empty(1, dtype=torch.int64, device="cpu")


def _route(topk_idx: Tensor, transport_ticket: Tensor, *values: Any) -> Tensor:
    transport = redeem(transport_ticket)
    assert isinstance(transport, Transport)
    names = (option.name for option in fields(RouteOptions))
    options = RouteOptions(**dict(zip(names, values, strict=True)))
    validate.check_capture(topk_idx, options.max_recv_tokens, transport)
    return make_ticket(transport.route(topk_idx, options))


def _fake_route(topk_idx: Tensor, transport_ticket: Tensor, *options: object) -> Tensor:
    return torch.empty_like(transport_ticket)


def _describe(
    topk_idx: Tensor, ticket: Tensor, num_local_experts: int, layout: Layout, num_rows: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a handle tells its user: counts, offsets, and [rows, K or 0] in the shape of the rows.

    Not part of ``route``, because of an effect's results inductor takes only the first to have
    sizes that depend on data.
    """
    handle = _redeem_handle(ticket)
    if handle.layout == "token":
        row_idx, offsets = handle.topk_idx, handle.counts.new_empty(0, dtype=torch.int32)
    else:
        row_idx, offsets = handle.counts.new_empty((handle.num_rows, 0)), handle.offsets
    # Copies: a compiled graph may use the memory of an op's result again once it is done with it.
    return handle.counts.clone(), row_idx.clone(), offsets.clone()


def _fake_describe(
    topk_idx: Tensor, ticket: Tensor, num_local_experts: int, layout: Layout, num_rows: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    if num_rows is None:
        num_rows = torch.library.get_ctx().new_dynamic_size()
    is_expert = layout == "expert"
    return (
        topk_idx.new_empty(num_local_experts),
        topk_idx.new_empty((num_rows, 0 if is_expert else topk_idx.shape[1])),
        topk_idx.new_empty(num_local_experts if is_expert else 0, dtype=torch.int32),
    )


def _dispatch_rows(
    x: Tensor,
    scales: Tensor | None,
    topk_weights: Tensor | None,
    ticket: Tensor,
    num_rows: int,
    layout: Layout,
    fp8: bool,
    pow2_scales: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    handle = _redeem_handle(ticket)
    source = x if scales is None else Quantized(x, scales)
    rows = handle.owner.dispatch(source, topk_weights, handle, fp8=fp8, pow2_scales=pow2_scales)
    return rows.tokens, _or_empty(rows.scales, x), _or_empty(rows.weights, x)


def _fake_dispatch_rows(
    x: Tensor,
    scales: Tensor | None,
    topk_weights: Tensor | None,
    ticket: Tensor,
    num_rows: int,
    layout: Layout,
    fp8: bool,
    pow2_scales: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = x.shape[1]
    tokens = x.new_empty((num_rows, hidden), dtype=torch.float8_e4m3fn if fp8 else x.dtype)
    out_scales = weights = None
    if fp8:
        out_scales = x.new_empty((num_rows, hidden // BLOCK), dtype=torch.float32)
    if topk_weights is not None:
        per_row = () if layout == "expert" else (topk_weights.shape[1],)
        weights = topk_weights.new_empty((num_rows, *per_row))
    return tokens, _or_empty(out_scales, x), _or_empty(weights, x)


def _combine_rows(
    rows: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    row_weights: Tensor | None,
    ticket: Tensor,
    num_tokens: int,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    handle = _redeem_handle(ticket)
    y, returned = handle.owner.combine(
        rows, handle, weights=weights, bias=bias, row_weights=row_weights
    )
    return y, _or_empty(returned, rows)


def _fake_combine_rows(
    rows: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    row_weights: Tensor | None,
    ticket: Tensor,
    num_tokens: int,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    returned = None if row_weights is None else row_weights.new_empty((num_tokens, top_k))
    return rows.new_empty((num_tokens, rows.shape[1])), _or_empty(returned, rows)


def _redeem_handle(ticket: Tensor) -> Handle:
    handle = redeem(ticket)
    assert isinstance(handle, Handle)
    return handle


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if tensor is None else tensor


_define("lease(SymInt key) -> Tensor", _lease, _fake_lease)
_define_effect(
    "route(Tensor topk_idx, Tensor transport_ticket, str layout, SymInt alignment, "
    "SymInt? max_recv_tokens, bool zero_copy, SymInt? rows_per_expert) -> Tensor",
    _route,
    _fake_route,
)
_define(
    "describe(Tensor topk_idx, Tensor ticket, int num_local_experts, str layout, SymInt? num_rows) "
    "-> (Tensor counts, Tensor row_idx, Tensor offsets)",
    _describe,
    _fake_describe,
)
_define_effect(
    "dispatch_rows(Tensor x, Tensor? scales, Tensor? topk_weights, Tensor ticket, "
    "SymInt num_rows, str layout, bool fp8, bool pow2_scales) "
    "-> (Tensor tokens, Tensor scales, Tensor weights)",
    _dispatch_rows,
    _fake_dispatch_rows,
)
_define_effect(
    "combine_rows(Tensor rows, Tensor? weights, Tensor? bias, Tensor? row_weights, Tensor ticket, "
    "SymInt num_tokens, int top_k) -> (Tensor y, Tensor row_weights)",
    _combine_rows,
    _fake_combine_rows,
)

# --- differentiable ops --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _TracedRoute:
    """What a graph knows of a handle: enough for autograd and for the ops above."""

    ticket: Tensor
    layout: Layout
    num_tokens: int
    num_rows: int
    top_k: int = 0
    """Only needed to return the gradients of weights."""
    counts: Tensor | None = None
    offsets: Tensor | None = None


class _Ops:
    """The part of a transport that autograd uses, as ops."""

    @staticmethod
    def dispatch(
        x: Tensor | Quantized,
        topk_weights: Tensor | None,
        route: _TracedRoute,
        *,
        fp8: bool = False,
        pow2_scales: bool = False,
    ) -> Rows:
        values, scales = x if isinstance(x, Quantized) else (x, None)
        tokens, out_scales, weights = torch.ops.dualpipe_ext.dispatch_rows(
            values,
            scales,
            topk_weights,
            route.ticket,
            route.num_rows,
            route.layout,
            fp8,
            pow2_scales,
        )
        return Rows(
            tokens, out_scales if fp8 else None, weights if topk_weights is not None else None
        )

    @staticmethod
    def combine(
        rows: Tensor,
        route: _TracedRoute,
        *,
        weights: Tensor | None = None,
        bias: Tensor | None = None,
        row_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        y, returned = torch.ops.dualpipe_ext.combine_rows(
            rows, weights, bias, row_weights, route.ticket, route.num_tokens, route.top_k
        )
        return y, returned if row_weights is not None else None


def _dispatch(
    x: Tensor,
    scales: Tensor | None,
    topk_weights: Tensor | None,
    anchor: Tensor,
    ticket: Tensor,
    num_rows: int,
    layout: Layout,
    fp8: bool,
    pow2_scales: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    route = _TracedRoute(
        ticket=ticket,
        layout=layout,
        num_tokens=x.shape[0],
        num_rows=num_rows,
        top_k=0 if topk_weights is None else topk_weights.shape[1],
    )
    call = autograd.DispatchCall(
        transport=_Ops, handle=route, fp8=fp8, pow2_scales=pow2_scales, scales=scales
    )
    tokens, *others = autograd.dispatch(x, topk_weights, call, anchor)
    return tokens, *(_or_empty(other, x) for other in others)


def _combine(
    rows: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    anchor: Tensor,
    ticket: Tensor,
    num_tokens: int,
    counts: Tensor,
    offsets: Tensor | None,
) -> Tensor:
    route = _TracedRoute(
        ticket=ticket,
        layout="token" if offsets is None else "expert",
        num_tokens=num_tokens,
        num_rows=rows.shape[0],
        counts=counts,
        offsets=offsets,
    )
    return autograd.combine(rows, weights, bias, _Ops, route, anchor)


def _dequantize(grad_carrier: Tensor, values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return StraightThroughDequantize.apply(grad_carrier, values, scales, dtype)


def _define_differentiable(schema: str, function: Callable[..., object]) -> None:
    """Register an op that is a composition of others, its gradient included."""
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    kernel = torch._disable_dynamo(function)
    _library.impl(schema.partition("(")[0], kernel, "CompositeImplicitAutograd")


_define_differentiable(
    "dispatch(Tensor x, Tensor? scales, Tensor? topk_weights, Tensor anchor, Tensor ticket, "
    "SymInt num_rows, str layout, bool fp8, bool pow2_scales) "
    "-> (Tensor tokens, Tensor scales, Tensor weights, Tensor grad_carrier)",
    _dispatch,
)
_define_differentiable(
    "combine(Tensor rows, Tensor? weights, Tensor? bias, Tensor anchor, Tensor ticket, "
    "SymInt num_tokens, Tensor counts, Tensor? offsets) -> Tensor",
    _combine,
)
_define_differentiable(
    "dequantize(Tensor grad_carrier, Tensor values, Tensor scales, ScalarType dtype) -> Tensor",
    _dequantize,
)
