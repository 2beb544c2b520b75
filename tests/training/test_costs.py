"""The estimate behind a decision: its units, and that it can come out either way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dualpipe_ext.eplb import Placement, plan_placement
from dualpipe_ext.models import ModelConfig
from dualpipe_ext.training import TrainConfig
from dualpipe_ext.training.costs import expert_seconds, judge

CONFIG = TrainConfig(
    model=ModelConfig(hidden=32, num_heads=2, num_layers=4, expert_hidden=16),
    redundant_experts=4,
    rebalance_every=10,
    batch=16,
    seq_len=32,
)


def test_seconds_in_the_experts_are_operations_over_speed() -> None:
    # 16 x 32 tokens with 4 experts each over 2 ranks; 2 of 4 layers; 3 matrices of 32 x 16; 2
    # operations; 3 passes; 1e10 of them a second.
    want = 16 * 32 * 4 / 2 * 2 * (3 * 32 * 16) * 2 * 3 / 1e10
    assert expert_seconds(CONFIG, "cpu") == pytest.approx(want)
    assert expert_seconds(replace(CONFIG, dtype="bfloat16"), "cuda") < want / 1000


@pytest.mark.parametrize(("expert_bytes", "pays"), [(1000, True), (10**9, False)])
def test_large_experts_stay_where_small_ones_move(expert_bytes: int, pays: bool) -> None:
    loads = torch.ones(4, 16)
    loads[:, 4:8] = 20.0  # all of them on rank 0
    plan = plan_placement(loads, 20, 2, current=Placement.identity(4, 16, 20))
    assert plan.moves > 0
    verdict = judge(plan, CONFIG, expert_bytes=expert_bytes, device_type="cpu")
    assert verdict.pays == pays
    # The fullest rank's bytes over all layers, at 1e9 a second on each of 2 pipeline ranks.
    moved = int(plan.bytes_received(expert_bytes).max())
    assert verdict.cost_s == pytest.approx(moved / 2e9)


def test_a_plan_that_changes_nothing_does_not_pay() -> None:
    loads = torch.ones(4, 16)
    current = plan_placement(loads, 20, 2).placement
    plan = plan_placement(loads, 20, 2, current=current)
    assert not judge(plan, CONFIG, expert_bytes=1, device_type="cpu").pays
