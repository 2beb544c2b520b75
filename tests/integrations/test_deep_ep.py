"""Code in the manner of DeepEP's own tests, and Megatron's manager for it, with the import changed.

The checks run here over gloo, in tests/multi_gpu/test_deep_ep.py between GPUs.

Shapes: T tokens of a rank, H hidden, E experts, R ranks, K top-k.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext import ep
from dualpipe_ext.ep import TokenMajor, quantize, reference
from dualpipe_ext.integrations import deep_ep
from dualpipe_ext.launch import run_ranks
from tests.integrations.ranks import device

HIDDEN, EXPERTS, TOP_K, RANKS = 256, 8, 3, 2
LOCAL = EXPERTS // RANKS
TOKENS = (10, 7)


def inputs(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """x bfloat16 [T, H], topk_idx int64 [T, K] with some -1, topk_weights float32 [T, K]."""
    gen = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS[rank], HIDDEN, generator=gen).bfloat16()
    idx = torch.rand(TOKENS[rank], EXPERTS, generator=gen).topk(TOP_K).indices
    idx[torch.rand(idx.shape, generator=gen) < 0.2] = -1
    idx[3] = -1  # a token that goes nowhere
    weights = torch.rand(idx.shape, generator=gen)
    return x.to(device()), idx.to(device()), weights.to(device())


def routed(buffer: deep_ep.Buffer, x: Any, idx: Tensor, weights: Tensor, **how: Any) -> Any:
    """A dispatch as DeepEP's README makes it."""
    per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(idx, EXPERTS)
    return buffer.dispatch(
        x,
        topk_idx=idx,
        topk_weights=weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        previous_event=event,
        **how,
    )


def inputs_of_all() -> tuple[list[Tensor], ...]:
    """x, topk_idx and topk_weights by rank, on the CPU."""
    given = zip(*(inputs(rank) for rank in range(RANKS)), strict=True)
    return tuple([tensor.cpu() for tensor in column] for column in given)


def expected() -> tuple[TokenMajor, list[tuple[Tensor, Tensor, Tensor]]]:
    """What this rank receives, by the reference of all transports; and the inputs of all ranks."""
    xs, ids, weights = inputs_of_all()
    everyone = reference.dispatch(xs, ids, weights, num_experts=EXPERTS, layout="token")
    mine = everyone[dist.get_rank()]
    rows = {
        name: getattr(mine, name).to(device()) for name in ("tokens", "topk_idx", "topk_weights")
    }
    return replace(mine, **rows), [inputs(rank) for rank in range(RANKS)]


def layout_counts() -> None:
    _, idx, _ = inputs(dist.get_rank())
    buffer = deep_ep.Buffer(dist.group.WORLD)
    per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(idx, EXPERTS)
    event.current_stream_wait()
    assert per_rdma_rank is None
    for expert in range(EXPERTS):
        assert per_expert[expert] == (idx == expert).sum()
    for rank in range(RANKS):
        here = ((idx >= rank * LOCAL) & (idx < (rank + 1) * LOCAL)).any(1)
        assert torch.equal(in_rank[:, rank], here)
        assert per_rank[rank] == here.sum()
    assert (per_rank.dtype, per_expert.dtype, in_rank.dtype) == (
        torch.int32,
        torch.int32,
        torch.bool,
    )


def dispatch_and_combine() -> None:
    rank = dist.get_rank()
    want, given = expected()
    x, idx, weights = given[rank]
    buffer = deep_ep.Buffer(dist.group.WORLD, 1 << 20, 0, num_qps_per_rank=24)
    assert (buffer.num_nvl_bytes, buffer.group_size, buffer.rank) == (1 << 20, RANKS, rank)
    for alignment in (1, 4):
        recv, recv_idx, recv_weights, counts, handle, event = routed(
            buffer, x, idx, weights, expert_alignment=alignment, async_finish=True
        )
        event.current_stream_wait()
        assert torch.equal(recv, want.tokens)
        assert torch.equal(recv_idx, want.topk_idx)
        assert torch.equal(recv_weights, want.topk_weights)
        padded = [-(-n // alignment) * alignment for n in want.counts.tolist()]
        assert counts == padded
    # Rows and weights undo the dispatch: each token comes back once for every rank it went to.
    y, back, event = buffer.combine(recv, handle, topk_weights=recv_weights)
    with event:
        pass
    goes = buffer.get_dispatch_layout(idx, EXPERTS)[3]
    assert torch.equal(y, (x.float() * goes.sum(1)[:, None]).bfloat16())
    assert torch.equal(back, torch.where(idx >= 0, weights, 0.0))
    # A cached dispatch, as the backward of a combine.
    again, *nothing, event = buffer.dispatch(x, handle=handle)
    assert torch.equal(again, recv)
    assert nothing == [None, None, [], handle]
    bias = x * 0.37, x.flip(1) * 1.21
    both = (bias[0].float() + bias[1].float()).bfloat16()
    y_two, none, _ = buffer.combine(recv, handle, bias=bias)
    y_one, _, _ = buffer.combine(recv, handle, bias=both)
    assert none is None
    assert torch.equal(y_two, y_one)
    assert torch.equal(y_one, (x.float() * goes.sum(1)[:, None] + both.float()).bfloat16())


def fixed_size_and_fp8() -> None:
    rank = dist.get_rank()
    want, given = expected()
    x, idx, weights = given[rank]
    buffer = deep_ep.Buffer(dist.group.WORLD)
    most = sum(TOKENS) + 2
    recv, recv_idx, recv_weights, counts, handle, _ = routed(
        buffer, x, idx, weights, num_worst_tokens=most
    )
    arrived = len(want.tokens)
    assert recv.shape == (most, HIDDEN)
    assert torch.equal(recv[:arrived], want.tokens)
    assert (recv_idx[arrived:] == -1).all()
    assert (recv_weights[arrived:] == 0).all()
    assert counts == []
    y, _, _ = buffer.combine(recv, handle)
    goes = buffer.get_dispatch_layout(idx, EXPERTS)[3]
    assert torch.equal(y, (x.float() * goes.sum(1)[:, None]).bfloat16())

    q = quantize(x)
    (values, scales), *_, handle, _ = routed(buffer, (q.values, q.scales), idx, weights)
    rows = quantize(want.tokens)
    assert torch.equal(values.view(torch.uint8), rows.values.view(torch.uint8))
    assert torch.equal(scales, rows.scales)
    # Gradients come back unquantised.
    y, _, _ = buffer.combine(want.tokens, handle)
    assert torch.equal(y, (x.float() * goes.sum(1)[:, None]).bfloat16())


def live_buffers() -> list[ep.Buffer]:
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is ep.Buffer]


def calls_without_tokens() -> None:
    """Where no rank has tokens, as in a warm-up: nothing piles up, and handles stay good."""
    x, idx, weights = inputs(dist.get_rank())
    before = len(live_buffers())
    buffer = deep_ep.Buffer(dist.group.WORLD)
    nothing = x[:0], idx[:0], weights[:0]
    handles = [routed(buffer, *nothing)[4] for _ in range(4)]
    assert len(live_buffers()) == before + 1
    recv, *_, full, _ = routed(buffer, x, idx, weights)
    handles += [routed(buffer, *nothing)[4] for _ in range(4)]
    assert len(live_buffers()) == before + 2
    most = max(TOKENS)
    few = [buffer.low_latency_dispatch(*nothing[:2], most, EXPERTS)[2] for _ in range(4)]
    assert len(live_buffers()) == before + 3
    for handle in handles:
        y, _, _ = buffer.combine(x[:0], handle)
        assert y.shape == (0, HIDDEN)
    for handle in few:
        rows = buffer.get_next_low_latency_combine_buffer(handle)
        y, _, _ = buffer.low_latency_combine(rows, *nothing[1:], handle)
        assert y.shape == (0, HIDDEN)
    y, _, _ = buffer.combine(recv, full)
    goes = buffer.get_dispatch_layout(idx, EXPERTS)[3]
    assert torch.equal(y, (x.float() * goes.sum(1)[:, None]).bfloat16())
    # check() and reset() are of all of them.
    assert len(buffer._made()) == 3
    if x.is_cuda:
        torch.cuda.synchronize()
    buffer.check()
    buffer.destroy()
    del handle, handles, few, full, recv
    assert len(live_buffers()) == before


def mistakes() -> None:
    rank = dist.get_rank()
    x, idx, weights = inputs(rank)
    group = dist.group.WORLD
    buffer, other = deep_ep.Buffer(group), deep_ep.Buffer(group)
    with pytest.raises(ValueError, match="expected topk_idx and num_tokens_per_expert, or a"):
        buffer.dispatch(x)
    per_expert = buffer.get_dispatch_layout(idx, EXPERTS)[2]
    for given, ids, counts, message in (
        (x[0], idx, per_expert, rf"expected x as a tensor \[T, H\], got \[{HIDDEN}\]"),
        ((x[0], x[0]), idx, per_expert, rf"expected x\[0\] as a tensor .* got \[{HIDDEN}\]"),
        (x, idx[0], per_expert, rf"expected topk_idx as a tensor \[T, K\], got \[{TOP_K}\]"),
        (x, idx, per_expert[0], r"expected num_tokens_per_expert as a tensor \[E\], got \[\]"),
        (x, idx, [1] * EXPERTS, r"expected num_tokens_per_expert as a tensor \[E\], got list"),
    ):
        with pytest.raises(ValueError, match=message):
            buffer.dispatch(given, topk_idx=ids, num_tokens_per_expert=counts)
    with pytest.raises(ValueError, match=r"expected topk_idx as a tensor \[T, K\], got \[3\]"):
        buffer.get_dispatch_layout(idx[0], EXPERTS)
    *_, handle, _ = routed(buffer, x, idx, weights)
    for stranger in (other, deep_ep.Buffer(group)):
        with pytest.raises(ValueError, match="expected a handle that this Buffer's dispatch"):
            stranger.combine(x, handle)
    with pytest.raises(ValueError, match="expected a handle that this Buffer's dispatch"):
        buffer.combine(x, None)
    rows = x.new_zeros(handle.num_rows, HIDDEN)
    with pytest.raises(ValueError, match="expected bias or topk_weights, got both"):
        buffer.combine(rows, handle, topk_weights=weights, bias=x)
    with pytest.raises(ValueError, match="expected row_weights of shape"):
        buffer.combine(rows, handle, topk_weights=rows.new_zeros(1, dtype=torch.float32))
    many = x.repeat(2, 1), idx.repeat(2, 1), weights.repeat(2, 1)
    if rank == 0:
        with pytest.raises(
            ValueError, match=r"at most 10 tokens .* got 20: set deep_ep.Buffer.max"
        ):
            routed(buffer, *many)
    bad = idx.clone()
    bad[0, 0] = EXPERTS if rank == 1 else 0
    with pytest.raises(ValueError, match="expected expert ids from -1 to 7"):
        routed(buffer, x, bad, weights)
    # What was refused took nothing with it.
    recv, *_, handle, _ = routed(buffer, x, idx, weights)
    buffer.combine(recv, handle)
    deep_ep.Buffer.max_tokens = 20
    roomy = deep_ep.Buffer(group)
    *_, handle, _ = routed(roomy, *many)
    assert handle.num_tokens == 2 * TOKENS[rank]
    roomy.destroy()
    with pytest.raises(ValueError, match="expected a handle that this Buffer's dispatch"):
        roomy.combine(x, handle)


CHECKS: tuple[Callable[[], None], ...] = (
    layout_counts,
    dispatch_and_combine,
    fixed_size_and_fp8,
    calls_without_tokens,
    mistakes,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_ranks(check: Callable[[], None]) -> None:
    run_ranks(check, RANKS, backend="gloo", run_timeout_s=60)


def test_settings_that_callers_ask_for() -> None:
    config = deep_ep.Buffer.get_dispatch_config(8)
    assert config.get_nvl_buffer_size_hint(14336, 8) == 0
    assert deep_ep.Buffer.get_combine_config(8).get_rdma_buffer_size_hint(14336, 8) == 0
    assert deep_ep.Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256) == 0
    assert deep_ep.Config(12, 6, 256, 6, 128).num_sms == 12
    deep_ep.EventOverlap().current_stream_wait()
    deep_ep.Buffer.capture().current_stream_wait()


def test_set_num_sms_is_for_buffers_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_ep.Buffer, "num_sms", 24)
    before = deep_ep.Buffer(None)
    deep_ep.Buffer.set_num_sms(12)
    after = deep_ep.Buffer(None)
    assert before._buffers.options["num_sms"] == 24
    assert after._buffers.options["num_sms"] == 12
    assert deep_ep.Buffer.get_dispatch_config(8).num_sms == 12
    monkeypatch.setattr(deep_ep.Buffer, "transport", "copy_engine")
    monkeypatch.setattr(deep_ep.Buffer, "timeout_s", 7.0)
    packs = deep_ep.Buffer(None)._buffers.options
    assert packs == {"transport": "copy_engine", "num_sms": None, "timeout_s": 7.0}


def test_a_bound_on_tokens_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for most in (-5, 0):
        monkeypatch.setattr(deep_ep.Buffer, "max_tokens", most)
        with pytest.raises(ValueError, match=f"expected max_tokens to be None or .* got {most}"):
            deep_ep.Buffer(None)


def of_imports(source: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=90
    )
    return done.stdout + done.stderr


def test_install_is_what_import_finds() -> None:
    source = """
from dualpipe_ext.integrations import deep_ep as ours
ours.install(); ours.install()
import deep_ep
from deep_ep import Buffer, Config, EventOverlap
from deep_ep.utils import EventHandle, EventOverlap as again
import deep_ep.utils
from deep_ep import utils
from deep_ep.buffer import Buffer as same
assert same is Buffer is ours.Buffer
import importlib.util
assert deep_ep.utils is utils and utils.EventOverlap is EventOverlap
assert importlib.util.find_spec("deep_ep.utils") is not None
print(deep_ep is ours, again is EventOverlap)
ours.uninstall(); ours.uninstall()
try:
    import deep_ep
except ImportError:
    print("gone")
"""
    assert of_imports(source).split() == ["True", "True", "gone"]


def test_another_that_was_imported_before_is_left_alone() -> None:
    source = """
import sys, types
sys.modules["deep_ep"] = types.ModuleType("deep_ep")
from dualpipe_ext.integrations import deep_ep as ours
ours.uninstall()
ours.install()
"""
    assert "RuntimeError: expected install() before anything imports deep_ep" in of_imports(source)


def megatron_over_its_own_manager() -> None:
    """Megatron's DeepEP manager, unchanged, finds this in the place of DeepEP."""
    deep_ep.install()
    from megatron.core.transformer.moe import fused_a2a

    from tests.integrations import test_megatron as layers

    assert fused_a2a.Buffer is deep_ep.Buffer
    layers.start(tp=1, ep=2)
    dispatcher = layers.make_dispatcher(layers.make_config(moe_permute_fusion=False))
    assert type(dispatcher._comm_manager).__name__ == "_DeepepManager"
    # Megatron turns the weights of rows into float32 on its way.
    layers.compare(dispatcher, [layers.TOKENS, layers.TOKENS], close={"rtol": 1e-5, "atol": 1e-5})


def test_megatron_unchanged() -> None:
    pytest.importorskip("megatron.core", reason="needs megatron-core")
    run_ranks(megatron_over_its_own_manager, 2, backend="gloo", run_timeout_s=200)
