"""The vectorised expectation equals the reference."""

from __future__ import annotations

import pytest
import torch

from dualpipe_ext.ep import reference
from tests.ep.cases import KINDS, make_case
from tests.ep.expected import Routes, rank_sum, rows_at

NUM_ROWS = 100


@pytest.mark.parametrize("how", [("token", 1), ("expert", 1), ("expert", 4)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_equals_reference(kind: str, how: tuple[str, int], num_ranks: int) -> None:
    layout, alignment = how
    cases = [make_case(kind, num_ranks, seed=seed, hidden=4) for seed in range(3)]
    most = 7
    idx = torch.full((3, num_ranks, most, cases[0].top_k), -1)
    weights = torch.zeros(idx.shape)
    for c, case in enumerate(cases):
        for r in range(num_ranks):
            idx[c, r, : len(case.xs[r])] = case.topk_idx[r]
            weights[c, r, : len(case.xs[r])] = case.topk_weights[r]
    routes = Routes(cases[0].num_experts, idx, weights)
    options = {"num_experts": cases[0].num_experts, "layout": layout, "alignment": alignment}
    for c, case in enumerate(cases):
        inputs = (case.xs, case.topk_idx, case.topk_weights)
        received = reference.dispatch(*inputs, max_recv_tokens=NUM_ROWS, **options)
        exact = reference.dispatch(*inputs, **options)
        # One row more, which is zero, stands for the empty rows.
        table = torch.zeros(num_ranks * most + 1, 4)
        for r, x in enumerate(case.xs):
            table[r * most : r * most + len(x)] = x
        for rank, want in enumerate(received):
            got = rows_at(routes, rank, layout, alignment, NUM_ROWS)
            assert torch.equal(table[got.source[c]], want.tokens)
            assert torch.equal(got.counts[c], want.counts)
            assert got.num_rows[c] == exact[rank].tokens.shape[0]
            if layout == "token":
                assert torch.equal(got.topk_idx[c], want.topk_idx)
                assert torch.equal(got.weights[c], want.topk_weights)
            else:
                assert torch.equal(got.offsets[c], want.offsets)
                assert torch.equal(got.weights[c], want.weights)
        ones = [torch.full((len(r.tokens), 4), float(i + 1)) for i, r in enumerate(received)]
        factors = [r.weights for r in received] if layout == "expert" else None
        sums = reference.combine(ones, case.topk_idx, weights=factors, **options)
        for rank, want_y in enumerate(sums):
            got_y = rank_sum(routes, rank, layout)[c, : len(want_y)]
            torch.testing.assert_close(got_y, want_y[:, 0])
