"""What every rank checks of a transport's forward; run by ``run_ranks`` from test_transports.py.

Every check takes the transport's name and the device.

Shapes: R ranks, T tokens of a rank, H hidden, E experts, K top-k, N token rows, M expert rows.
"""

from __future__ import annotations

import datetime
import itertools
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext.ep import Buffer, quantize, reference
from dualpipe_ext.errors import CommTimeoutError
from tests.ep.cases import KINDS, Case, make_case

LAYOUTS = ({"layout": "token"}, {"layout": "expert"}, {"layout": "expert", "alignment": 4})


def run_checks(transport: str, device: str, checks: Sequence[Callable[[str, str], None]]) -> None:
    """Run checks one after the other on this rank: starting ranks once is most of the time."""
    for check in checks:
        check(transport, device)


def make_buffer(transport: str, case: Case, **options: object) -> Buffer:
    settings = {
        "hidden": case.xs[0].shape[1],
        "num_experts": case.num_experts,
        "top_k": case.top_k,
        "max_tokens": 64,
        "timeout_s": 20.0,
    }
    return Buffer(transport=transport, **{**settings, **options})


def leaf(tensor: Tensor, device: str, needs_grad: bool = True) -> Tensor:
    """A copy: ``to(device)`` alone may return the tensor itself, and gradients would add up."""
    return tensor.to(device, copy=True).requires_grad_(needs_grad)


def expect_equal(got: object, want: object, what: str) -> None:
    """Bit for bit, dtype and shape included, field by field."""
    for name in ("tokens", "scales", "counts", "topk_idx", "topk_weights", "offsets", "weights"):
        a, b = getattr(got, name, None), getattr(want, name, None)
        if a is None or b is None:
            assert a is b, f"{what}: {name} given by one only"
        else:
            expect_same_tensor(a, b, f"{what}: {name}")


def expect_same_tensor(got: Tensor, want: Tensor, what: str) -> None:
    got = got.detach().cpu()
    assert (got.dtype, got.shape) == (want.dtype, want.shape), (
        f"{what}: {got.dtype} {tuple(got.shape)}, want {want.dtype} {tuple(want.shape)}"
    )
    if got.dtype == torch.float8_e4m3fn:
        got, want = got.view(torch.uint8), want.view(torch.uint8)
    assert torch.equal(got, want), f"{what}: {got} is not {want}"


def forward_equals_reference(transport: str, device: str) -> None:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    for kind, dtype, how in itertools.product(KINDS, dtypes, LAYOUTS):
        case = make_case(kind, num_ranks, dtype=dtype)
        what = f"{kind} {dtype} {how}"
        buffer = make_buffer(transport, case)
        x, idx, weights = (t[rank].to(device) for t in (case.xs, case.topk_idx, case.topk_weights))
        recv, handle = buffer.dispatch(x, idx, weights, **how)
        want = reference.dispatch(
            case.xs, case.topk_idx, case.topk_weights, num_experts=case.num_experts, **how
        )
        expect_equal(recv, want[rank], what)

        # Expert outputs that all ranks know: another drawing of the received rows' values.
        outputs = [scramble(r.tokens, seed) for seed, r in enumerate(want)]
        biases = [scramble(x, 50 + seed) for seed, x in enumerate(case.xs)]
        factors = [r.weights for r in want] if how["layout"] == "expert" else None
        for weights_by_rank, biases_by_rank in ((None, None), (factors, biases)):
            y, event = buffer.combine(
                outputs[rank].to(device),
                handle,
                weights=None if weights_by_rank is None else weights_by_rank[rank].to(device),
                bias=None if biases_by_rank is None else biases_by_rank[rank].to(device),
            )
            event.wait()
            want_y = reference.combine(
                outputs,
                case.topk_idx,
                num_experts=case.num_experts,
                weights=weights_by_rank,
                biases=biases_by_rank,
                **how,
            )
            expect_same_tensor(y, want_y[rank], f"{what} combine")


def scramble(like: Tensor, seed: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=gen, dtype=torch.float64).to(like.dtype)


def combine_is_within_rounding(transport: str, device: str) -> None:
    """BF16 against float64: the error is at most what the roundings of the definition can give.

    u = 2^-8 is the unit roundoff of bfloat16. Each rank's part is rounded once and the total once:
    at most u * sum|part| + u * |total| (1 + u) each. Float32 sums of at most K + R terms add less
    than (K + R) * 2^-24 * sum|row * weight|.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    case = make_case("uneven", num_ranks, dtype=torch.bfloat16, hidden=64, max_tokens=32)
    buffer = make_buffer(transport, case)
    recv, handle = buffer.dispatch(
        case.xs[rank].to(device),
        case.topk_idx[rank].to(device),
        case.topk_weights[rank].to(device),
        layout="expert",
    )
    y, _ = buffer.combine(recv.tokens, handle, weights=recv.weights)
    x, w = case.xs[rank].double(), case.topk_weights[rank].double()
    live = (case.topk_idx[rank] >= 0).double()
    exact = x * (w * live).sum(1, keepdim=True)
    magnitude = x.abs() * (w * live).sum(1, keepdim=True)
    bound = magnitude * (2.1 * 2.0**-8 + (case.top_k + num_ranks) * 2.0**-24)
    error = (y.cpu().double() - exact).abs()
    assert (error <= bound).all(), f"largest excess {(error - bound).max()}"


def fp8_equals_reference(transport: str, device: str) -> None:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    for kind, how, pow2 in itertools.product(("uneven", "all_empty"), LAYOUTS, (False, True)):
        case = make_case(kind, num_ranks, dtype=torch.bfloat16, hidden=256)
        buffer = make_buffer(transport, case)
        args = (case.topk_idx[rank].to(device), case.topk_weights[rank].to(device))
        fp8 = {"fp8": True, "pow2_scales": pow2}
        recv, handle = buffer.dispatch(case.xs[rank].to(device), *args, **fp8, **how)
        want = reference.dispatch(
            case.xs,
            case.topk_idx,
            case.topk_weights,
            num_experts=case.num_experts,
            **fp8,
            **how,
        )[rank]
        expect_equal(recv, want, f"fp8 {kind} {how}")
        assert torch.equal(recv.dequantize().detach().cpu(), want.dequantize())

        quantized = quantize(case.xs[rank].to(device), pow2_scales=pow2)
        passed, _ = buffer.dispatch(tuple(quantized), handle=handle, fp8=True)
        expect_same_tensor(passed.tokens, want.tokens, "quantised input")
        expect_same_tensor(passed.scales, want.scales, "quantised input's scales")


def static_output(transport: str, device: str) -> None:
    """``max_recv_tokens``: a fixed number of rows; one too few raises on every rank."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    case = make_case("uneven", num_ranks)
    buffer = make_buffer(transport, case)
    idx, weights = case.topk_idx[rank].to(device), case.topk_weights[rank].to(device)
    x = case.xs[rank].to(device)
    for how in LAYOUTS:
        want = reference.dispatch(
            case.xs,
            case.topk_idx,
            case.topk_weights,
            num_experts=case.num_experts,
            max_recv_tokens=200,
            **how,
        )[rank]
        recv, handle = buffer.dispatch(x, idx, weights, max_recv_tokens=200, **how)
        assert recv.tokens.shape[0] == handle.num_rows == 200
        expect_equal(recv, want, f"static {how}")
        tight, tight_handle = buffer.dispatch(x, idx, **how)
        y_static, _ = buffer.combine(recv.tokens * 3, handle)
        y_tight, _ = buffer.combine(tight.tokens * 3, tight_handle)
        assert torch.equal(y_static, y_tight)

        needed = [
            r.tokens.shape[0]
            for r in reference.dispatch(case.xs, case.topk_idx, num_experts=case.num_experts, **how)
        ]
        # Only the last rank is too tight, and every rank says so.
        bound = needed[-1] - 1 if rank == num_ranks - 1 else needed[rank]
        message = raises(ValueError, buffer.dispatch, x, idx, max_recv_tokens=bound, **how)
        assert message == (
            f"expected at most max_recv_tokens={needed[-1] - 1} rows at rank {num_ranks - 1}, "
            f"got {needed[-1]}"
        )


def raises(kind: type[Exception], fn: object, *args: object, **kwargs: object) -> str:
    try:
        fn(*args, **kwargs)
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} raised")


def bad_ids_raise_everywhere(transport: str, device: str) -> None:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    case = make_case("uneven", num_ranks)
    buffer = make_buffer(transport, case)
    for bad in (case.num_experts, -2, 2**40):
        idx = case.topk_idx[rank].clone()
        if rank == 0:
            idx[0, 1] = bad
        message = raises(ValueError, buffer.dispatch, case.xs[rank].to(device), idx.to(device))
        where = f"{bad} at topk_idx[0, 1]" if rank == 0 else "1 others at rank 0"
        want = f"expected expert ids from -1 to {case.num_experts - 1} in topk_idx, got {where}"
        assert message == want, message
    if num_ranks > 1:
        layout = "token" if rank == 0 else "expert"
        good = (case.xs[rank].to(device), case.topk_idx[rank].to(device))
        message = raises(ValueError, buffer.dispatch, *good, layout=layout)
        assert message.startswith("expected the same layout and alignment on all ranks")
    # The buffer still works.
    buffer.dispatch(case.xs[rank].to(device), case.topk_idx[rank].to(device))


def strided_inputs(transport: str, device: str) -> None:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    case = make_case("uneven", num_ranks)
    buffer = make_buffer(transport, case)
    plain = tuple(t[rank].to(device) for t in (case.xs, case.topk_idx, case.topk_weights))
    # Same values, every second column of a wider tensor, and one element off any alignment.
    strided = tuple(torch.stack([t, t], dim=2).flatten(1)[:, ::2] for t in plain)
    shifted = torch.cat([plain[0].new_zeros(1), plain[0].flatten()])[1:].view(plain[0].shape)
    for how in LAYOUTS:
        want, handle = buffer.dispatch(*plain, **how)
        for inputs in (strided, (shifted, *plain[1:])):
            recv, _ = buffer.dispatch(*inputs, **how)
            expect_equal(recv, _to_cpu(want), f"strided {how}")
        y, _ = buffer.combine(want.tokens, handle)
        transposed = want.tokens.t().contiguous().t()
        assert torch.equal(buffer.combine(transposed, handle)[0], y)


def _to_cpu(recv: object) -> object:
    class Moved:
        pass

    moved = Moved()
    for name in ("tokens", "scales", "counts", "topk_idx", "topk_weights", "offsets", "weights"):
        value = getattr(recv, name, None)
        setattr(moved, name, None if value is None else value.detach().cpu())
    return moved


def many_calls(transport: str, device: str, num_calls: int = 200) -> None:
    """Changing routing, several handles alive, used again and out of order, one rank late."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    first = make_case(KINDS[0], num_ranks)
    buffer = make_buffer(transport, first)
    alive: list = []
    for call in range(num_calls):
        case = make_case(KINDS[call % len(KINDS)], num_ranks, seed=call)
        how = LAYOUTS[call % len(LAYOUTS)]
        if call % 20 == 7 and rank == call % num_ranks:
            time.sleep(0.005)
        x, idx = case.xs[rank].to(device), case.topk_idx[rank].to(device)
        recv, handle = buffer.dispatch(x, idx, **how)
        want = reference.dispatch(case.xs, case.topk_idx, num_experts=case.num_experts, **how)
        expect_equal(recv, want[rank], f"call {call}")
        alive.append((case, handle, recv.tokens))
        if len(alive) == 5:
            # An older handle first, twice; then it goes.
            old_case, old_handle, old_tokens = alive.pop(call % 5)
            again, _ = buffer.dispatch(2 * old_case.xs[rank].to(device), handle=old_handle)
            assert torch.equal(again.tokens, 2 * old_tokens)
            rows = [
                reference.dispatch(
                    old_case.xs,
                    old_case.topk_idx,
                    num_experts=old_case.num_experts,
                    layout=old_handle.layout,
                    alignment=old_handle.alignment,
                )[r].tokens
                for r in range(num_ranks)
            ]
            want_y = reference.combine(
                rows,
                old_case.topk_idx,
                num_experts=old_case.num_experts,
                layout=old_handle.layout,
                alignment=old_handle.alignment,
            )[rank]
            for _ in range(2):
                y, _ = buffer.combine(old_tokens, old_handle)
                expect_same_tensor(y, want_y, f"call {call} combine")


def async_op(transport: str, device: str) -> None:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    case = make_case("uneven", num_ranks)
    buffer = make_buffer(transport, case)
    results = []
    for asynchronous in (False, True):
        x = leaf(case.xs[rank], device)
        recv, handle = buffer.dispatch(
            x, case.topk_idx[rank].to(device), async_op=asynchronous, layout="expert"
        )
        recv.event.wait()
        y, event = buffer.combine(recv.tokens * 2, handle, async_op=asynchronous)
        event.wait()
        y.square().sum().backward()
        results.append((recv.tokens.detach(), y.detach(), x.grad))
        if device == "cpu":
            assert event.done()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def subgroups(transport: str, device: str) -> None:
    """Two groups of two ranks each, interleaved: ranks of the group are not ranks of the world."""
    pairs = ([0, 2], [1, 3])
    groups = [dist.new_group(ranks) for ranks in pairs]
    mine = dist.get_rank() % 2
    rank = dist.get_rank(groups[mine])
    case = make_case("uneven", 2, seed=mine)
    buffer = make_buffer(transport, case, group=groups[mine])
    recv, handle = buffer.dispatch(case.xs[rank].to(device), case.topk_idx[rank].to(device))
    want = reference.dispatch(case.xs, case.topk_idx, num_experts=case.num_experts)
    expect_equal(recv, want[rank], f"group {mine}")
    y, _ = buffer.combine(recv.tokens, handle)
    rows = [r.tokens for r in want]
    want_y = reference.combine(rows, case.topk_idx, num_experts=case.num_experts)
    expect_same_tensor(y, want_y[rank], f"group {mine} combine")


def late_rank(transport: str, device: str) -> str | None:
    """The last rank stays away until the others have given up."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    case = make_case("uneven", num_ranks)
    buffer = make_buffer(transport, case, timeout_s=0.5)
    x, idx = case.xs[rank].to(device), case.topk_idx[rank].to(device)
    buffer.dispatch(x, idx)
    store = dist.distributed_c10d._get_default_store()
    if rank == num_ranks - 1:
        given_up = [f"given up {other}" for other in range(num_ranks - 1)]
        store.wait(given_up, datetime.timedelta(seconds=20))
        return None
    message = raises(CommTimeoutError, buffer.dispatch, x, idx)
    store.set(f"given up {rank}", "")
    return message
