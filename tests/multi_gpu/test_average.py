"""The average of the parameters in training between GPUs: experts that move take theirs along."""

from __future__ import annotations

from dataclasses import replace

from dualpipe_ext.launch import run_ranks
from tests.multi_gpu import GRID, RANKS
from tests.training.small_costs import reckon_as_on_a_cpu
from tests.training.test_average import MOVING, move

CONFIG = replace(MOVING, **GRID, dtype="float32")


def averages(config, steps):
    reckon_as_on_a_cpu()
    return move(config, steps, "cuda")


def test_averages_follow_experts_that_move():
    fixed, _ = run_ranks(averages, RANKS, replace(CONFIG, rebalance_every=0), 7, run_timeout_s=300)[
        0
    ]
    results = run_ranks(averages, RANKS, CONFIG, 7, run_timeout_s=300)
    assert sum(moved for _, moved in results) > 0
    moving, _ = results[0]
    assert moving.keys() == fixed.keys()
    for key, average in fixed.items():
        # In float32 a routing choice that is nearly a tie may differ, which moves single experts a
        # little; two experts' averages are about 0.02 apart.
        assert (moving[key] - average[:1]).abs().mean() < 2e-3, key
