"""A run beside steps without balancing: the same model and data, and figures that add up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dualpipe_ext.launch import run_ranks
from dualpipe_ext.training import TrainConfig, Trainer
from dualpipe_ext.training.compare import (
    WARM_UP,
    Comparison,
    run_unbalanced,
    unbalanced,
    weights_without_replicas,
)
from tests.training.test_trainer import CONFIG, TEXT


def go_on_in_both_ways(
    config: TrainConfig, where: str = "cpu"
) -> tuple[float, float, float, float]:
    """Loss and balance of the step after the run: of the run itself, and without balancing."""
    device = torch.device(where)
    trainer = Trainer(config, TEXT, device=device)
    for _ in range(config.steps):
        trainer.step()
    twin = Trainer(config, TEXT, device=device)
    twin.load_state_dict(trainer.state_dict())
    with_it = twin.step()
    twin.close()
    weights = weights_without_replicas(trainer)
    trainer.close()
    (without,) = run_unbalanced(config, TEXT, weights, steps=1, device=device)
    return with_it.loss, without.loss, with_it.balance, without.balance


@pytest.mark.parametrize(
    "changes",
    [{}, {"schedule": "dualpipe"}, {"dtype": "bfloat16"}],
    ids=["float32", "dualpipe", "bfloat16"],
)
def test_the_comparison_goes_on_from_the_runs_own_weights(changes) -> None:
    # Step 6 ends with experts on their way.
    config = replace(CONFIG, redundant_experts=4, rebalance_every=3, steps=6, **changes)
    tolerance = 1e-2 if config.dtype == "bfloat16" else 1e-5  # other replicas, other roundings
    for with_it, without, balance, unbalance in run_ranks(
        go_on_in_both_ways, 4, config, run_timeout_s=120
    ):
        assert with_it == pytest.approx(without, abs=tolerance)
        assert with_it < 5.3  # the run has learned something
        assert unbalance < balance


def test_figures_leave_out_the_warm_up_and_compare_as_many_steps() -> None:
    run = [{"seconds": s, "balance": 0.9} for s in (9.0, 9.0, 7.0, 1.0, 2.0, 3.0)]
    without = [{"seconds": s, "balance": 0.5} for s in (50.0, 50.0, 4.0, 4.0, 5.0)]
    assert WARM_UP == 2
    found = Comparison.of(run, without)
    assert found.steps == 3
    assert found.balanced_s == pytest.approx({"p20": 1.4, "p50": 2.0, "p80": 2.6})
    assert found.unbalanced_s["p50"] == 4.0
    assert found.speedup == 2.0
    assert (found.balanced, found.unbalanced) == pytest.approx((0.9, 0.5))
    assert found.rows()["speed-up over unbalanced"] == "2.000x"


def test_a_run_of_one_step_has_a_comparison() -> None:
    row = {"seconds": 1.0, "balance": 1.0}
    assert Comparison.of([row], [row] * 3).steps == 1


def test_experts_that_do_not_divide_are_refused() -> None:
    config = replace(
        CONFIG,
        model=replace(CONFIG.model, num_experts=15, num_groups=1, top_groups=1),
        redundant_experts=1,
    )
    with pytest.raises(ValueError, match=r"multiple of 2 expert-parallel ranks, got 15 \+ 0"):
        unbalanced(config)
