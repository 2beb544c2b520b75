"""The EP transports on one GPU, on virtual ranks: what no other machine can show.

Graphs, time-outs, thousands of calls and large sizes; the semantics are in tests/ep.

Shapes: R ranks, T tokens of a rank, H hidden, E experts, K top-k.
"""

from __future__ import annotations

import gc

import pytest
import torch

from dualpipe_ext.ep import quantize
from dualpipe_ext.ep.local_ranks import LocalRanks
from tests.ep import fault_checks, graph_checks, rank_checks, stress_checks
from tests.ep.cases import Case, make_case
from tests.ep.expected import Routes, rank_sum, rows_at
from tests.ep.ranks import (
    COPY_ENGINE_PARTS_VIRTUAL,
    COPY_ENGINE_VIRTUAL,
    LOW_LATENCY_VIRTUAL,
    NVLINK_VIRTUAL,
    Environment,
    Ranks,
)

_IDS = {
    NVLINK_VIRTUAL: "nvlink",
    COPY_ENGINE_VIRTUAL: "copy_engine",
    LOW_LATENCY_VIRTUAL: "low_latency",
    COPY_ENGINE_PARTS_VIRTUAL: "copy_engine-parts",
}


def _in(*environments: Environment) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("environment", environments, ids=_IDS.get)


every = _in(NVLINK_VIRTUAL, COPY_ENGINE_VIRTUAL, LOW_LATENCY_VIRTUAL)
all_ways = _in(*_IDS)
GIB = 2**30


def test_virtual_ranks_take_the_callers_stream() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        seen = LocalRanks(3).run(lambda _: torch.cuda.current_stream())
    assert seen == [stream] * 3


@all_ways
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_graphs(environment: Environment, num_ranks: int) -> None:
    environment.run(
        num_ranks,
        graph_checks.graph_equals_eager,
        graph_checks.graph_of_a_cached_handle,
        graph_checks.graph_of_groups,
    )


def _rows_also_go_aside(ranks: Ranks) -> None:
    case = make_case("uneven", ranks.num_ranks, hidden=16, dtype=torch.bfloat16)
    buffer = ranks.make_buffer(case)
    transport = buffer._transport
    byte = torch.zeros(1, dtype=torch.uint8, pin_memory=True)
    for wrong in (byte.clone(), byte.float().pin_memory(), byte.expand(8), byte[:0]):
        with pytest.raises(ValueError, match="expected pinned memory of uint8"):
            transport.link_detour = wrong
    aside = torch.zeros(100, dtype=torch.uint8, pin_memory=True)  # of which all rows take more
    transport.link_detour = aside
    for repeats in (1.0, 2.5):
        transport.link_repeats = repeats
        for how in rank_checks.LAYOUTS:
            aside.zero_()
            rank_checks.round_trip_equals_reference(ranks, buffer, case, how, f"x{repeats}, {how}")
            ranks.synchronize()
            # The copies of all virtual ranks are one rank's launch.
            assert any(ranks.gather(bool(aside.any()))) == (repeats > 1)
    transport.link_detour = None
    rank_checks.round_trip_equals_reference(ranks, buffer, case, rank_checks.LAYOUTS[0], "over it")


@pytest.mark.parametrize(
    "environment", [COPY_ENGINE_VIRTUAL, COPY_ENGINE_PARTS_VIRTUAL], ids=["whole", "parts"]
)
def test_a_slow_link_takes_rows_aside(environment: Environment) -> None:
    environment.run(2, _rows_also_go_aside)


@every
def test_a_slow_sender_is_named_and_a_reset_helps(environment: Environment) -> None:
    environment.run(4, fault_checks.slow_sender_then_reset)


@every
def test_a_stall_within_the_time_out_is_no_error(environment: Environment) -> None:
    environment.run(3, fault_checks.stalled_rank)


@pytest.mark.parametrize(
    ("environment", "num_ranks"),
    [
        (NVLINK_VIRTUAL, 4),
        (COPY_ENGINE_VIRTUAL, 2),
        (LOW_LATENCY_VIRTUAL, 4),
        (COPY_ENGINE_PARTS_VIRTUAL, 2),
    ],
    ids=list(_IDS.values()),
)
def test_10_000_calls(environment: Environment, num_ranks: int) -> None:
    environment.run(num_ranks, stress_checks.thousands_of_calls, timeout_s=200)


def few_and_many_sms(ranks: Ranks) -> None:
    case = make_case("uneven", ranks.num_ranks, hidden=64, tokens=60)
    for num_sms in (4, 13, 64):
        buffer = ranks.make_buffer(case, num_sms=num_sms)
        for how in rank_checks.LAYOUTS:
            rank_checks.round_trip_equals_reference(
                ranks, buffer, case, how, f"{num_sms} SMs {how}"
            )


@_in(NVLINK_VIRTUAL, LOW_LATENCY_VIRTUAL)
def test_few_and_many_sms(environment: Environment) -> None:
    environment.run(2, few_and_many_sms)


def factors_on_some_ranks(ranks: Ranks) -> None:
    """One launch acts for ranks with factors and for ranks without: those count as 1."""
    case = make_case("uneven", ranks.num_ranks, hidden=64, dtype=torch.bfloat16)
    buffer = ranks.make_buffer(case)
    x, idx, weights = ranks.inputs(case)
    recv, handle = buffer.dispatch(x, idx, weights, layout="expert")
    y, _ = buffer.combine(recv.tokens, handle, weights=recv.weights if ranks.last else None)
    want = rank_checks.received(ranks, case, layout="expert")
    factors = [
        w.weights if r == ranks.num_ranks - 1 else torch.ones_like(w.weights)
        for r, w in enumerate(want)
    ]
    sums = rank_checks.combined(
        ranks, case, [w.tokens for w in want], layout="expert", weights=factors
    )
    rank_checks.expect_same_tensor(y, sums[ranks.rank], "sums")


@every
def test_factors_on_some_ranks(environment: Environment) -> None:
    environment.run(3, factors_on_some_ranks)


# --- memory of asynchronous calls ----------------------------------------------------------------


@torch.no_grad()  # the event alone refers to them
def arrays_outlive_a_call(ranks: Ranks) -> None:
    """A handle's arrays are given to nobody else while the side stream still has to read them."""
    case = make_case("uneven", ranks.num_ranks, hidden=64)
    buffer = ranks.make_buffer(case)
    x, idx, _ = ranks.inputs(case)
    recv, handle = buffer.dispatch(x, idx)
    want, _ = buffer.combine(recv.tokens, handle, async_op=True)
    side, other = buffer._comm_stream._stream, torch.cuda.Stream()
    for waits in (True, False):
        recv, handle = buffer.dispatch(x, idx)
        first, num_numbers = handle.memory.data_ptr(), handle.memory.numel()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(2_000_000_000)
        y, event = buffer.combine(recv.tokens, handle, async_op=True)
        if waits:
            with torch.cuda.stream(other):
                event.wait()
        del recv, handle, event
        gc.collect()
        others = [idx.new_empty(num_numbers) for _ in range(64)]
        assert not side.query(), "the test took too long to tell"
        for memory in others:
            start = memory.data_ptr()
            assert not start <= first < start + 8 * num_numbers, f"waits elsewhere: {waits}"
        torch.cuda.synchronize()
        buffer.check()
        assert torch.equal(y, want), f"waits elsewhere: {waits}"


def test_arrays_outlive_a_call() -> None:
    NVLINK_VIRTUAL.run(1, arrays_outlive_a_call)


# --- large sizes ---------------------------------------------------------------------------------


def _draw(ranks: Ranks, num_tokens: int, hidden: int, num_experts: int, top_k: int) -> list:
    """Small integers and distinct experts on the device: all ranks' x, topk_idx and weights."""
    gen = torch.Generator(device=ranks.device).manual_seed(11)
    drawn = []
    for _ in range(ranks.num_ranks):
        x = torch.empty((num_tokens, hidden), dtype=torch.bfloat16, device=ranks.device)
        x.random_(-3, 4, generator=gen)
        scores = torch.rand((num_tokens, num_experts), generator=gen, device=ranks.device)
        idx = scores.topk(top_k).indices
        weights = torch.randint(1, 3, idx.shape, generator=gen, device=ranks.device).float()
        drawn.append((x, idx, weights))
    return drawn


def size_of_a_model(ranks: Ranks) -> None:
    """4096 tokens of 7168, 256 experts, top-8: as a DeepSeek-V3 layer has them, FP8 too."""
    num_tokens, hidden, num_experts, top_k = 4096, 7168, 256, 8
    drawn = ranks.once(lambda: _draw(ranks, num_tokens, hidden, num_experts, top_k))
    case = Case(num_experts, *(list(by_rank) for by_rank in zip(*drawn, strict=True)))
    routes = Routes(
        num_experts, torch.stack(case.topk_idx)[None], torch.stack(case.topk_weights)[None]
    )
    buffer = ranks.make_buffer(case, max_tokens=num_tokens)
    x, idx, weights = drawn[ranks.rank]
    rows_of_all = torch.cat([*case.xs, torch.zeros_like(x[:1])])
    quantized = quantize(rows_of_all)
    room = {"token": ranks.num_ranks * num_tokens, "expert": 2 * num_tokens * top_k}
    for layout, alignment in (("token", 1), ("expert", 128)):
        want = rows_at(routes, ranks.rank, layout, alignment, room[layout] + 128 * num_experts)
        num_rows = int(want.num_rows)
        source = want.source[0, :num_rows]
        for fp8 in (False, True):
            recv, handle = buffer.dispatch(
                x, idx, weights, layout=layout, alignment=alignment, fp8=fp8
            )
            what = f"{layout} fp8={fp8}"
            assert len(recv.tokens) == num_rows, what
            if fp8:
                # The row past the last token is zero; an empty row's scales are zero, too.
                filled = (source >= 0).unsqueeze(1)
                values = quantized.values.view(torch.uint8)[source]
                assert torch.equal(recv.tokens.view(torch.uint8), values * filled), what
                assert torch.equal(recv.scales, quantized.scales[source] * filled), what
                continue
            assert torch.equal(recv.tokens, rows_of_all[source]), what
            weighted = recv.weights if layout == "expert" else None
            y, _ = buffer.combine(recv.tokens * (ranks.rank + 1), handle, weights=weighted)
            factors = rank_sum(routes, ranks.rank, layout)[0].unsqueeze(1)
            # Integers that bfloat16 holds until the last rounding.
            assert torch.equal(y, (x.float() * factors).bfloat16()), f"{what} combine"


@every
def test_size_of_a_model(environment: Environment) -> None:
    environment.run(2, size_of_a_model)


def more_than_2_to_31_elements(ranks: Ranks) -> None:
    """Everything goes to rank 0, whose rows are then more than 2^31 numbers."""
    num_tokens, hidden = 66_000, 16_384
    assert ranks.num_ranks * num_tokens * hidden > 2**31
    x = torch.empty((num_tokens, hidden), dtype=torch.bfloat16, device=ranks.device)
    x.random_(-3, 4, generator=torch.Generator(device=ranks.device).manual_seed(ranks.rank))
    idx = torch.zeros((num_tokens, 1), dtype=torch.int64, device=ranks.device)
    case = Case(ranks.num_ranks, [x], [idx], [])
    buffer = ranks.make_buffer(case, max_tokens=num_tokens)
    # Sums of small integers are exact; beside them some columns.
    sums, columns = x.sum(1, dtype=torch.float32), x[:, ::1021].clone()
    all_sums, all_columns = ranks.gather(sums), ranks.gather(columns)
    for layout in ("token", "expert"):
        recv, handle = buffer.dispatch(x, idx, layout=layout)
        rows = recv.tokens.detach()
        del recv
        if ranks.rank == 0:
            assert rows.numel() > 2**31
            assert torch.equal(rows.sum(1, dtype=torch.float32), torch.cat(all_sums)), layout
            assert torch.equal(rows[:, ::1021], torch.cat(all_columns)), layout
        else:
            assert rows.shape == (0, hidden), layout
        y, _ = buffer.combine(rows, handle)
        assert torch.equal(y, x), f"{layout} combine"
        del rows, y, handle


@every
def test_more_than_2_to_31_elements(environment: Environment) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < 50 * GIB:
        pytest.skip(f"needs 50 GiB of free GPU memory, found {free / GIB:.0f}")
    try:
        environment.run(2, more_than_2_to_31_elements)
    finally:
        torch.cuda.empty_cache()
