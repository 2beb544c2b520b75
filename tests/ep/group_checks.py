"""What every rank checks of groups of fixed size, and of weights that come after the rows.

Shapes: R ranks, T tokens of a rank, G local experts, K top-k, n rows of a group, M = G x n rows.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from dualpipe_ext.ep import ExpertMajor
from tests.ep.cases import KINDS, Case, make_case
from tests.ep.rank_checks import (
    LAYOUTS,
    combined,
    expect_equal,
    expect_same_tensor,
    leaf,
    mistake_in_data,
    raises,
    received,
    round_trip_equals_reference,
    scramble,
)
from tests.ep.ranks import Ranks


def groups_equal_reference(ranks: Ranks) -> None:
    """Filled rows come as the reference has them; what the others hold changes no sum."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        cases = {kind: make_case(kind, ranks.num_ranks, dtype=dtype) for kind in KINDS}
        buffer = ranks.make_buffer(cases[KINDS[0]])
        for kind, case in cases.items():
            for rows in {max(1, _fullest(case)), 40}:
                how = {"layout": "expert", "rows_per_expert": rows}
                what = f"{kind} {dtype} {how}"
                x, idx, weights = ranks.inputs(case)
                recv, handle = buffer.dispatch(x, idx, weights, **how)
                want = received(ranks, case, **how)
                assert recv.host_counts is None, what
                expect_equal(_filled(recv), want[ranks.rank], what)
                again, _ = buffer.dispatch(x, handle=handle, rows_per_expert=rows)
                expect_same_tensor(_filled(again).tokens, want[ranks.rank].tokens, f"{what} again")

                outputs = [scramble(r.tokens, seed) for seed, r in enumerate(want)]
                factors = [r.weights for r in want]
                own = _with_nan_where_empty(outputs[ranks.rank], recv).to(ranks.device)
                own_factors = _with_nan_where_empty(factors[ranks.rank], recv).to(ranks.device)
                y, _ = buffer.combine(own, handle, weights=own_factors)
                want_y = combined(ranks, case, outputs, weights=factors, **how)[ranks.rank]
                expect_same_tensor(y, want_y, f"{what} combine")
                _, numbers, _ = buffer.combine_with_weights(own, own_factors, handle)
                expect_same_tensor(numbers, weights.where(idx >= 0, 0), f"{what} weights back")


def fp8_groups_equal_reference(ranks: Ranks) -> None:
    case = make_case("uneven", ranks.num_ranks, dtype=torch.bfloat16, hidden=256)
    buffer = ranks.make_buffer(case)
    how = {"layout": "expert", "rows_per_expert": 30, "fp8": True}
    want = received(ranks, case, **how)[ranks.rank]
    recv, _ = buffer.dispatch(*ranks.inputs(case), **how)
    expect_equal(_filled(recv), want, "FP8 groups")


def too_full_groups_raise_everywhere(ranks: Ranks) -> None:
    """Every rank learns of the fullest group; rows that have room have come."""
    case = make_case("one_expert", ranks.num_ranks, tokens=6)
    buffer = ranks.make_buffer(case)
    rows = 6 * ranks.num_ranks - 1
    how = {"layout": "expert", "rows_per_expert": rows}
    message, recv = mistake_in_data(ranks, buffer, *ranks.inputs(case), **how)
    assert message == (
        f"expected at most rows_per_expert={rows} rows of each expert at rank 0, got {rows + 1}"
    )
    if recv is not None:
        enough = received(ranks, case, layout="expert", rows_per_expert=rows + 1)[ranks.rank]
        assert recv.counts.tolist() == enough.counts.clamp(max=rows).tolist()
        first = slice(int(recv.counts[0]))
        expect_same_tensor(recv.tokens[first], enough.tokens[first], "rows that have room")
    round_trip_equals_reference(ranks, buffer, case, LAYOUTS[1], "after a group too full")


def other_groups_raise_everywhere(ranks: Ranks) -> None:
    """Ranks that ask for groups of different sizes, or only some for groups."""
    if ranks.num_ranks == 1:
        return
    case = make_case("uneven", ranks.num_ranks)
    buffer = ranks.make_buffer(case)
    first = {"rows_per_expert": 40}, "'expert' and 40 rows per expert"
    for others in (
        ({"rows_per_expert": 30}, "'expert' and 30 rows per expert"),
        ({"max_recv_tokens": 200}, "'expert' and 1"),
    ):
        (how, mine), (_, theirs) = (others, first) if ranks.rank else (first, others)
        message, recv = mistake_in_data(ranks, buffer, *ranks.inputs(case), layout="expert", **how)
        # Told by a later call it does not know what it asked for in this one.
        mine = mine if recv is None else "another"
        assert message == (
            f"expected the same layout and alignment on all ranks, got {mine} at rank "
            f"{ranks.rank}, {theirs} at rank {0 if ranks.rank else 1}"
        )
    round_trip_equals_reference(ranks, buffer, case, LAYOUTS[0], "after other groups")


def weights_that_come_late(ranks: Ranks) -> None:
    """They arrive as they would have with the rows; the buffer's other calls are not disturbed."""
    outputs = (*LAYOUTS, {"layout": "token", "max_recv_tokens": 200})
    outputs += ({"layout": "expert", "rows_per_expert": 40},)
    for kind, dtype in itertools.product(("uneven", "masked", "repeated", "all_empty"), _DTYPES):
        case = make_case(kind, ranks.num_ranks, dtype=dtype)
        buffer = ranks.make_buffer(case)
        x, idx, weights = ranks.inputs(case)
        for how, zero_copy in itertools.product(outputs, (False, True)):
            if zero_copy and how["layout"] == "expert":
                continue
            what = f"{kind} {dtype} {how}"
            recv, handle = buffer.dispatch(x, idx, **how, zero_copy=zero_copy)
            before = _bits(recv.tokens).clone()
            late, event = buffer.dispatch_weights(weights, handle)
            event.wait()
            want = received(ranks, case, **how)[ranks.rank]
            if "rows_per_expert" in how:
                late = _filled(replace(recv, weights=late)).weights
            wanted = want.topk_weights if how["layout"] == "token" else want.weights
            expect_same_tensor(late, wanted, what)
            assert torch.equal(_bits(recv.tokens), before), f"{what}: rows that had come before"
            y, _ = buffer.combine(recv.tokens, handle)
            rows = [r.tokens for r in received(ranks, case, **how)]
            shape = {name: how[name] for name in how if name != "max_recv_tokens"}
            want_y = combined(ranks, case, rows, **shape)[ranks.rank]
            expect_same_tensor(y, want_y, f"{what} combine")
            with torch.no_grad():
                out = torch.full_like(y, torch.nan)
                z, _ = buffer.combine(recv.tokens, handle, bias=x, out=out)
            assert z is out, what
            want_z, _ = buffer.combine(recv.tokens, handle, bias=x)
            expect_same_tensor(z, want_z, f"{what} combine into a tensor")
    message = raises(ValueError, buffer.dispatch_weights, weights[:, 1:], handle)
    assert message.startswith("expected topk_weights of shape"), message


def gradients_of_groups(ranks: Ranks) -> None:
    """The bits of the packed layout, whatever lies in rows that nobody writes, either way."""
    case = make_case("uneven", ranks.num_ranks, dtype=torch.bfloat16, hidden=64)
    buffer = ranks.make_buffer(case)
    _, idx, _ = ranks.inputs(case)
    runs = []
    for how in ({}, {"rows_per_expert": 40}):
        x = leaf(case.xs[ranks.rank], ranks.device)
        w = leaf(case.topk_weights[ranks.rank], ranks.device)
        recv, handle = buffer.dispatch(x, idx, w, layout="expert", **how)
        rows = recv.tokens
        if how:
            # As a masked GEMM would: what is not filled is neither read nor given a gradient.
            empty = _empty_rows(recv).to(ranks.device)
            rows = rows.masked_fill(empty.unsqueeze(1), 0)
        y, _ = buffer.combine(torch.sin(3 * rows), handle, weights=recv.weights, bias=x)
        y.float().square().sum().backward()
        runs.append({"y": y, "x.grad": x.grad, "w.grad": w.grad})
    packed, groups = runs
    for name, want in packed.items():
        expect_same_tensor(groups[name], want, name)


_DTYPES = (torch.bfloat16, torch.float64)


def _bits(tensor: Tensor) -> Tensor:
    """Rows that nobody writes hold anything, NaN too, and NaN is not equal to itself."""
    return tensor.view(torch.uint8)


def _fullest(case: Case) -> int:
    """Choices of the expert that has the most."""
    ids = torch.cat(case.topk_idx).flatten()
    return int(torch.bincount(ids[ids >= 0], minlength=1).max())


def _empty_rows(recv: ExpertMajor) -> Tensor:
    """bool [M], on the CPU."""
    counts = recv.counts.cpu()
    place = torch.arange(len(recv.tokens)).view(len(counts), -1)
    return (place - place[:, :1] >= counts.unsqueeze(1)).flatten()


def _filled(recv: ExpertMajor) -> ExpertMajor:
    """With zeros in rows that nobody wrote, on the CPU."""
    empty = _empty_rows(recv)

    def zeroed(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.detach().cpu().clone()
        bits = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        bits[empty] = 0
        return tensor

    return replace(
        recv,
        tokens=zeroed(recv.tokens),
        scales=zeroed(recv.scales),
        weights=zeroed(recv.weights),
    )


def _with_nan_where_empty(tensor: Tensor, recv: ExpertMajor) -> Tensor:
    tensor = tensor.clone()
    tensor[_empty_rows(recv)] = torch.nan
    return tensor
