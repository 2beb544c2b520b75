"""The reference has the properties that define dispatch and combine, whatever the routing.

Shapes: R ranks, T tokens of a rank, H hidden (4 here), E experts, K top-k.
"""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dualpipe_ext.ep import reference
from tests.ep.strategies import Routing, routings


def _tokens(routing: Routing) -> list[Tensor]:
    """Every token's row is its own number, in all four columns; small integers stay exact."""
    sizes = [len(idx) for idx in routing.topk_idx]
    numbers = torch.arange(1, sum(sizes) + 1, dtype=torch.float32).split(sizes)
    return [n.unsqueeze(1).expand(-1, 4).contiguous() for n in numbers]


def _weights(routing: Routing) -> list[Tensor]:
    """Multiples of 1/8: sums of their products with small integers are exact in float32."""
    return [(idx.abs() + 1) / 8 + torch.arange(idx.shape[1]) for idx in routing.topk_idx]


@given(routings())
def test_a_token_reaches_each_rank_of_its_experts_once(routing: Routing) -> None:
    xs = _tokens(routing)
    per_rank = routing.num_experts // len(xs)
    received = reference.dispatch(xs, routing.topk_idx, num_experts=routing.num_experts)
    for rank, recv in enumerate(received):
        want = [
            float(x[t, 0])
            for x, idx in zip(xs, routing.topk_idx, strict=True)
            for t in range(len(x))
            if any(e >= 0 and e // per_rank == rank for e in idx[t].tolist())
        ]
        assert recv.tokens[:, 0].tolist() == want


@given(routings())
def test_no_choice_is_lost_or_made_up(routing: Routing) -> None:
    xs, weights = _tokens(routing), _weights(routing)
    received = reference.dispatch(xs, routing.topk_idx, weights, num_experts=routing.num_experts)
    counts = torch.cat([recv.counts for recv in received])
    every = torch.cat([idx.flatten() for idx in routing.topk_idx])
    assert torch.equal(counts, torch.bincount(every[every >= 0], minlength=routing.num_experts))
    arrived = sum(float(recv.topk_weights.sum()) for recv in received)
    live = (float(w[i >= 0].sum()) for w, i in zip(weights, routing.topk_idx, strict=True))
    assert arrived == sum(live)


@given(routings(), st.integers(1, 4))
def test_expert_layout_is_the_token_layout_sorted_by_expert(
    routing: Routing, alignment: int
) -> None:
    xs, weights = _tokens(routing), _weights(routing)
    args = {"num_experts": routing.num_experts}
    by_token = reference.dispatch(xs, routing.topk_idx, weights, **args)
    by_expert = reference.dispatch(
        xs, routing.topk_idx, weights, layout="expert", alignment=alignment, **args
    )
    for rows, groups in zip(by_token, by_expert, strict=True):
        assert torch.equal(rows.counts, groups.counts)
        start = 0
        for expert, (end, count) in enumerate(
            zip(groups.offsets.tolist(), groups.counts.tolist(), strict=True)
        ):
            n, k = (rows.topk_idx == expert).nonzero(as_tuple=True)
            assert end - start == -(-count // alignment) * alignment
            assert torch.equal(groups.tokens[start : start + count], rows.tokens[n])
            assert torch.equal(groups.weights[start : start + count], rows.topk_weights[n, k])
            assert not groups.tokens[start + count : end].any()
            assert not groups.weights[start + count : end].any()
            start = end
        assert start == len(groups.tokens)


@given(routings(), st.integers(0, 3))
def test_groups_of_fixed_size_hold_what_packed_groups_hold(routing: Routing, spare: int) -> None:
    xs, weights = _tokens(routing), _weights(routing)
    how = {"num_experts": routing.num_experts, "layout": "expert"}
    packed = reference.dispatch(xs, routing.topk_idx, weights, **how)
    size = max(1, max(int(r.counts.max()) for r in packed) + spare)
    groups = reference.dispatch(xs, routing.topk_idx, weights, rows_per_expert=size, **how)
    for tight, wide in zip(packed, groups, strict=True):
        assert torch.equal(wide.counts, tight.counts)
        assert wide.offsets.tolist() == [size * (e + 1) for e in range(len(wide.counts))]
        place = torch.arange(size)
        filled = (place < wide.counts.unsqueeze(1)).flatten()
        assert torch.equal(wide.tokens[filled], tight.tokens)
        assert torch.equal(wide.weights[filled], tight.weights)
        assert not wide.tokens[~filled].any()
    ys = [
        reference.combine(
            [r.tokens for r in by_rank],
            routing.topk_idx,
            weights=[r.weights for r in by_rank],
            **how,
            **shape,
        )
        for by_rank, shape in ((packed, {}), (groups, {"rows_per_expert": size}))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*ys, strict=True))


@given(routings())
def test_combine_counts_ranks_in_token_layout(routing: Routing) -> None:
    xs = _tokens(routing)
    per_rank = routing.num_experts // len(xs)
    received = reference.dispatch(xs, routing.topk_idx, num_experts=routing.num_experts)
    ys = reference.combine(
        [r.tokens for r in received], routing.topk_idx, num_experts=routing.num_experts
    )
    for x, idx, y in zip(xs, routing.topk_idx, ys, strict=True):
        ranks = [len({e // per_rank for e in row if e >= 0}) for row in idx.tolist()]
        assert torch.equal(y, x * torch.tensor(ranks).view(-1, 1))


@given(routings(), st.integers(1, 4))
def test_combine_weights_choices_in_expert_layout(routing: Routing, alignment: int) -> None:
    xs, weights = _tokens(routing), _weights(routing)
    how = {"num_experts": routing.num_experts, "layout": "expert", "alignment": alignment}
    received = reference.dispatch(xs, routing.topk_idx, weights, **how)
    ys = reference.combine(
        [r.tokens for r in received],
        routing.topk_idx,
        weights=[r.weights for r in received],
        biases=xs,
        **how,
    )
    for x, idx, w, y in zip(xs, routing.topk_idx, weights, ys, strict=True):
        assert torch.equal(y, x + x * (w * (idx >= 0)).sum(1, keepdim=True))


def test_parts_are_rounded_for_the_wire_and_once_at_the_end() -> None:
    """bfloat16 has 8 bits: 256 + 1 rounds to 256, so where roundings happen can be seen.

    One token with choices on experts 0 and 1 (rank 0) and 2 (rank 1). Rank 0's part is
    round(256 + 1) = 256; had it not been rounded, 257 + 1 = 258 would be the total.
    """
    idx = [torch.tensor([[0, 1, 2]]), torch.empty(0, 3, dtype=torch.int64)]
    rows = [torch.tensor([[256.0], [1.0]]).bfloat16(), torch.tensor([[1.0], [0.0]]).bfloat16()]
    (y, _) = reference.combine([rows[0], rows[1][:1]], idx, num_experts=4, layout="expert")
    assert y.item() == 256.0
    # The bias is added before the last rounding: 256 + 1 + 1.
    (y, _) = reference.combine(
        [rows[0], rows[1][:1]],
        idx,
        num_experts=4,
        layout="expert",
        biases=[torch.ones(1, 1).bfloat16(), torch.empty(0, 1).bfloat16()],
    )
    assert y.item() == 258.0
