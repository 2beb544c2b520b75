"""Compiled dispatch and combine: the same bits as eager, no graph break, no leak, no lost call."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dualpipe_ext.ep import Buffer, ExpertMajor
from dualpipe_ext.ep.autograd import ANCHOR
from dualpipe_ext.ep.ops import save_communication
from dualpipe_ext.ep.tickets import num_tickets
from tests.ep import compile_checks
from tests.ep.compile_checks import (
    HIDDEN,
    LAYERS,
    ROWS,
    Layer,
    counted_calls,
    expect_same,
    expert,
    expert_layer,
    integers,
    run_layer,
    token_layer,
)
from tests.ep.ranks import GLOO

EXPERTS, TOP_K = 4, 2
OPS = torch.ops.dualpipe_ext


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def buffer() -> Buffer:
    return Buffer(hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=64)


def draw(num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, topk_idx and topk_weights, all of them small integers."""
    gen = torch.Generator().manual_seed(seed)
    idx = torch.randint(-1, EXPERTS, (num_tokens, TOP_K), generator=gen)
    x, w = integers(num_tokens, HIDDEN, seed=seed), integers(num_tokens, TOP_K, seed=seed + 1)
    return x, idx, w


# --- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [ROWS, None], ids=["fixed", "exact"])
@pytest.mark.parametrize("layer", LAYERS)
def test_compiled_equals_eager(buffer: Buffer, layer: Layer, rows: int | None) -> None:
    eager = functools.partial(layer, buffer, max_recv_tokens=rows)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eager, backend=counter, fullgraph=True)
    for num_tokens in (16, 7, 30, 9):
        x, idx, w = draw(num_tokens, seed=num_tokens)
        inputs = torch.randn_like(x), idx, torch.randn_like(w)
        expect_same(run_layer(compiled, *inputs), run_layer(eager, *inputs), f"T={num_tokens}")
    # Once for the first T, once for any T.
    assert counter.frame_count <= 2


@pytest.mark.parametrize("rows", [ROWS, None], ids=["fixed", "exact"])
@pytest.mark.parametrize("layer", [token_layer, expert_layer])
def test_inductor_equals_eager(buffer: Buffer, layer: Layer, rows: int | None) -> None:
    eager = functools.partial(layer, buffer, max_recv_tokens=rows)
    compiled = torch.compile(eager, fullgraph=True, dynamic=True)
    for num_tokens in (16, 7):
        inputs = draw(num_tokens, seed=num_tokens)
        expect_same(run_layer(compiled, *inputs), run_layer(eager, *inputs), f"T={num_tokens}")


def test_any_number_of_rows_arrives(buffer: Buffer) -> None:
    """Also none and one, which compilers like to treat on their own, in one graph."""
    eager = functools.partial(expert_layer, buffer)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eager, backend=counter, fullgraph=True)
    x, idx, w = draw(9)
    for kept in (9, 1, 0):
        some = idx.clone()
        some[kept:] = -1
        expect_same(run_layer(compiled, x, some, w), run_layer(eager, x, some, w), f"{kept} tokens")
    assert counter.frame_count == 1


def test_no_tokens(buffer: Buffer) -> None:
    eager = functools.partial(token_layer, buffer)
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    expect_same(run_layer(compiled, *draw(0)), run_layer(eager, *draw(0)), "T=0")


@pytest.mark.parametrize(("rows", "graphs"), [(ROWS, 2), (None, 4)], ids=["fixed", "exact"])
def test_graph_breaks(buffer: Buffer, rows: int | None, graphs: int) -> None:
    """Code that is cut works, and nothing behind the ops is compiled.

    Without fullgraph, Dynamo makes a cut of its own where a size depends on data: after ``route``.
    """

    def layer(x: Tensor, idx: Tensor, w: Tensor) -> Tensor:
        recv, handle = buffer.dispatch(x, idx, w, layout="expert", max_recv_tokens=rows)
        out = expert(recv.tokens)
        torch._dynamo.graph_break()
        return buffer.combine(out, handle, weights=recv.weights)[0]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter)
    inputs = draw(9)
    expect_same(run_layer(compiled, *inputs), run_layer(layer, *inputs), "cut")
    assert counter.frame_count == graphs


def test_groups_of_fixed_size_and_late_weights(buffer: Buffer) -> None:
    def layer(x: Tensor, idx: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        recv, handle = buffer.dispatch(x, idx, layout="expert", rows_per_expert=40)
        weights, _ = buffer.dispatch_weights(w, handle)
        return recv.tokens, buffer.combine(expert(recv.tokens), handle, weights=weights)[0]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    with torch.no_grad():
        for num_tokens in (16, 7):
            inputs = draw(num_tokens, seed=num_tokens)
            for got, want in zip(compiled(*inputs), layer(*inputs), strict=True):
                assert torch.equal(got, want)
    assert counter.frame_count <= 2


def test_without_gradients(buffer: Buffer) -> None:
    compiled = torch.compile(
        functools.partial(expert_layer, buffer), backend="aot_eager", fullgraph=True
    )
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            y = compiled(*draw(8))
            assert not y.requires_grad
            assert torch.equal(y, expert_layer(buffer, *draw(8)))


def test_two_ranks() -> None:
    GLOO.run(
        2,
        compile_checks.compiled_equals_eager,
        compile_checks.compiled_ranks_join_everywhere,
    )


# --- handles in and out of graphs ----------------------------------------------------------------


def test_a_compiled_handle_works_in_eager_code(buffer: Buffer) -> None:
    def begin(x: Tensor, idx: Tensor, w: Tensor) -> Any:
        return buffer.dispatch(x, idx, w, layout="expert", async_op=True)

    x, idx, w = draw(8)
    recv, handle = torch.compile(begin, backend="aot_eager", fullgraph=True)(x, idx, w)
    want, want_handle = begin(x, idx, w)
    assert isinstance(recv, ExpertMajor)
    assert recv.event.done()
    assert (handle.num_rows, handle.num_tokens) == (want_handle.num_rows, 8)
    for name in ("tokens", "weights", "counts", "offsets"):
        assert torch.equal(getattr(recv, name), getattr(want, name))
    again, same = buffer.dispatch(x, handle=handle)
    assert same is handle
    assert torch.equal(again.tokens, want.tokens)
    y, _ = buffer.combine(recv.tokens, handle, weights=recv.weights)
    assert torch.equal(y, buffer.combine(want.tokens, want_handle, weights=want.weights)[0])


@pytest.mark.parametrize("layout", ["token", "expert"])
def test_combine_with_weights_in_and_out_of_graphs(buffer: Buffer, layout: str) -> None:
    """Whoever made the handle, and wherever it is used; no gradient, as in eager code."""
    x, idx, w = draw(8)

    def begin(x: Tensor, idx: Tensor, w: Tensor) -> Any:
        return buffer.dispatch(x, idx, w, layout=layout, max_recv_tokens=ROWS)

    def end(rows: Tensor, weights: Tensor, handle: Any) -> tuple[Tensor, Tensor]:
        return buffer.combine_with_weights(rows, weights, handle)[:2]

    def both(x: Tensor, idx: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        recv, handle = begin(x, idx, w)
        return end(recv.tokens, weights_of(recv), handle)

    def weights_of(recv: Any) -> Tensor:
        return recv.weights if layout == "expert" else recv.topk_weights

    def compiled(fn: Any) -> Any:
        return torch.compile(fn, backend="aot_eager", fullgraph=True)

    recv, eager = begin(x, idx, w)
    traced = compiled(begin)(x, idx, w)[1]
    rows, weights = recv.tokens.square(), weights_of(recv)
    want = end(rows, weights, eager)
    assert torch.equal(want[1], torch.where(idx >= 0, w, 0))
    for run in (end, compiled(end)):
        for handle in (eager, traced):
            found = run(rows.clone().requires_grad_(), weights, handle)
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
            assert not found[0].requires_grad
    found, want = compiled(both)(x, idx, w), both(x, idx, w)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_an_eager_handle_works_in_compiled_code(buffer: Buffer) -> None:
    def repeat(x: Tensor, handle: Any, w: Tensor) -> Tensor:
        recv, _ = buffer.dispatch(x, None, w, handle=handle)
        return buffer.combine(recv.tokens.square(), handle, weights=recv.weights)[0]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(repeat, backend=counter, fullgraph=True)
    for num_tokens in (5, 8, 6, 12, 7):
        x, idx, w = draw(num_tokens, seed=num_tokens)
        _, handle = buffer.dispatch(x, idx, layout="expert", alignment=2)
        expect_same(run_layer(compiled, x, handle, w), run_layer(repeat, x, handle, w), "repeat")
    assert counter.frame_count <= 2


def test_a_graph_keeps_its_handle_and_nothing_else_does(buffer: Buffer) -> None:
    before = num_tickets()
    compiled = torch.compile(
        functools.partial(expert_layer, buffer), backend="aot_eager", fullgraph=True
    )
    x, idx, w = draw(8)
    y = compiled(x.requires_grad_(), idx, w)
    assert num_tickets() == before + 1
    y.sum().backward()
    del y
    assert num_tickets() == before


def test_thousands_of_calls_leave_nothing(buffer: Buffer) -> None:
    handles: weakref.WeakSet[Any] = weakref.WeakSet()
    route = buffer._transport.route

    def watched_route(*args: Any) -> Any:
        handle = route(*args)
        handles.add(handle)
        return handle

    buffer._transport.route = watched_route
    x, idx, w = draw(4)
    x.requires_grad_()
    eager = functools.partial(expert_layer, buffer)
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    compiled(x, idx, w)
    before = num_tickets()
    gc.collect()
    gc.disable()  # reference counts must do
    try:
        for call in range(2000):
            y = (eager if call % 4 == 0 else compiled)(x, idx, w)
            if call % 2 == 0:
                y.sum().backward()
            del y
        assert num_tickets() == before
        assert not handles
    finally:
        gc.enable()


# --- which calls are made ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_unused_results_are_communicated_all_the_same(buffer: Buffer, backend: str) -> None:
    def wasteful(x: Tensor, idx: Tensor, w: Tensor) -> Tensor:
        recv, handle = buffer.dispatch(x, idx, max_recv_tokens=ROWS)
        buffer.combine(recv.tokens, handle)
        return expert_layer(buffer, x.detach(), idx, w, max_recv_tokens=ROWS)

    compiled = torch.compile(wasteful, backend=backend, fullgraph=True)
    x, idx, w = draw(8)
    calls_of = []
    for fn in (wasteful, compiled):
        with counted_calls(buffer) as calls:
            fn(x, idx, w.requires_grad_()).sum().backward()
        calls_of.append(calls)
    assert calls_of[0] == ["route", "dispatch", "combine"] * 2 + ["dispatch", "combine"]
    assert calls_of[1] == calls_of[0]


def test_checkpoint_in_compiled_code_communicates_once(buffer: Buffer) -> None:
    eager = functools.partial(token_layer, buffer, max_recv_tokens=ROWS)

    def checkpointed(*inputs: Tensor) -> Tensor:
        return checkpoint(eager, *inputs, use_reentrant=False, context_fn=save_communication)

    compiled = torch.compile(checkpointed, backend="aot_eager", fullgraph=True)
    with counted_calls(buffer) as calls:
        got = run_layer(compiled, *draw(8))
    assert calls == ["route", "dispatch", "combine", "dispatch", "combine"]
    want = run_layer(eager, *draw(8))
    expect_same(got, want, "compiled")
    expect_same(run_layer(checkpointed, *draw(8)), want, "eager")


def test_eager_calls_go_past_the_ops(buffer: Buffer) -> None:
    class Seen(TorchDispatchMode):
        names: set[str] = set()  # noqa: RUF012

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.names.add(func.namespace)
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        run_layer(functools.partial(expert_layer, buffer), *draw(8))
    assert "aten" in seen.names
    assert "dualpipe_ext" not in seen.names


# --- mistakes ------------------------------------------------------------------------------------


def test_mistakes_in_compiled_calls(buffer: Buffer) -> None:
    x, idx, w = draw(4)
    compiled = torch.compile(functools.partial(expert_layer, buffer), backend="aot_eager")
    with pytest.raises(ValueError, match=r"^expected topk_idx of shape \[4, 2\], got \[4, 1\]$"):
        compiled(x, idx[:, :1], w)
    bad = idx.clone()
    bad[1, 1] = EXPERTS
    with pytest.raises(ValueError, match=r"^expected expert ids .*, got 4 at topk_idx\[1, 1\]$"):
        compiled(x, bad, w)
    few = torch.compile(
        functools.partial(token_layer, buffer, max_recv_tokens=2),
        backend="aot_eager",
        fullgraph=True,
    )
    with pytest.raises(ValueError, match=r"^expected at most max_recv_tokens=2 rows at rank 0"):
        few(x, torch.zeros_like(idx), w)


# --- the ops themselves --------------------------------------------------------------------------


ALL_TESTS = {
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
}


def check(op: Any, *args: object, **how: Any) -> None:
    assert set(torch.library.opcheck(op, args, **how).values()) == {"SUCCESS"}


@pytest.mark.parametrize("layout", ["token", "expert"])
@pytest.mark.parametrize("rows", [ROWS, None], ids=["fixed", "exact"])
def test_opcheck_of_routing(buffer: Buffer, layout: str, rows: int | None) -> None:
    _, idx, _ = draw(6)
    # Every ticket has its own number, so that two calls never have the same result.
    tests = tuple(ALL_TESTS - {"test_aot_dispatch_dynamic"})
    options = (layout, 1, rows, False, None)
    check(OPS.route.default, idx, buffer._ticket, *options, test_utils=tests)
    ticket = OPS.route(idx, buffer._ticket, *options)
    check(OPS.describe.default, idx, ticket, EXPERTS, layout, rows)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("layout", ["token", "expert"])
def test_opcheck_of_moving_rows(buffer: Buffer, layout: str, fp8: bool) -> None:
    x, idx, w = draw(6)
    ticket = OPS.route(idx, buffer._ticket, layout, 1, ROWS, False, None)
    counts, _, offsets = OPS.describe(idx, ticket, EXPERTS, layout, ROWS)
    # The other tests do sums with the results, which torch has not for FP8.
    tests = ("test_faketensor", "test_autograd_registration") if fp8 else tuple(ALL_TESTS)
    options = (ROWS, layout, fp8, False)
    check(OPS.dispatch_rows.default, x, None, w, ticket, *options, test_utils=tests)
    row_weights = integers(*((ROWS, TOP_K) if layout == "token" else (ROWS,)), seed=3)
    rows = integers(ROWS, HIDDEN, seed=4)
    check(OPS.combine_rows.default, rows, None, x, row_weights, ticket, 6, TOP_K)

    x, w, rows = (t.requires_grad_() for t in (x, w, rows))
    check(OPS.dispatch.default, x, None, w, ANCHOR, ticket, *options, test_utils=tests)
    weights, offsets = (row_weights, offsets) if layout == "expert" else (None, None)
    check(OPS.combine.default, rows, weights, x, ANCHOR, ticket, 6, counts, offsets)
