"""What calls over peer memory give to the kernels, with a stand-in for those: no GPU needed.

Shapes: T tokens, H hidden, E experts, K top-k, R = 2 ranks of which this is rank 1.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dualpipe_ext.ep import Buffer, peer, quantize, route_faults
from dualpipe_ext.ep.local_ranks import LocalRank, LocalRanks
from dualpipe_ext.errors import CommTimeoutError
from tests.ep import host_core

T, H, E, K = 6, 256, 8, 3
RANKS = 2
SLABS = 2

pytestmark = pytest.mark.skipif(
    bool(host_core.why_unavailable()), reason=host_core.why_unavailable()
)


@pytest.fixture(scope="module")
def launches() -> Iterator[ModuleType]:
    with host_core.host_core() as told:
        told.keep_launches(True)
        yield told


@pytest.fixture
def buffer(launches: ModuleType) -> Buffer:
    with host_core.as_rank(1, RANKS):
        return make_buffer()


def make_buffer(transport: str = "nvlink", **options: Any) -> Buffer:
    sizes = {"hidden": H, "num_experts": E, "top_k": K, "max_tokens": 9}
    return Buffer(**sizes, transport=transport, num_slabs=SLABS, num_sms=24, **options)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(T, H, generator=gen).bfloat16()
    idx = torch.rand(T, E, generator=gen).topk(K).indices
    return x, idx, torch.rand(T, K, generator=gen)


ARRAYS = ("slots", "ids", "matrix", "run_starts", "unit_tokens", "positions")


def expect_arrays(told: dict[str, Any], handle: Any, in_parts: bool = False) -> None:
    """The arrays that only kernels read lie one after the other in the handle's memory."""
    there = {"unit_tokens": in_parts, "positions": handle.layout == "expert"}
    start, num_bytes = handle.memory.data_ptr(), 8 * handle.memory.numel()
    sizes = {
        "slots": 4 * T * RANKS,
        "ids": 2 * T * 8,
        "matrix": 4 * (RANKS + 1) * RANKS,
        "run_starts": 4 * RANKS * (9 + 1),
        "unit_tokens": 4 * 8 * RANKS,
        "positions": 4 * RANKS * 9 * 4,
    }
    end = start
    for name in ARRAYS:
        if not there.get(name, True):
            assert told[name] == 0
            continue
        assert told[name] >= end, name
        assert (told[name] - start) % 16 == 0, name
        end = told[name] + sizes[name]
    assert end <= start + num_bytes
    assert told["counts"] == handle.counts.data_ptr()
    if handle.layout == "expert":
        assert told["offsets"] == handle.offsets.data_ptr()
        assert told["topk_local"] == 0
    else:
        assert told["offsets"] == 0
        assert told["topk_local"] == handle.topk_idx.data_ptr()


@pytest.mark.parametrize("layout", ["token", "expert"])
@pytest.mark.parametrize("bound", [None, 40])
def test_route_and_dispatch(
    buffer: Buffer, inputs: tuple, launches: ModuleType, layout: str, bound: int | None
) -> None:
    x, idx, weights = inputs
    launches.take_launches()
    with torch.no_grad():
        recv, handle = buffer.dispatch(x, idx, weights, layout=layout, max_recv_tokens=bound)
    route, dispatch = launches.take_launches()
    for told in (route, dispatch):
        expect_arrays(told, handle)
        assert told["rank"] == 1
        assert told["num_tokens"] == T
        assert told["expert_layout"] == (layout == "expert")
        assert (told["num_local"], told["ctas"], told["stream"]) == (1, 24, host_core.STREAM)
    unbound = 2**31 - 1 if layout == "expert" else RANKS * 9
    assert route["num_rows"] == (bound or unbound)
    assert route["max_rows"] == (bound or -1)
    assert route["topk_idx"] == idx.data_ptr()
    num_rows = bound or RANKS * T  # as the stand-in answers
    assert len(recv.tokens) == dispatch["num_rows"] == num_rows
    assert dispatch["x"] == x.data_ptr()
    assert dispatch["weights"] == weights.data_ptr()
    assert dispatch["out_rows"] == recv.tokens.data_ptr()
    arrived = recv.weights if layout == "expert" else recv.topk_weights
    assert dispatch["out_weights"] == arrived.data_ptr()
    assert (dispatch["in_bytes"], dispatch["out_bytes"]) == (2 * H, 2 * H)
    assert (dispatch["out_pitch"], dispatch["out_scale_pitch"]) == (2 * H, 0)
    assert (dispatch["slab"], dispatch["keep_in_slab"], dispatch["payload"]) == (0, 0, 0)
    assert dispatch["x_scales"] == dispatch["out_scales"] == 0


def test_a_cached_handle_serves_calls_of_any_kind(
    buffer: Buffer, inputs: tuple, launches: ModuleType
) -> None:
    """Each gets the sizes of its own kind, also in the second round, when all are known."""
    x, idx, weights = inputs
    _, handle = buffer.dispatch(x, idx, weights)
    given = quantize(x)
    calls = [
        ({"x": x}, (0, 2 * H, 2 * H, 0, 0)),
        ({"x": x, "fp8": True}, (1, 2 * H, H, 2, 0)),
        ({"x": x, "fp8": True, "pow2_scales": True}, (2, 2 * H, H, 2, 0)),
        ({"x": tuple(given), "fp8": True, "topk_weights": weights}, (0, H, H, 2, 4)),
        ({"x": x.half(), "topk_weights": weights}, (0, 2 * H, 2 * H, 0, 4)),
    ]
    for arguments, sizes in calls * 2:
        launches.take_launches()
        recv, _ = buffer.dispatch(**arguments, handle=handle)
        (told,) = launches.take_launches()
        names = ("payload", "in_bytes", "out_bytes", "num_scales", "weight_bytes")
        assert tuple(told[name] for name in names) == sizes
        expect_arrays(told, handle)
        if recv.scales is not None:
            assert told["out_scales"] == recv.scales.data_ptr()
            assert told["out_scale_pitch"] == 2
        assert recv.tokens.element_size() * H == told["out_bytes"]


def test_few_tokens_have_kernels_of_their_own(launches: ModuleType, inputs: tuple) -> None:
    x, idx, weights = inputs
    with host_core.as_rank(1, RANKS):
        buffer = make_buffer("low_latency")
    transport = buffer._transport
    layout = transport._layout
    # Two inboxes, which hold nothing yet, and no other slabs; flags are as they are elsewhere.
    assert layout.bytes == layout.slab_offset(0) + 2 * layout.slab_bytes
    memory = transport._memory.own
    assert (memory[layout.slab_offset(0) :] == 0xFF).all()
    assert not memory[: layout.slab_offset(0)].any()
    launches.take_launches()
    recv, handle = buffer.dispatch(x, idx, weights, zero_copy=True)
    buffer.combine(recv.tokens, handle)
    route, dispatch, combine = launches.take_launches()
    assert route["kernel"] == "route"
    assert dispatch["kernel"] == "low_latency_dispatch"
    assert combine["kernel"] == "low_latency_combine"
    assert dispatch["keep_in_slab"] == 0
    assert dispatch["weight_bytes"] == 4
    assert combine["weight_bytes"] == 0
    expect_arrays(dispatch, handle)
    # A reset empties the inboxes, whatever has been left there.
    memory.fill_(3)
    buffer.reset()
    assert (memory[layout.slab_offset(0) :] == 0xFF).all()
    assert not memory[: layout.control_bytes].any()


OVERFLOW = r"^expected at most max_recv_tokens=40 rows at rank 0, got 1000$"


@pytest.fixture
def reports(launches: ModuleType) -> Iterator[Callable[..., None]]:
    def set_reports(answers: bool = True, faulty: bool = False) -> None:
        launches.set_reports(answers=answers, faulty=faulty)

    yield set_reports
    set_reports()


@pytest.mark.parametrize("before", [0, 1, 40])
def test_a_fault_is_told_at_a_call_that_follows_from_its_own(
    buffer: Buffer, inputs: tuple, reports: Callable[..., None], before: int
) -> None:
    """And so at the same one on every rank, however far a GPU has come."""
    x, idx, weights = inputs

    def dispatch() -> None:
        buffer.dispatch(x, idx, weights, max_recv_tokens=40)

    for _ in range(before):
        dispatch()
    reports(faulty=True)
    dispatch()
    reports()
    end = -(-(before + 1) // route_faults.PERIOD) * route_faults.PERIOD + route_faults.PERIOD
    for _ in range(before + 1, end):
        dispatch()
    with pytest.raises(ValueError, match=OVERFLOW):
        dispatch()
    for _ in range(2 * route_faults.PERIOD + 1):
        dispatch()


def test_a_fault_is_told_at_once_to_who_asks_or_waits(
    buffer: Buffer,
    inputs: tuple,
    launches: ModuleType,
    reports: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, idx, weights = inputs
    for way in ("asks", "waits", "reset", "capture"):
        monkeypatch.setattr(
            torch.cuda, "is_current_stream_capturing", lambda of=way: of == "capture"
        )
        reports(faulty=True)
        buffer.dispatch(x, idx, weights, max_recv_tokens=40)
        reports()
        monkeypatch.undo()
        launches.take_launches()
        if way == "reset":
            buffer.reset()
        elif way == "waits":
            with pytest.raises(ValueError, match=OVERFLOW):
                buffer.dispatch(x, idx, weights)
            # The others have made this call too.
            assert [told["kernel"] for told in launches.take_launches()] == ["route"]
        else:
            with pytest.raises(ValueError, match=OVERFLOW):
                buffer.check()
        buffer.check()
        buffer.dispatch(x, idx, weights)


def test_after_an_answer_that_did_not_come_in_time_every_call_is_refused(
    buffer: Buffer, inputs: tuple, reports: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could be taken for that of a later call."""
    monkeypatch.setattr(peer, "_HOST_MARGIN_S", -59.9)  # of twice 30
    x, idx, weights = inputs
    _, handle = buffer.dispatch(x, idx, weights)
    reports(answers=False)
    late = r"^rank 1, dispatch \(counts\): expected the device to answer within 0\.1 s$"
    for call in (
        lambda: buffer.dispatch(x, idx, weights),
        lambda: buffer.dispatch(x, idx, weights, max_recv_tokens=40),
        lambda: buffer.dispatch(x, handle=handle),
        lambda: buffer.combine(x.new_zeros(handle.num_rows, H), handle),
        buffer.check,
    ):
        with pytest.raises(CommTimeoutError, match=late):
            call()
    reports()
    with pytest.raises(CommTimeoutError, match=late):
        buffer.dispatch(x, idx, weights)
    buffer.reset()
    buffer.dispatch(x, idx, weights)


def test_groups_of_fixed_size(buffer: Buffer, inputs: tuple, launches: ModuleType) -> None:
    x, idx, weights = inputs
    launches.take_launches()
    recv, handle = buffer.dispatch(x, idx, weights, layout="expert", rows_per_expert=5)
    route, dispatch = launches.take_launches()
    num_rows = E // RANKS * 5
    assert (route["expert_layout"], route["alignment"]) == (2, 5)
    assert (route["max_rows"], route["num_rows"]) == (5, num_rows)
    assert (dispatch["expert_layout"], dispatch["num_rows"]) == (2, num_rows)
    assert len(recv.tokens) == len(recv.weights) == handle.num_rows == num_rows
    assert recv.host_counts is None
    expect_arrays(dispatch, handle)


@pytest.mark.parametrize(("transport", "row"), [("nvlink", 16), ("low_latency", 0)])
def test_weights_go_with_the_narrowest_rows(
    launches: ModuleType, inputs: tuple, transport: str, row: int
) -> None:
    """Also between calls of the same kind, whose sizes stay their own; they take no slab."""
    x, idx, weights = inputs
    with host_core.as_rank(1, RANKS):
        buffer = make_buffer(transport)
    recv, handle = buffer.dispatch(x, idx, weights, zero_copy=True)
    for _ in range(2):
        launches.take_launches()
        late, _ = buffer.dispatch_weights(weights, handle)
        buffer.dispatch(x, None, weights, handle=handle)
        of_weights, of_rows = launches.take_launches()
        for told, size in ((of_weights, row), (of_rows, 2 * H)):
            assert (told["in_bytes"], told["out_bytes"], told["out_pitch"]) == (size,) * 3
            assert told["weight_bytes"] == 4
        assert of_weights["out_weights"] == late.data_ptr()
        assert of_weights["keep_in_slab"] == 0
        assert late.shape == recv.topk_weights.shape


def test_float64_and_its_numbers(launches: ModuleType, inputs: tuple) -> None:
    _, idx, weights = inputs
    with host_core.as_rank(1, RANKS):
        buffer = make_buffer(dtype=torch.float64)
    launches.take_launches()
    for numbers in (weights, weights.double(), weights):
        buffer.dispatch(torch.zeros(T, H, dtype=torch.float64), idx, numbers)
        _, told = launches.take_launches()
        assert told["weight_bytes"] == numbers.element_size()
        assert told["in_bytes"] == 8 * H


def test_combine(buffer: Buffer, inputs: tuple, launches: ModuleType) -> None:
    x, idx, weights = inputs
    for layout in ("token", "expert"):
        recv, handle = buffer.dispatch(x, idx, weights, layout=layout)
        rows = torch.zeros(handle.num_rows, H).bfloat16()
        for factors in (None, recv.weights) if layout == "expert" else (None,):
            launches.take_launches()
            y, _ = buffer.combine(rows, handle, weights=factors, bias=x)
            (told,) = launches.take_launches()
            assert told["slots"] >= handle.memory.data_ptr()
            assert (told["rows"], told["num_rows"]) == (rows.data_ptr(), len(rows))
            assert (told["bias"], told["y"]) == (x.data_ptr(), y.data_ptr())
            assert told["weights"] == (0 if factors is None else factors.data_ptr())
            assert told["weighted"] == (factors is not None)
            assert told["expert_layout"] == (layout == "expert")
            assert (told["row_bytes"], told["num_tokens"]) == (2 * H, T)
            assert told["row_weights"] == told["token_weights"] == 0


@pytest.mark.parametrize("layout", ["token", "expert"])
def test_copy_engines(launches: ModuleType, inputs: tuple, layout: str) -> None:
    """Their kernels follow the same arrays and one more, in every kind of call."""
    x, idx, weights = inputs
    with host_core.as_rank(1, RANKS):
        buffer = make_buffer("copy_engine")
    launches.take_launches()
    recv, handle = buffer.dispatch(x, idx, weights, layout=layout, max_recv_tokens=40)
    rows = torch.zeros(40, H).bfloat16()
    for factors in (None, recv.weights) if layout == "expert" else (None,):
        buffer.dispatch(x, topk_weights=weights, fp8=True, handle=handle)
        y, _ = buffer.combine(rows, handle, weights=factors)
        buffer.dispatch(x, topk_weights=weights, handle=handle)
        *_, quantising, combine, plain = launches.take_launches()
        for told in (quantising, plain):
            expect_arrays(told, handle, in_parts=True)
        assert (quantising["payload"], plain["payload"]) == (1, 0)
        assert combine["unit_tokens"] == plain["unit_tokens"]
        assert (combine["rows"], combine["y"]) == (rows.data_ptr(), y.data_ptr())
        assert combine["weighted"] == (factors is not None)


def test_gradients_take_the_same_handle(
    buffer: Buffer, inputs: tuple, launches: ModuleType
) -> None:
    x, idx, weights = inputs
    x.requires_grad_()
    weights.requires_grad_()
    recv, handle = buffer.dispatch(x, idx, weights)
    launches.take_launches()
    (recv.tokens.sum() + recv.topk_weights.sum()).backward()
    (told,) = launches.take_launches()
    assert told["kernel"] == "combine"
    assert told["slots"] >= handle.memory.data_ptr()
    assert told["row_weights"] != 0
    assert told["token_weights"] == weights.grad.data_ptr()


def test_a_buffers_own_delays_reach_the_kernels(
    buffer: Buffer, inputs: tuple, launches: ModuleType
) -> None:
    x, idx, _ = inputs
    buffer._transport.delays_ns = (5, 7)
    launches.take_launches()
    recv, handle = buffer.dispatch(x, idx)
    buffer.combine(recv.tokens, handle)
    route, dispatch, combine = launches.take_launches()
    assert route["delay_ns"] == 5
    for told in (dispatch, combine):
        assert (told["send_delay_ns"], told["receive_delay_ns"]) == (5, 7)


# --- rows that stay in the communication buffer ---------------------------------------------


def test_zero_copy_rows_are_the_slab(buffer: Buffer, inputs: tuple, launches: ModuleType) -> None:
    x, idx, _ = inputs
    for fp8, dtype in ((False, torch.bfloat16), (True, torch.float8_e4m3fn)):
        launches.take_launches()
        recv, _ = buffer.dispatch(x, idx, zero_copy=True, fp8=fp8)
        told = launches.take_launches()[-1]
        assert buffer.holds(recv.tokens)
        assert (recv.tokens.dtype, tuple(recv.tokens.shape)) == (dtype, (RANKS * T, H))
        pitch = -(-H * dtype.itemsize // 128) * 128
        assert recv.tokens.stride() == (pitch // dtype.itemsize, 1)
        assert (told["keep_in_slab"], told["out_pitch"]) == (1, pitch)
        assert told["out_rows"] == recv.tokens.data_ptr()
        layout = buffer._transport._layout
        first = buffer._transport.addresses[1] + layout.slab_offset(told["slab"])
        assert told["out_rows"] == first
        if fp8:
            assert buffer.holds(recv.scales)
            assert recv.scales.stride() == (layout.scale_pitch // 4, 1)
            assert told["out_scales"] == recv.scales.data_ptr()


def test_a_slab_is_taken_until_the_last_tensor_of_its_memory_is_gone(
    buffer: Buffer, inputs: tuple
) -> None:
    x, idx, _ = inputs

    def take() -> Any:
        return buffer.dispatch(x, idx, zero_copy=True, fp8=True)[0]

    gc.disable()  # reference counts must do
    try:
        first, second = take(), take()
        assert buffer.holds(first.tokens)
        assert buffer.holds(second.tokens)
        own = take()
        assert not buffer.holds(own.tokens)
        address, part = first.tokens.data_ptr(), first.tokens[2:, 5:]
        scales = first.scales.detach()
        del first
        assert not buffer.holds(take().tokens)
        del part
        assert not buffer.holds(take().tokens)
        del scales
        assert take().tokens.data_ptr() == address
        assert take().tokens.data_ptr() == address
    finally:
        gc.enable()


def test_a_slab_outlives_its_buffer(launches: ModuleType, inputs: tuple) -> None:
    x, idx, _ = inputs
    with host_core.as_rank(1, RANKS):
        buffer = make_buffer()
    tokens = buffer.dispatch(x, idx, zero_copy=True)[0].tokens
    del buffer
    gc.collect()
    tokens.fill_(3)
    assert tokens.float().sum() == 3 * tokens.numel()


def test_rows_of_a_slab_are_tensors_like_any_other(buffer: Buffer, inputs: tuple) -> None:
    x, idx, _ = inputs
    x.requires_grad_()
    recv, _ = buffer.dispatch(x, idx, zero_copy=True)
    assert buffer.holds(recv.tokens)
    rows = recv.tokens
    rows *= 2  # in place, with a gradient
    rows.sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert buffer.dispatch(x, idx, zero_copy=True)[0].tokens.grad_fn is None


# --- virtual ranks -----------------------------------------------------------------------------


def test_virtual_ranks_launch_once(launches: ModuleType, inputs: tuple) -> None:
    x, idx, weights = inputs

    def program(member: LocalRank) -> Tensor:
        buffer = make_buffer(local=member)
        recv, handle = buffer.dispatch(x, idx, weights)
        return buffer.combine(recv.tokens, handle)[0]

    launches.take_launches()
    LocalRanks(RANKS).run(program)
    told = launches.take_launches()
    assert [one["kernel"] for one in told] == ["route", "dispatch", "combine"]
    assert [one["num_local"] for one in told] == [RANKS] * 3


def test_virtual_ranks_must_agree(launches: ModuleType, inputs: tuple) -> None:
    x, idx, _ = inputs

    def program(member: LocalRank) -> None:
        rows = x if member.rank == 0 else x.half()
        make_buffer(local=member).dispatch(rows, idx, fp8=member.rank == 1)

    message = (
        "expected the same dtype, fp8 and layout on all virtual ranks, got .*'payload': 'as_is'"
    )
    with pytest.raises(ValueError, match=message):
        LocalRanks(RANKS).run(program)
