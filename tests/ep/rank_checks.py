"""What every rank checks of a transport's forward against the reference, bit for bit.

A check takes the rank's :class:`~tests.ep.ranks.Ranks`, on which kind of ranks it does not depend.

Shapes: R ranks, T tokens of a rank, H hidden, E experts, K top-k, N token rows, M expert rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext.ep import Buffer, quantize, reference
from tests.ep.cases import KINDS, Case, make_case
from tests.ep.ranks import Ranks, has_kernels

LAYOUTS = ({"layout": "token"}, {"layout": "expert"}, {"layout": "expert", "alignment": 4})
FIELDS = ("tokens", "scales", "counts", "topk_idx", "topk_weights", "offsets", "weights")


def leaf(tensor: Tensor, device: str, needs_grad: bool = True) -> Tensor:
    """A copy: ``to(device)`` alone may return the tensor itself, and gradients would add up."""
    return tensor.to(device, copy=True).requires_grad_(needs_grad)


def expect_equal(got: object, want: object, what: str) -> None:
    """Bit for bit, dtype and shape included, field by field."""
    for name in FIELDS:
        a, b = getattr(got, name, None), getattr(want, name, None)
        if a is None or b is None:
            assert a is b, f"{what}: {name} given by one only"
        else:
            expect_same_tensor(a, b, f"{what}: {name}")


def expect_same_tensor(got: Tensor, want: Tensor, what: str) -> None:
    got, want = got.detach().cpu(), want.detach().cpu()
    assert (got.dtype, got.shape) == (want.dtype, want.shape), (
        f"{what}: {got.dtype} {tuple(got.shape)}, want {want.dtype} {tuple(want.shape)}"
    )
    if got.dtype == torch.float8_e4m3fn:
        got, want = got.view(torch.uint8), want.view(torch.uint8)
    if not torch.equal(got, want):
        rows = (got != want).flatten(1).any(1) if got.dim() > 1 else got != want
        bad = rows.nonzero().flatten().tolist()
        raise AssertionError(
            f"{what}: {len(bad)} of {len(rows)} rows differ, the first is {bad[0]}: "
            f"{got[bad[0]]}, want {want[bad[0]]}"
        )


def scramble(like: Tensor, seed: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=gen, dtype=torch.float64).to(like.dtype)


def raises(kind: type[Exception], fn: Callable[..., Any], *args: object, **kwargs: object) -> str:
    try:
        fn(*args, **kwargs)
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} raised")


def received(ranks: Ranks, case: Case, **how: object) -> list[Any]:
    """What the reference delivers, by rank."""
    return ranks.once(
        lambda: reference.dispatch(
            case.xs, case.topk_idx, case.topk_weights, num_experts=case.num_experts, **how
        )
    )


def combined(ranks: Ranks, case: Case, rows: list[Tensor], **how: object) -> list[Tensor]:
    """What the reference brings back, by rank."""
    return ranks.once(
        lambda: reference.combine(rows, case.topk_idx, num_experts=case.num_experts, **how)
    )


def round_trip_equals_reference(
    ranks: Ranks, buffer: Buffer, case: Case, how: dict[str, Any], what: str
) -> None:
    """One dispatch and combines of every form, with rows that all ranks know."""
    rank = ranks.rank
    x, topk_idx, topk_weights = ranks.inputs(case)
    recv, handle = buffer.dispatch(x, topk_idx, topk_weights, **how)
    want = received(ranks, case, **how)
    expect_equal(recv, want[rank], what)
    waits = how.get("max_recv_tokens") is None
    assert recv.host_counts == (want[rank].counts.tolist() if waits else None), what

    # Expert outputs: another drawing of the received rows' values.
    outputs = [scramble(r.tokens, seed) for seed, r in enumerate(want)]
    biases = [scramble(x, 50 + seed) for seed, x in enumerate(case.xs)]
    expert_layout = how["layout"] == "expert"
    factors = [r.weights for r in want] if expert_layout else None
    shape = {"layout": how["layout"], "alignment": how.get("alignment", 1)}
    for weights_by_rank, biases_by_rank in ((None, None), (factors, biases)):
        y, event = buffer.combine(
            outputs[rank].to(ranks.device),
            handle,
            weights=None if weights_by_rank is None else weights_by_rank[rank].to(ranks.device),
            bias=None if biases_by_rank is None else biases_by_rank[rank].to(ranks.device),
        )
        event.wait()
        want_y = combined(
            ranks, case, outputs, weights=weights_by_rank, biases=biases_by_rank, **shape
        )
        extras = "plain" if biases_by_rank is None else "with all extras"
        expect_same_tensor(y, want_y[rank], f"{what} combine {extras}")
        if biases_by_rank is None:
            weights = recv.weights if expert_layout else recv.topk_weights
            rows = outputs[rank].to(ranks.device)
            again, numbers, event = buffer.combine_with_weights(rows, weights, handle)
            event.wait()
            expect_same_tensor(again, want_y[rank], f"{what} combine with weights")
            sent = torch.where(topk_idx >= 0, topk_weights, 0)
            expect_same_tensor(numbers, sent, f"{what} weights that come back")


def forward_equals_reference(ranks: Ranks) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        cases = {kind: make_case(kind, ranks.num_ranks, dtype=dtype) for kind in KINDS}
        buffer = ranks.make_buffer(cases[KINDS[0]])
        for (kind, case), how in itertools.product(cases.items(), LAYOUTS):
            round_trip_equals_reference(ranks, buffer, case, how, f"{kind} {dtype} {how}")


def combine_is_within_rounding(ranks: Ranks) -> None:
    """BF16 against float64: the error is at most what the roundings of the definition can give.

    u = 2^-8 is the unit roundoff of bfloat16. Each rank's part is rounded once and the total once:
    at most u * sum|part| + u * |total| (1 + u) each. Float32 sums of at most K + R terms add less
    than (K + R) * 2^-24 * sum|row * weight|.
    """
    rank, num_ranks = ranks.rank, ranks.num_ranks
    case = make_case("uneven", num_ranks, dtype=torch.bfloat16, hidden=64, max_tokens=32)
    buffer = ranks.make_buffer(case)
    recv, handle = buffer.dispatch(*ranks.inputs(case), layout="expert")
    y, _ = buffer.combine(recv.tokens, handle, weights=recv.weights)
    x, w = case.xs[rank].double(), case.topk_weights[rank].double()
    live = (case.topk_idx[rank] >= 0).double()
    exact = x * (w * live).sum(1, keepdim=True)
    magnitude = x.abs() * (w * live).sum(1, keepdim=True)
    bound = magnitude * (2.1 * 2.0**-8 + (case.top_k + num_ranks) * 2.0**-24)
    error = (y.cpu().double() - exact).abs()
    assert (error <= bound).all(), f"largest excess {(error - bound).max()}"


def fp8_equals_reference(ranks: Ranks) -> None:
    """Values and scales bit for bit; tensors and rows already quantised; fixed outputs too."""
    dtypes = (torch.bfloat16, torch.float32)
    outputs = (*LAYOUTS, *({**how, "max_recv_tokens": 200} for how in LAYOUTS))
    for kind, dtype in itertools.product(("uneven", "all_empty"), dtypes):
        case = make_case(kind, ranks.num_ranks, dtype=dtype, hidden=256, tokens=5)
        for x in case.xs:
            # Blocks without a value, and far from 1: their scales are the awkward ones.
            x *= torch.tensor([[1.0], [0.0], [1e-36], [1e36], [1.0]])[: len(x)]
        buffer = ranks.make_buffer(case)
        x, idx, weights = ranks.inputs(case)
        for how, pow2 in itertools.product(outputs, (False, True)):
            fp8 = {"fp8": True, "pow2_scales": pow2}
            what = f"fp8 {kind} {dtype} {how} pow2={pow2}"
            recv, handle = buffer.dispatch(x, idx, weights, **fp8, **how)
            want = received(ranks, case, **fp8, **how)[ranks.rank]
            expect_equal(recv, want, what)
            expect_same_tensor(recv.dequantize(), want.dequantize(), f"{what} dequantised")

            quantized = quantize(x, pow2_scales=pow2)
            passed, _ = buffer.dispatch(tuple(quantized), handle=handle, fp8=True)
            expect_same_tensor(passed.tokens, want.tokens, f"{what} from quantised input")
            expect_same_tensor(passed.scales, want.scales, f"{what} from quantised input, scales")


def numbers_of_any_bits(ranks: Ranks) -> None:
    """Rows and weights with numbers that have all bits set, alone and next to each other: they come
    as NaN, every other number with its own bits. An empty inbox of "low_latency" looks like them.
    """
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        case = make_case("uneven", ranks.num_ranks, dtype=dtype, hidden=128, tokens=6)
        for rank, numbers in itertools.product(
            range(ranks.num_ranks), (case.xs, case.topk_weights)
        ):
            bits = numbers[rank].view(torch.uint8)
            for row, wide in enumerate((1, 2, 4, 8, 16, 10_000)):
                bits[row, -wide * numbers[rank].element_size() :] = 0xFF
        buffer = ranks.make_buffer(case)
        x, idx, weights = ranks.inputs(case)
        for how in LAYOUTS:
            what = f"{dtype} {how}"
            want = received(ranks, case, **how)[ranks.rank]
            recv, handle = buffer.dispatch(x, idx, weights, **how)
            _expect_same_numbers(recv.tokens, want.tokens, what)
            name = "weights" if how["layout"] == "expert" else "topk_weights"
            got_weights = getattr(recv, name)
            _expect_same_numbers(got_weights, getattr(want, name), f"{what}: {name}")
            y, numbers, _ = buffer.combine_with_weights(recv.tokens, got_weights, handle)
            there = (idx >= 0).any(1, keepdim=True)
            assert torch.equal(y.isnan(), x.isnan() & there), f"{what}: sums"
            _expect_same_numbers(numbers, weights.where(idx >= 0, 0), f"{what}: they come back")
            if dtype == torch.bfloat16:
                values = x.view(torch.uint8)[:, -128:].view(torch.float8_e4m3fn)
                passed, _ = buffer.dispatch((values, weights[:, -1:]), handle=handle, fp8=True)
                again, _ = buffer.dispatch(values.float().bfloat16(), handle=handle)
                _expect_same_numbers(passed.tokens, again.tokens, f"{what}: FP8")


def _expect_same_numbers(got: Tensor, want: Tensor, what: str) -> None:
    """Any NaN is as good as another."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    expect_same_tensor(got.isnan(), want.isnan(), f"{what}, where NaN")
    expect_same_tensor(got.nan_to_num(), want.nan_to_num(), what)


def static_output(ranks: Ranks) -> None:
    """``max_recv_tokens``: a fixed number of rows, also more than could ever arrive."""
    case = make_case("uneven", ranks.num_ranks)
    buffer = ranks.make_buffer(case, max_tokens=7)
    x, idx, weights = ranks.inputs(case)
    for how, room in itertools.product(LAYOUTS, (200, 1000)):
        want = received(ranks, case, max_recv_tokens=room, **how)[ranks.rank]
        recv, handle = buffer.dispatch(x, idx, weights, max_recv_tokens=room, **how)
        assert recv.tokens.shape[0] == handle.num_rows == room
        expect_equal(recv, want, f"static {how} {room}")
        tight, tight_handle = buffer.dispatch(x, idx, **how)
        y_static, _ = buffer.combine(recv.tokens * 3, handle)
        y_tight, _ = buffer.combine(tight.tokens * 3, tight_handle)
        expect_same_tensor(y_static, y_tight, f"static {how} {room} combine")


def mistake_in_data(
    ranks: Ranks, buffer: Buffer, *args: object, **options: object
) -> tuple[str, Any]:
    """The message of a dispatch with wrong data, raised where the transport says that it will be.

    At once, but from ``buffer.check()`` by a transport that does not wait for the device, if the
    output is of a fixed size. There is an output then, which is returned too.
    """
    waits = all(options.get(bound) is None for bound in ("max_recv_tokens", "rows_per_expert"))
    if not has_kernels(buffer) or waits:
        return raises(ValueError, buffer.dispatch, *args, **options), None
    recv, _ = buffer.dispatch(*args, **options)
    ranks.synchronize()
    message = raises(ValueError, buffer.check)
    buffer.check()  # told once
    return message, recv


def too_many_rows_raise_everywhere(ranks: Ranks) -> None:
    rank = ranks.rank
    case = make_case("uneven", ranks.num_ranks)
    buffer = ranks.make_buffer(case)
    for how in LAYOUTS:
        want = received(ranks, case, **how)
        needed = [r.tokens.shape[0] for r in want]
        # Only the last rank is too tight, and every rank says so.
        room = needed[-1] - 1 if ranks.last else needed[rank]
        message, recv = mistake_in_data(
            ranks, buffer, *ranks.inputs(case), max_recv_tokens=room, **how
        )
        assert message == (
            f"expected at most max_recv_tokens={needed[-1] - 1} rows at rank "
            f"{ranks.num_ranks - 1}, got {needed[-1]}"
        )
        if recv is not None:
            kept = want[rank].tokens[:room]
            expect_same_tensor(recv.tokens, kept, f"rows that have room, {how}")
        round_trip_equals_reference(ranks, buffer, case, how, f"after too many rows, {how}")


def bad_ids_raise_everywhere(ranks: Ranks) -> None:
    rank = ranks.rank
    case = make_case("uneven", ranks.num_ranks)
    buffer = ranks.make_buffer(case)
    limits = f"expected expert ids from -1 to {case.num_experts - 1} in topk_idx, got "
    others = f"{limits}1 others at rank 0"
    for bad, how in itertools.product((case.num_experts, -2, 2**40, -(2**63)), LAYOUTS):
        x, idx, weights = ranks.inputs(_with_id(case, bad))
        for room in (None, 200):
            message, recv = mistake_in_data(
                ranks, buffer, x, idx, weights, max_recv_tokens=room, **how
            )
            here = f"{limits}{bad} at topk_idx[0, 1]"
            if rank != 0:
                wanted = {others}
            elif not has_kernels(buffer):
                wanted = {here}
            else:
                # Who waits for the device anyhow may look for the place.
                wanted = {here, others} if room is None else {others}
            assert message in wanted, f"{bad} {how} room {room}: {message!r} is not in {wanted}"
            if recv is not None:
                want = received(ranks, _with_id(case, -1), max_recv_tokens=room, **how)[rank]
                expect_equal(recv, want, f"the choices that are left, {bad} {how}")
        round_trip_equals_reference(ranks, buffer, case, how, f"after bad id {bad}, {how}")


def _with_id(case: Case, expert: int) -> Case:
    """The case with another second choice of rank 0's first token."""
    first, *others = case.topk_idx
    first = first.clone()
    first[0, 1] = expert
    return replace(case, topk_idx=[first, *others])


def other_settings_raise_everywhere(ranks: Ranks) -> None:
    """Ranks that ask for different layouts."""
    if ranks.num_ranks == 1:
        return
    case = make_case("uneven", ranks.num_ranks)
    buffer = ranks.make_buffer(case)
    settings = [({"layout": "expert"}, {"layout": "token"})]
    settings.append(({"layout": "expert", "alignment": 2}, {"layout": "expert", "alignment": 4}))
    for first, rest in settings:
        how = first if ranks.rank == 0 else rest
        message = raises(ValueError, buffer.dispatch, *ranks.inputs(case), **how)
        assert message.startswith("expected the same layout"), message
    round_trip_equals_reference(ranks, buffer, case, LAYOUTS[0], "after other settings")


def strided_inputs(ranks: Ranks) -> None:
    case = make_case("uneven", ranks.num_ranks)
    buffer = ranks.make_buffer(case)
    plain = ranks.inputs(case)
    # Same values, every second column of a wider tensor, and one element off any alignment.
    strided = tuple(torch.stack([t, t], dim=2).flatten(1)[:, ::2] for t in plain)
    shifted = tuple(torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in plain)
    for how in LAYOUTS:
        want, handle = buffer.dispatch(*plain, **how)
        for name, inputs in (("strided", strided), ("shifted", shifted)):
            recv, _ = buffer.dispatch(*inputs, **how)
            expect_equal(recv, want, f"{name} {how}")
        y, _ = buffer.combine(want.tokens, handle)
        transposed = want.tokens.t().contiguous().t()
        expect_same_tensor(buffer.combine(transposed, handle)[0], y, f"transposed rows {how}")


def same_bits_every_time(ranks: Ranks) -> None:
    """Same inputs, same bits: forward and backward, where the sums are rounded."""
    case = make_case("repeated", ranks.num_ranks, dtype=torch.bfloat16, hidden=256, tokens=40)
    buffer = ranks.make_buffer(case)
    _, idx, _ = ranks.inputs(case)
    for how in LAYOUTS:
        runs = []
        for _ in range(3):
            x = leaf(case.xs[ranks.rank], ranks.device)
            w = leaf(case.topk_weights[ranks.rank], ranks.device)
            recv, handle = buffer.dispatch(x, idx, w, **how)
            rows = torch.sin(3 * recv.tokens)
            weights = recv.weights if how["layout"] == "expert" else None
            y, _ = buffer.combine(rows, handle, weights=weights, bias=x)
            y.float().square().sum().backward()
            runs.append((recv.tokens.detach(), y.detach(), x.grad, w.grad))
        for i, again in enumerate(runs[1:]):
            for name, a, b in zip(("recv", "y", "x.grad", "w.grad"), again, runs[0], strict=True):
                assert (a is None) == (b is None), f"run {i + 1} {how}: {name}"
                if a is not None:
                    expect_same_tensor(a, b, f"run {i + 1} {how}: {name}")


def async_op(ranks: Ranks) -> None:
    case = make_case("uneven", ranks.num_ranks)
    buffer = ranks.make_buffer(case)
    _, idx, _ = ranks.inputs(case)
    results = []
    for asynchronous in (False, True):
        x = leaf(case.xs[ranks.rank], ranks.device)
        recv, handle = buffer.dispatch(x, idx, async_op=asynchronous, layout="expert")
        recv.event.wait()
        y, event = buffer.combine(recv.tokens * 2, handle, async_op=asynchronous)
        event.wait()
        y.square().sum().backward()
        results.append((recv.tokens.detach(), y.detach(), x.grad))
        if ranks.device == "cpu":
            assert event.done()
    for name, a, b in zip(("recv", "y", "x.grad"), *results, strict=True):
        expect_same_tensor(b, a, f"async_op: {name}")


def subgroups(ranks: Ranks) -> None:
    """Two groups of two ranks each, interleaved: ranks of the group are not ranks of the world."""
    pairs = ([0, 2], [1, 3])
    groups = [dist.new_group(members) for members in pairs]
    mine = ranks.rank % 2
    rank = dist.get_rank(groups[mine])
    case = make_case("uneven", 2, seed=mine)
    buffer = ranks.make_buffer(case, group=groups[mine])
    x, idx = case.xs[rank].to(ranks.device), case.topk_idx[rank].to(ranks.device)
    recv, handle = buffer.dispatch(x, idx)
    want = reference.dispatch(case.xs, case.topk_idx, num_experts=case.num_experts)
    expect_equal(recv, want[rank], f"group {mine}")
    y, _ = buffer.combine(recv.tokens, handle)
    rows = [r.tokens for r in want]
    want_y = reference.combine(rows, case.topk_idx, num_experts=case.num_experts)
    expect_same_tensor(y, want_y[rank], f"group {mine} combine")


def mistakes_of_one_call(ranks: Ranks) -> None:
    """What can be seen without the data is refused at once, and the buffer works on."""
    case = make_case("uneven", ranks.num_ranks, dtype=torch.bfloat16)
    buffer = ranks.make_buffer(case)
    x, idx, weights = ranks.inputs(case)
    recv, handle = buffer.dispatch(x, idx, weights)
    elsewhere = "cpu" if ranks.device == "cuda" else "meta"
    calls = {
        "topk_idx elsewhere": (buffer.dispatch, (x, idx.to(elsewhere)), {}),
        "weights elsewhere": (buffer.dispatch, (x, idx, weights.to(elsewhere)), {}),
        "rows elsewhere": (buffer.combine, (recv.tokens.to(elsewhere), handle), {}),
    }
    if has_kernels(buffer):
        wide = recv.tokens.double()
        calls["x and topk_idx elsewhere"] = (
            buffer.dispatch,
            (x.to(elsewhere), idx.to(elsewhere)),
            {},
        )
        calls["x elsewhere"] = (buffer.dispatch, (x.to(elsewhere),), {"handle": handle})
        calls["wide x"] = (buffer.dispatch, (x.float(), idx), {})
        calls["wide x, cached"] = (buffer.dispatch, (x.double(),), {"handle": handle})
        calls["wide rows"] = (buffer.combine, (wide, handle), {})
    for name, (call, args, options) in calls.items():
        message = raises(ValueError, call, *args, **options)
        assert message.startswith("expected "), f"{name}: {message}"
        assert "got" in message, f"{name}: {message}"
        assert "\n" not in message, f"{name}: {message}"
        word = "at most" if "wide" in name else elsewhere
        assert word in message, f"{name}: {message}"
    round_trip_equals_reference(ranks, buffer, case, LAYOUTS[0], "after refused calls")
