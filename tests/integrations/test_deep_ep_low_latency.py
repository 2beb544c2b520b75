"""DeepEP's calls for decoding, as its own tests and servers make them.

The checks run here over gloo, in tests/multi_gpu/test_deep_ep.py between GPUs.

Shapes: T tokens of a rank, H hidden, E experts, R ranks, K top-k, G = E / R local experts,
n rows of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext.ep import ExpertMajor, Quantized, dequantize, reference
from dualpipe_ext.integrations import deep_ep
from dualpipe_ext.launch import run_ranks
from tests.integrations.ranks import device
from tests.integrations.test_deep_ep import (
    EXPERTS,
    HIDDEN,
    LOCAL,
    RANKS,
    TOKENS,
    inputs,
    inputs_of_all,
)

MOST = 12  # tokens of a rank
ROWS = RANKS * MOST
WAYS = ({}, {"async_finish": True}, {"return_recv_hook": True})


def expected(**how: Any) -> ExpertMajor:
    """What this rank receives, by the reference; on its device."""
    xs, ids, weights = inputs_of_all()
    return reference.dispatch(
        xs, ids, weights, num_experts=EXPERTS, layout="expert", rows_per_expert=ROWS, **how
    )[dist.get_rank()]


def expected_sums() -> Tensor:
    """What comes back to this rank from rows that nobody has changed."""
    xs, ids, weights = inputs_of_all()
    how = {"num_experts": EXPERTS, "layout": "expert", "rows_per_expert": ROWS}
    everyone = reference.dispatch(xs, ids, weights, **how)
    rows, factors = zip(*((r.tokens, r.weights) for r in everyone), strict=True)
    return reference.combine(rows, ids, weights=factors, **how)[dist.get_rank()].to(device())


def filled(groups: Tensor, counts: Tensor) -> Tensor:
    """[G, n, ...] with zeros in rows that nobody wrote, as [G x n, ...] on the CPU."""
    groups, counts = groups.cpu(), counts.cpu()
    bits = groups.view(torch.uint8) if groups.dtype == torch.float8_e4m3fn else groups
    there = torch.arange(ROWS) < counts.unsqueeze(1)
    return bits.where(there.unsqueeze(2), 0).flatten(0, 1)


def wait(event: deep_ep.EventOverlap, hook: Callable[[], None] | None) -> None:
    if hook is None:
        event.current_stream_wait()
    else:
        hook()


def every_way_to_call() -> None:
    """Rows, counts and sums with their bits; what unfilled rows hold changes nothing."""
    x, idx, weights = inputs(dist.get_rank())
    buffer = deep_ep.Buffer(dist.group.WORLD, low_latency_mode=True, num_qps_per_rank=LOCAL)
    want, want_y = expected(), expected_sums()
    for way in WAYS:
        given = x.clone()
        rows, counts, handle, event, hook = buffer.low_latency_dispatch(
            given, idx, MOST, EXPERTS, use_fp8=False, **way
        )
        assert (hook is not None) == way.get("return_recv_hook", False)
        assert (event.event is not None) == way.get("async_finish", False)
        if hook is not None:
            given.zero_()  # what has been sent is no longer needed
        wait(event, hook)
        assert rows.shape == (LOCAL, ROWS, HIDDEN)
        assert counts.dtype == torch.int32
        assert counts.tolist() == want.counts.tolist()
        assert torch.equal(filled(rows, counts), want.tokens)

        outputs = buffer.get_next_low_latency_combine_buffer(handle)
        assert outputs.shape == rows.shape
        outputs.fill_(torch.nan)
        for expert, count in enumerate(counts.tolist()):
            outputs[expert, :count] = rows[expert, :count]
        for out in (None, torch.full_like(x, torch.nan)):
            y, event, hook = buffer.low_latency_combine(
                outputs, idx, weights, handle, zero_copy=True, out=out, **way
            )
            wait(event, hook)
            assert out is None or y is out
            assert torch.equal(y, want_y)


def fp8_rows() -> None:
    """As the reference quantises them; sums are those of rows that the experts see."""
    x, idx, weights = inputs(dist.get_rank())
    buffer = deep_ep.Buffer(dist.group.WORLD, low_latency_mode=True)
    for round_scale in (False, True):
        (values, scales), counts, handle, _, _ = buffer.low_latency_dispatch(
            x, idx, MOST, EXPERTS, round_scale=round_scale
        )
        want = expected(fp8=True, pow2_scales=round_scale)
        assert torch.equal(filled(values, counts), want.tokens.view(torch.uint8))
        assert torch.equal(filled(scales, counts), want.scales)
        rows = dequantize(Quantized(values.flatten(0, 1), scales.flatten(0, 1)), torch.bfloat16)
        y, _, _ = buffer.low_latency_combine(rows.view(LOCAL, ROWS, HIDDEN), idx, weights, handle)
        live = (weights * (idx >= 0)).double()
        exact = x.double() * live.sum(1, keepdim=True)
        # E4M3 rounds by 2^-4 of a value and 2^-10 of a block's largest at most; bfloat16, three
        # times, by 2^-9 of what it rounds each.
        most = x.double().abs().view(len(x), -1, 128).amax(2).repeat_interleave(128, dim=1)
        share = live.sum(1, keepdim=True)
        bound = share * (x.double().abs() * (2.0**-4 + 4 * 2.0**-9) + most * 2.0**-8)
        assert ((y.double() - exact).abs() <= bound).all()


def servers_count_what_arrives() -> None:
    """Several calls, two buffers of different sizes, tokens that change."""
    x, idx, weights = inputs(dist.get_rank())
    buffer = deep_ep.Buffer(dist.group.WORLD, low_latency_mode=True)
    buffer.clean_low_latency_buffer(MOST, HIDDEN, EXPERTS)
    stats = torch.zeros(LOCAL, dtype=torch.int32, device=x.device)
    want_y = expected_sums()
    for most in (MOST, 2 * MOST, MOST):
        rows, counts, handle, _, _ = buffer.low_latency_dispatch(
            x, idx, most, EXPERTS, stats, use_fp8=False
        )
        assert rows.shape[1] == RANKS * most
        y, _, _ = buffer.low_latency_combine(rows, idx, weights, handle)
        assert torch.equal(y, want_y)
    assert stats.tolist() == (3 * counts).tolist()
    # Normal calls of the same object, between them.
    per_expert = buffer.get_dispatch_layout(idx, EXPERTS)[2]
    recv, *_, of_tokens, _ = buffer.dispatch(x, topk_idx=idx, num_tokens_per_expert=per_expert)
    y, _, _ = buffer.low_latency_combine(rows, idx, weights, handle)
    assert torch.equal(y, want_y)
    buffer.combine(recv, of_tokens)
    nothing = x[:0], idx[:0], weights[:0]
    rows, counts, handle, _, _ = buffer.low_latency_dispatch(*nothing[:2], MOST, EXPERTS)
    assert counts.tolist() == [0] * LOCAL
    y, _, _ = buffer.low_latency_combine(rows[0].bfloat16(), *nothing[1:], handle)
    assert y.shape == (0, HIDDEN)
    if x.is_cuda:
        torch.cuda.synchronize()
    buffer.check()


def a_graph_replays_it() -> None:
    """On a GPU: a step with its hooks, captured once, replayed with other tokens and routing."""
    if device() == "cpu":
        return
    x, idx, weights = (tensor.clone() for tensor in inputs(dist.get_rank()))
    buffer = deep_ep.Buffer(dist.group.WORLD, low_latency_mode=True)

    def step() -> Tensor:
        rows, _, handle, _, hook = buffer.low_latency_dispatch(
            x, idx, MOST, EXPERTS, use_fp8=False, return_recv_hook=True
        )
        hook()
        y, _, hook = buffer.low_latency_combine(rows, idx, weights, handle, return_recv_hook=True)
        hook()
        return y

    for _ in range(2):
        step()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(4):
        gen = torch.Generator().manual_seed(10 * seed + dist.get_rank())
        idx.copy_(torch.rand(len(idx), EXPERTS, generator=gen).topk(idx.shape[1]).indices)
        x.copy_(torch.randn(x.shape, generator=gen))
        weights.copy_(torch.rand(weights.shape, generator=gen))
        graph.replay()
        replayed = captured.clone()
        assert torch.equal(replayed, step())


def mistakes() -> None:
    rank = dist.get_rank()
    x, idx, weights = inputs(rank)
    buffer, other = (deep_ep.Buffer(dist.group.WORLD) for _ in range(2))

    def dispatch(
        most: Any = MOST, x: Tensor = x, idx: Any = idx, stats: Any = None, **how: Any
    ) -> Any:
        return buffer.low_latency_dispatch(x, idx, most, EXPERTS, stats, **how)

    for how, message in (
        ({"most": 0}, "num_max_dispatch_tokens_per_rank to be an integer of at least 1, got 0"),
        ({"use_ue8m0": True}, "expected use_ue8m0 to be left out"),
        ({"x": x.float()}, r"expected x as torch.bfloat16 \[T, H\], got torch.float32"),
        ({"x": x[0]}, r"expected x as torch.bfloat16 \[T, H\], got torch.bfloat16 \[256\]"),
        ({"idx": idx[0]}, r"expected topk_idx as a tensor \[T, K\], got \[3\]"),
        ({"idx": idx.tolist()}, r"expected topk_idx as a tensor \[T, K\], got list"),
        ({"stats": weights}, "expected cumulative_local_expert_recv_stats as torch.int32 or"),
        ({"stats": idx[:1, :1]}, rf"or torch.int64 \[{LOCAL}\], got torch.int64 \[1, 1\]"),
        ({"dispatch_wait_recv_cost_stats": weights}, "expected dispatch_wait_recv_cost_stats to"),
        ({"async_finish": True, "return_recv_hook": True}, "async_finish or return_recv_hook, got"),
    ):
        with pytest.raises(ValueError, match=message):
            dispatch(**how)
    if max(TOKENS) == TOKENS[rank]:
        few = TOKENS[rank] - 1
        # The memory is made by all ranks together.
        _, _, handle, _, _ = buffer.low_latency_dispatch(x[:few], idx[:few], few, EXPERTS)
        with pytest.raises(
            ValueError, match=f"at most {few} tokens .* got {TOKENS[rank]}: set num"
        ):
            dispatch(few)
    else:
        _, _, handle, _, _ = dispatch(max(TOKENS) - 1)
    (rows, _), _, handle, _, _ = dispatch()
    rows = rows.bfloat16()

    def combine(rows: Any = rows, idx: Any = idx, handle: Any = handle, **how: Any) -> Any:
        return buffer.low_latency_combine(rows, idx, weights, handle, **how)

    for how, message in (
        ({"rows": rows.flatten(0, 1)}, rf"torch.bfloat16 \[{LOCAL}, {ROWS}, {HIDDEN}\], got"),
        ({"rows": (rows, rows)}, r"256\], got tuple"),
        ({"idx": idx[:, 1:]}, "expected topk_idx and topk_weights of one shape, got"),
        ({"handle": None}, "expected a handle that this Buffer's dispatch returned"),
        ({"combine_wait_recv_cost_stats": weights}, "expected combine_wait_recv_cost_stats to be"),
        ({"async_finish": True, "return_recv_hook": True}, "async_finish or return_recv_hook, got"),
    ):
        with pytest.raises(ValueError, match=message):
            combine(**how)
    with pytest.raises(ValueError, match="expected a handle that this Buffer's dispatch returned"):
        other.low_latency_combine(rows, idx, weights, handle)
    with pytest.raises(ValueError, match="expected topk_weights of shape"):
        buffer.low_latency_combine(rows, idx[:, 1:], weights[:, 1:], handle)
    per_expert = buffer.get_dispatch_layout(idx, EXPERTS)[2]
    recv, *_, of_tokens, _ = buffer.dispatch(x, topk_idx=idx, num_tokens_per_expert=per_expert)
    with pytest.raises(ValueError, match="handle of low_latency_dispatch, got one of dispatch"):
        combine(handle=of_tokens)
    for call in (buffer.dispatch, buffer.combine):
        with pytest.raises(ValueError, match="handle of dispatch, got one of low_latency_dispatch"):
            call(recv, handle=handle)
    # What was refused took nothing with it.
    y, _, _ = combine()
    assert y.shape == x.shape
    with pytest.raises(ValueError, match=r"expected out of dtype torch.bfloat16, got torch.float"):
        combine(out=x.float())
    with pytest.raises(ValueError, match="expected out to be contiguous and on 16 bytes, got str"):
        combine(out=x.t().contiguous().t())
    buffer.destroy()
    with pytest.raises(ValueError, match="expected a handle that this Buffer's dispatch returned"):
        combine()


CHECKS: tuple[Callable[[], None], ...] = (
    every_way_to_call,
    fp8_rows,
    servers_count_what_arrives,
    a_graph_replays_it,
    mistakes,
)


@pytest.mark.parametrize(
    "check",
    [check for check in CHECKS if check is not a_graph_replays_it],
    ids=lambda c: c.__name__,
)
def test_two_ranks(check: Callable[[], None]) -> None:
    run_ranks(check, RANKS, backend="gloo", run_timeout_s=60)
