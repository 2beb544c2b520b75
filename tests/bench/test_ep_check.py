"""The checks accept what the reference computes, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dualpipe_ext.bench.ep_cases import CASES, PUSH_BF16, PUSH_FP8, Case, Inputs, wire_rows
from dualpipe_ext.bench.ep_check import placement, wrong_combine, wrong_dispatch, wrong_push
from dualpipe_ext.ep import Quantized, quantize, reference
from tests.ep.cases import make_case

RANKS, EXPERTS_PER_RANK, TOKENS, TOP_K, HIDDEN = 3, 3, 11, 4, 128
DISPATCHES = [case for case in CASES if case.op == "dispatch"]
COMBINES = [case for case in CASES if case.op == "combine"]


def inputs(rank: int = 0, masked: bool = False) -> Inputs:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(RANKS * TOKENS, HIDDEN, generator=generator).bfloat16()
    scores = torch.rand(RANKS * TOKENS, RANKS * EXPERTS_PER_RANK, generator=generator)
    idx = scores.topk(TOP_K, dim=1).indices
    if masked:
        idx[::2, 1:] = -1
        idx[5] = -1
    weights = torch.rand(RANKS * TOKENS, TOP_K, generator=generator)
    mine = slice(rank * TOKENS, (rank + 1) * TOKENS)
    q = quantize(x)
    own = (x[mine], Quantized(q.values[mine], q.scales[mine]), idx[mine], weights[mine])
    return Inputs(*own, x, q, idx, weights)


def by_rank(tensor: torch.Tensor) -> list[torch.Tensor]:
    return list(tensor.split(TOKENS))


def received(case: Case, given: Inputs, extra_rows: int) -> list:
    options = {"layout": case.layout, "alignment": case.alignment, "fp8": case.fp8}
    args = [by_rank(t) for t in (given.all_x, given.all_idx, given.all_weights)]
    options["num_experts"] = RANKS * EXPERTS_PER_RANK
    most = max(len(r.tokens) for r in reference.dispatch(*args, **options))
    return reference.dispatch(*args, max_recv_tokens=most + extra_rows, **options)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", DISPATCHES, ids=lambda case: case.name)
def test_the_reference_is_right(case: Case, masked: bool) -> None:
    given = inputs(masked=masked)
    for rank, got in enumerate(received(case, given, extra_rows=2)):
        at = placement(given.all_idx, rank, EXPERTS_PER_RANK, case)
        assert wrong_dispatch(got, case, given, at) is None


def flip(tensor: torch.Tensor, *place: int) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(torch.uint8)[place] ^= 1
    return changed


@pytest.mark.parametrize("case", DISPATCHES, ids=lambda case: case.name)
def test_any_changed_bit_is_found(case: Case) -> None:
    given = inputs()
    got = received(case, given, extra_rows=2)[1]
    at = placement(given.all_idx, 1, EXPERTS_PER_RANK, case)
    last = len(got.tokens) - 1  # a row that must be zero
    for row in (0, 7, last):
        wrong = wrong_dispatch(replace(got, tokens=flip(got.tokens, row, 2)), case, given, at)
        assert wrong == f"tokens: 1 of {last + 1} rows differ, the first is row {row}"
    changes = {"counts": got.counts + 1}
    if case.fp8:
        changes["scales"] = flip(got.scales, 3, 1)
    if case.layout == "token":
        changes |= {"topk_idx": got.topk_idx.roll(1, 1), "topk_weights": got.topk_weights * 2}
    else:
        changes |= {"offsets": got.offsets + 1, "weights": got.weights * 2}
    for name, value in changes.items():
        wrong = wrong_dispatch(replace(got, **{name: value}), case, given, at)
        assert wrong is not None
        assert wrong.startswith(name)


def test_rows_missing_or_of_another_dtype() -> None:
    case, given = DISPATCHES[1], inputs()
    got = received(case, given, extra_rows=0)[1]
    at = placement(given.all_idx, 1, EXPERTS_PER_RANK, case)
    fewer = replace(got, tokens=got.tokens[: at.num_rows - 1])
    assert wrong_dispatch(fewer, case, given, at).startswith(f"expected at least {at.num_rows} row")
    other = replace(got, tokens=got.tokens.float())
    assert "expected tokens of torch.bfloat16" in wrong_dispatch(other, case, given, at)


@pytest.mark.parametrize("case", [PUSH_BF16, PUSH_FP8], ids=lambda case: case.name)
def test_pushed_rows(case: Case) -> None:
    given = inputs(rank=1, masked=True)
    at = placement(given.all_idx, 1, EXPERTS_PER_RANK, case)
    source = wire_rows(given.all_quantised if case.fp8 else given.all_x)
    rows = torch.zeros_like(source)
    theirs = at.place.div(TOKENS, rounding_mode="floor") != 1
    rows[: at.num_rows][theirs] = source[at.place[theirs]]
    assert wrong_push(rows, case, given, at, 1) is None
    # A row of a peer, one that stays, and one that nobody has.
    for row in (0, int((~theirs).nonzero()[0]), at.num_rows):
        wrong = wrong_push(flip(rows, row, 3), case, given, at, 1)
        assert wrong == f"1 of {RANKS * TOKENS} rows differ, the first is row {row}"
    assert wrong_push(rows, case, given, at, 0) is not None
    assert "expected rows" in wrong_push(rows[1:], case, given, at, 1)


@pytest.mark.parametrize("kind", ["uneven", "repeated", "masked", "all_dropped", "one_expert"])
@pytest.mark.parametrize("alignment", [1, 4])
def test_placements_of_awkward_routings(kind: str, alignment: int) -> None:
    drawn = make_case(kind, 2, max_tokens=7)
    every_idx, xs = torch.cat(drawn.topk_idx), torch.cat(drawn.xs)
    for layout in ("token", "expert"):
        case = Case("c", "dispatch", layout, alignment=alignment if layout == "expert" else 1)
        want = reference.dispatch(
            drawn.xs,
            drawn.topk_idx,
            num_experts=drawn.num_experts,
            layout=layout,
            alignment=case.alignment,
        )
        for rank in range(2):
            at = placement(every_idx, rank, drawn.num_experts // 2, case)
            rows = torch.where((at.place >= 0)[:, None], xs[at.place.clamp_min(0)], 0)
            assert torch.equal(rows, want[rank].tokens)
            assert torch.equal(at.counts, want[rank].counts)


@pytest.mark.parametrize("case", COMBINES, ids=lambda case: case.name)
def test_combine(case: Case) -> None:
    given = inputs(masked=True)
    every_at = [placement(given.all_idx, r, EXPERTS_PER_RANK, case) for r in range(RANKS)]
    generator = torch.Generator().manual_seed(4)
    most = max(at.num_rows for at in every_at) + 1
    rows = [torch.randn(most, HIDDEN, generator=generator).bfloat16() for _ in range(RANKS)]
    how = {"layout": case.layout, "alignment": case.alignment}
    every_y = reference.combine(
        rows, by_rank(given.all_idx), num_experts=RANKS * EXPERTS_PER_RANK, **how
    )
    for rank, y in enumerate(every_y):
        assert wrong_combine(y, rows, every_at, rank, TOP_K) is None
        for value in (y[3, 5] + 0.2 * rows[0].abs().max(), float("nan")):
            broken = y.clone()
            broken[3, 5] = value
            wrong = wrong_combine(broken, rows, every_at, rank, TOP_K)
            assert wrong == (
                f"1 of {TOKENS} tokens are beyond what rounding can explain, the first is token 3"
            )
        # A rank left out, and another rank's output.
        part = wrong_combine(y, [*rows[:-1], torch.zeros_like(rows[-1])], every_at, rank, TOP_K)
        assert part is not None
        assert wrong_combine(every_y[rank - 1], rows, every_at, rank, TOP_K) is not None
        assert "torch.bfloat16" in wrong_combine(y.float(), rows, every_at, rank, TOP_K)
