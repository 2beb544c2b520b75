"""What every rank checks of compiled calls: the same bits as eager ones, and the same calls.

Shapes: R ranks, T tokens of a rank, H hidden, K top-k, N token rows, M expert rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dualpipe_ext.ep import Buffer, quantize
from tests.ep.cases import make_case
from tests.ep.ranks import Ranks

HIDDEN = 128
ROWS = 96  # more than any rank gets in these checks

Layer = Callable[..., Tensor]


def token_layer(buffer: Buffer, x: Tensor, idx: Tensor, w: Tensor, **how: Any) -> Tensor:
    recv, handle = buffer.dispatch(x, idx, w, layout="token", **how)
    rows = expert(recv.tokens) * recv.topk_weights.sum(1, keepdim=True)
    return buffer.combine(rows, handle, bias=x)[0]


def expert_layer(buffer: Buffer, x: Tensor, idx: Tensor, w: Tensor, **how: Any) -> Tensor:
    recv, handle = buffer.dispatch(x, idx, w, layout="expert", alignment=4, **how)
    return buffer.combine(expert(recv.tokens), handle, weights=recv.weights)[0]


def fp8_layer(buffer: Buffer, x: Tensor, idx: Tensor, w: Tensor, **how: Any) -> Tensor:
    recv, handle = buffer.dispatch(x, idx, w, layout="expert", fp8=True, **how)
    return buffer.combine(expert(recv.dequantize(x.dtype)), handle, weights=recv.weights)[0]


def quantized_layer(buffer: Buffer, x: Tensor, idx: Tensor, w: Tensor, **how: Any) -> Tensor:
    quantized = tuple(quantize(x, pow2_scales=True))
    recv, handle = buffer.dispatch(quantized, idx, w, layout="token", fp8=True, **how)
    rows = expert(recv.dequantize(x.dtype)) * recv.topk_weights.sum(1, keepdim=True)
    return buffer.combine(rows, handle, bias=x)[0]


def cached_layer(buffer: Buffer, x: Tensor, idx: Tensor, w: Tensor, **how: Any) -> Tensor:
    _, handle = buffer.dispatch(x, idx, layout="expert", **how)
    recv, _ = buffer.dispatch(2 * x, None, w, handle=handle)
    return buffer.combine(expert(recv.tokens), handle, weights=recv.weights, bias=x)[0]


LAYERS = (token_layer, expert_layer, fp8_layer, quantized_layer, cached_layer)


def expert(rows: Tensor) -> Tensor:
    """Exact for small integers, so that a compiler may fuse and reorder it without other bits."""
    return 3 * rows * rows.abs() - rows


def integers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=gen).to(dtype)


def run_layer(layer: Layer, x: Tensor, idx: Tensor, w: Tensor) -> list[Tensor]:
    """The output and the gradients of x and w, for a loss that weights all outputs differently."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = layer(x, idx, w)
    (y * integers(*y.shape, seed=9, dtype=y.dtype).to(y.device)).sum().backward()
    return [y.detach(), x.grad, w.grad]


def expect_same(got: list[Tensor], want: list[Tensor], what: str) -> None:
    for name, a, b in zip(("y", "x.grad", "w.grad"), got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{what}: {name}"
        assert torch.equal(a, b), f"{what}: {name} differs by {(a - b).abs().max()}"


@contextmanager
def counted_calls(buffer: Buffer) -> Any:
    """The names of the calls of a buffer's transport, in order."""
    transport, names = buffer._transport, []

    def recorded(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            return method(*args, **kwargs)

        return call

    methods = {name: getattr(transport, name) for name in ("route", "dispatch", "combine")}
    for name, method in methods.items():
        setattr(transport, name, recorded(name, method))
    try:
        yield names
    finally:
        for name in methods:
            delattr(transport, name)


def compiled_equals_eager(ranks: Ranks) -> None:
    """Layers with fixed and with exact numbers of rows; random data, nothing fused."""
    for kind in ("uneven", "some_ranks_empty", "repeated"):
        case = make_case(kind, ranks.num_ranks, hidden=HIDDEN)
        buffer = ranks.make_buffer(case)
        inputs = ranks.inputs(case)
        for layer in (token_layer, expert_layer):
            for rows in (ROWS, None):
                eager = functools.partial(layer, buffer, max_recv_tokens=rows)
                torch._dynamo.reset()
                compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
                want, got = (run_layer(fn, *inputs) for fn in (eager, compiled))
                expect_same(got, want, f"{kind} {layer.__name__} {rows}")


def compiled_ranks_join_everywhere(ranks: Ranks) -> None:
    """Ranks make the same calls whatever each needs of their results, in forward and backward."""
    case = make_case("uneven", ranks.num_ranks, hidden=HIDDEN)
    buffer = ranks.make_buffer(case)
    x, idx, w = ranks.inputs(case)
    gain = torch.ones(HIDDEN, device=ranks.device, requires_grad=True)

    def layer(x: Tensor, w: Tensor) -> Tensor:
        buffer.dispatch(2 * x, idx, max_recv_tokens=ROWS)  # nobody uses this one
        recv, handle = buffer.dispatch(x, idx, w, max_recv_tokens=ROWS)
        rows = recv.tokens
        if ranks.rank % 2:
            rows = torch.zeros_like(rows) + recv.topk_weights.sum(1, keepdim=True)
        return buffer.combine(rows * gain, handle)[0]

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="inductor", fullgraph=True)
    grads = []
    for fn in (layer, compiled):
        x, w = (t.detach().clone().requires_grad_(ranks.rank == 0) for t in (x, w))
        with counted_calls(buffer) as calls:
            y = fn(x, w)
            assert calls == ["route", "dispatch"] * 2 + ["combine"]
            y.sum().backward()
            assert calls[5:] == ["dispatch", "combine"]
        assert (x.grad is None) == (ranks.rank != 0)
        grads.append((x.grad, w.grad))
    if ranks.rank == 0:
        for got, want in zip(*grads, strict=True):
            assert torch.allclose(got, want, rtol=1e-6)
