"""Unequal shares of replicas: every prefix is within the bound, whatever the weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_ext.eplb import Placement, count_experts, select_replicas
from dualpipe_ext.eplb.shares import ONE, pick_replica, share_phase, to_shares


def running_counts(weights: torch.Tensor, num_uses: int, offset: int) -> torch.Tensor:
    """[num_uses, X] uses that each replica has taken after each use."""
    shares = to_shares(weights).expand(num_uses, -1)
    picked = pick_replica(torch.arange(num_uses), shares, phase=share_phase(offset))
    return torch.nn.functional.one_hot(picked, len(weights)).cumsum(0)


@settings(max_examples=150)
@given(
    parts=st.lists(st.sampled_from([0, 1, 2, 5, 100, 4096]), min_size=1, max_size=9).filter(any),
    offset=st.integers(0, 70),
)
def test_every_prefix_is_within_the_bound(parts, offset):
    weights = torch.tensor(parts, dtype=torch.float64) / sum(parts)
    counts = running_counts(weights.float(), 600, offset)
    exact = torch.arange(1, 601)[:, None] * weights
    num_replicas = sum(part > 0 for part in parts)
    bound = (num_replicas - 1) * (0.5 if offset == 0 else 1.0) + 600 * len(parts) / ONE
    assert float((counts - exact).abs().max()) <= bound
    assert not counts[-1, weights == 0].any()


def test_two_halves_take_turns():
    shares = to_shares(torch.tensor([[0.5, 0.5]])).expand(6, 2)
    picked = pick_replica(torch.arange(6), shares, phase=share_phase(0))
    assert picked.tolist() == [0, 1, 0, 1, 0, 1]


def test_ranks_round_differently():
    """Each rank has three uses: rounded alike they would never, or always, reach the last one."""
    weights = torch.tensor([0.85, 0.15])
    by_rank = [running_counts(weights, 3, rank)[-1] for rank in range(8)]
    total = torch.stack(by_rank).sum(0)
    assert float((total - 24 * weights).abs().max()) <= 1
    alike = 8 * running_counts(weights, 3, 0)[-1]
    assert float((alike - 24 * weights).abs().max()) > 3


def test_phases_of_a_power_of_two_ranks_are_all_multiples():
    for ranks in (1, 2, 8, 64):
        phases = sorted(share_phase(rank) for rank in range(ranks))
        start = ONE // 2 if ranks == 1 else 0
        assert phases == [start + i * ONE // ranks for i in range(ranks)]


def test_shares_of_what_others_leave():
    weights = torch.tensor([[0.2, 0.0, 0.6, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    shares = to_shares(weights)
    assert shares.dtype == torch.int32
    torch.testing.assert_close(shares[0] / ONE, torch.tensor([0.2, 0.0, 0.75, 1.0, 0.0]))
    assert shares[0, 3] == ONE
    assert shares[1].tolist() == [ONE, 0, 0, 0, 0]
    # Only proportions count, and what is no number has none.
    strange = torch.tensor([[0.1, float("nan"), 0.3, 0.1, -1.0]])
    torch.testing.assert_close(to_shares(strange)[0] / ONE, shares[0] / ONE)


@pytest.mark.parametrize("offset", [0, 5])
def test_slots_follow_the_split(offset):
    placement = Placement.from_phy2log(torch.tensor([[0, 1, 0, 0, 2, 1]]), 3)
    weights = torch.tensor([[0.125, 0.5, 0.375], [0.75, 0.25, 0.0], [1.0, 0.0, 0.0]])
    generator = torch.Generator().manual_seed(offset)
    topk_idx = torch.randint(-1, 3, (4000, 2), generator=generator)
    maps = placement.log2phy[0], placement.logcnt[0]
    slots = select_replicas(topk_idx, *maps, offset=offset, split=to_shares(weights))
    assert bool(((slots == -1) == (topk_idx == -1)).all())
    kept = topk_idx >= 0
    assert torch.equal(placement.phy2log[0][slots[kept]], topk_idx[kept])
    used, experts = count_experts(slots, 6), count_experts(topk_idx, 3)
    want = experts[placement.phy2log[0]] * torch.tensor([0.125, 0.75, 0.5, 0.375, 1.0, 0.25])
    assert float((used - want).abs().max()) <= 2.01


def test_a_split_that_does_not_fit():
    placement = Placement.identity(1, 3, 4)
    maps = placement.log2phy[0], placement.logcnt[0]
    for bad in (torch.zeros(3, 3, dtype=torch.int32), torch.zeros(3, 2)):
        with pytest.raises(ValueError, match=r"expected a split int32 \[3, 2\], got"):
            select_replicas(torch.tensor([[0]]), *maps, split=bad)
