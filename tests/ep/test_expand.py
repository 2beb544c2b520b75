"""Layout helpers against the loops of the reference."""

from __future__ import annotations

import torch
from dualpipe_ext.kernels.weighted_rows import filled_rows
from hypothesis import given
from hypothesis import strategies as st

from dualpipe_ext.ep import expand, reference
from tests.ep.strategies import Routing, routings


@given(routings(max_ranks=1), st.integers(1, 4), st.integers(0, 3))
def test_expand_equals_reference(routing: Routing, alignment: int, spare: int) -> None:
    (idx,) = routing.topk_idx
    gen = torch.Generator().manual_seed(0)
    x, w = torch.randn(len(idx), 4, generator=gen), torch.rand(idx.shape, generator=gen)
    how = {"num_experts": routing.num_experts, "layout": "expert", "alignment": alignment}
    (want,) = reference.dispatch([x], [idx], [w], **how)
    num_rows = len(want.tokens) + spare
    m = expand.build_map(idx, want.counts, alignment=alignment, num_rows=num_rows)
    padded_tokens = torch.cat([want.tokens, torch.zeros(spare, 4)])
    padded_weights = torch.cat([want.weights, torch.zeros(spare)])

    assert torch.equal(m.offsets, want.offsets)
    assert m.offsets.dtype == torch.int32
    assert torch.equal(expand.expand(x, m), padded_tokens)
    assert torch.equal(expand.expand_weights(w, m), padded_weights)
    assert torch.equal(expand.collapse_weights(padded_weights, m, len(idx)), w * (idx >= 0))
    (want_y,) = reference.combine([padded_tokens], [idx], weights=[padded_weights], **how)
    assert torch.equal(expand.reduce(padded_tokens, m, len(idx), padded_weights), want_y)
    filled = filled_rows(m.offsets, want.counts, num_rows)
    assert torch.equal(filled.nonzero()[:, 0], m.position.sort().values)


def test_sum_of_a_row_is_in_top_k_order() -> None:
    """2^24 + 1 + 1 in float32 is 2^24 from the left, 2^24 + 2 from the right."""
    big = 2.0**24
    rows = torch.tensor([[1.0], [1.0], [big]])
    counts = torch.ones(3, dtype=torch.int64)
    for choices, want in (([2, 0, 1], big), ([0, 1, 2], big + 2)):
        m = expand.build_map(torch.tensor([choices]), counts)
        assert expand.reduce(rows, m, 1, None).item() == want
