"""Both baselines plan as rebalance_experts does, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_ext.bench.eplb_baselines import plan_one_by_one, plan_with_numpy
from dualpipe_ext.eplb import rebalance_experts
from tests.eplb.plan_cases import LOADS, make_loads, shapes

PLANNERS = [plan_with_numpy, plan_one_by_one]


def assert_same_plan(planner, loads, sizes):
    got = planner(loads.numpy(), *sizes)
    for mine, want in zip(got, rebalance_experts(loads, *sizes), strict=True):
        assert mine.dtype == np.int64
        assert torch.equal(torch.from_numpy(mine), want)


@pytest.mark.parametrize("planner", PLANNERS)
@settings(max_examples=200)
@given(
    shape=shapes(max_nodes=4, max_gpus=12, max_experts=48, max_extra=3),
    kind=st.sampled_from(LOADS),
    seed=st.integers(1, 2**31),
)
def test_any_shape(planner, shape, kind, seed):
    num_layers, num_experts, *sizes = shape
    assert_same_plan(planner, make_loads(kind, num_layers, num_experts, seed), sizes)


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("sizes", [(288, 8, 4, 32), (576, 8, 36, 288), (320, 8, 40, 320)])
def test_real_shapes(planner, sizes):
    for kind in ("lognormal", "tokens"):
        assert_same_plan(planner, make_loads(kind, 2, 256, 0), sizes)
