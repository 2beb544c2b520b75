"""PlacementPlan, should_rebalance, and what is counted as a move."""

from __future__ import annotations

import math

import pytest
import torch

from dualpipe_ext.eplb import (
    Placement,
    balancedness,
    plan_moves,
    plan_placement,
    rebalance_experts,
    should_rebalance,
    synthetic_loads,
)
from dualpipe_ext.eplb.moves import experts_received, keep_slots, rename_gpus


def test_a_plan_says_what_it_is() -> None:
    loads = synthetic_loads("lognormal", 3, 32)
    current = Placement.identity(3, 32, 40)
    plan = plan_placement(loads, 40, 8, num_groups=4, num_nodes=2, current=current)
    plan.placement.validate()
    assert torch.equal(plan.after, balancedness(loads, plan.placement, 8))
    assert torch.equal(plan.before, balancedness(loads, current, 8))
    assert bool((plan.after <= plan.bound * (1 + 1e-6)).all())
    assert bool((plan.after > plan.before).all())
    torch.testing.assert_close(plan.gap, 1 - plan.after / plan.bound)
    assert plan.moves == int(plan.received.sum()) > 0
    assert plan.bytes_received(10).tolist() == (plan.received.sum(0) * 10).tolist()


def test_policies() -> None:
    loads = synthetic_loads("zipf", 2, 16)
    reference = plan_placement(loads, 24, 4, policy="reference")
    assert torch.equal(reference.placement.phy2log, rebalance_experts(loads, 24, 1, 1, 4)[0])
    balanced = plan_placement(loads, 24, 4)
    want = rebalance_experts(loads, 24, 1, 1, 4, policy="balanced")
    assert torch.equal(balanced.placement.phy2log, want[0])
    assert torch.equal(balanced.placement.log2phy, want[1])
    assert (balanced.before, balanced.received, balanced.moves) == (None, None, 0)


def test_received_is_what_migrate_would_send() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        old, new = (
            torch.cat([torch.arange(6), torch.randint(6, (6,), generator=generator)])[
                torch.randperm(12, generator=generator)
            ]
            for _ in range(2)
        )
        want = [0] * 3
        for move in plan_moves(old.tolist(), new.tolist(), 3):
            if move.src_slot // 4 != move.dst_slots[0] // 4:
                want[move.dst_slots[0] // 4] += 1
        assert experts_received(old[None], new[None], 3)[0].tolist() == want


def test_keep_slots_example() -> None:
    old = torch.tensor([[4, 1, 7, 2, 2, 3]])
    new = torch.tensor([[7, 5, 4, 3, 2, 6]])
    assert keep_slots(old, new, 2).tolist() == [[4, 5, 7, 2, 6, 3]]


def test_rename_gpus_finds_where_everything_was() -> None:
    old = torch.stack([torch.randperm(24) for _ in range(5)])
    order = torch.stack([torch.randperm(6) for _ in range(5)])
    new = old.view(5, 6, 4).gather(1, order[..., None].expand(5, 6, 4)).flatten(1)
    assert torch.equal(rename_gpus(old, new, 6, 24), old)


def test_should_rebalance_weighs_seconds() -> None:
    loads = torch.tensor([[3.0, 3.0, 1.0, 1.0]])
    plan = plan_placement(loads, 4, 2, current=Placement.identity(1, 4))
    assert (float(plan.before[0]), float(plan.after[0])) == (pytest.approx(2 / 3), 1.0)
    assert plan.received.tolist() == [[1, 1]]
    costs = {"expert_s": 0.1, "expert_bytes": 2000, "bytes_per_s": 1000.0, "overhead_s": 0.5}
    verdict = should_rebalance(plan, steps=100, **costs)
    assert verdict.saved_s == pytest.approx(100 * 0.1 * 0.5)
    assert verdict.cost_s == pytest.approx(2.5)
    assert verdict.steps_to_pay == pytest.approx(50)
    assert verdict.pays
    assert not should_rebalance(plan, steps=49, **costs).pays


def test_a_plan_that_changes_nothing_does_not_pay() -> None:
    loads = synthetic_loads("lognormal", 2, 16)
    current = plan_placement(loads, 24, 4).placement
    plan = plan_placement(loads, 24, 4, current=current)
    costs = {"expert_s": 1.0, "expert_bytes": 1, "bytes_per_s": 1.0, "overhead_s": 9.0}
    verdict = should_rebalance(plan, steps=10, **costs)
    assert (verdict.saved_s, verdict.cost_s, verdict.steps_to_pay) == (0.0, 0.0, math.inf)
    assert not verdict.pays


def test_mistakes() -> None:
    loads = torch.ones(2, 8)
    with pytest.raises(ValueError, match="policy of reference, balanced, got 'best'"):
        plan_placement(loads, 8, 2, policy="best")
    with pytest.raises(ValueError, match="policy of reference, balanced, got 'best'"):
        rebalance_experts(loads, 8, 1, 1, 2, policy="best")
    with pytest.raises(ValueError, match="sync=True"):
        rebalance_experts(loads, 8, 1, 1, 2, policy="balanced", sync=False)
    with pytest.raises(ValueError, match="tolerance"):
        plan_placement(loads, 8, 2, tolerance=1.0)
    with pytest.raises(ValueError, match="2 layers, 8 experts and 8 slots, got 1, 8 and 8"):
        plan_placement(loads, 8, 2, current=Placement.identity(1, 8))
    with pytest.raises(ValueError, match="as many slots as experts"):
        plan_placement(loads, 6, 2)
    plan = plan_placement(loads, 8, 2)
    costs = {"expert_s": 1.0, "steps": 1, "expert_bytes": 1, "bytes_per_s": 1.0}
    with pytest.raises(ValueError, match="current="):
        should_rebalance(plan, **costs)
    with pytest.raises(ValueError, match="current="):
        plan.bytes_received(1)
    plan = plan_placement(loads, 8, 2, current=plan.placement)
    for name in costs:
        with pytest.raises(ValueError, match=f"{name} to be finite and positive, got -1"):
            should_rebalance(plan, **{**costs, name: -1})
