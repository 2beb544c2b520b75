"""The planner kernel on a GPU: the CPU planner's maps bit for bit, without waiting for the host."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_ext import core
from dualpipe_ext.eplb import Placement, on_device, plan_placement, rebalance_experts
from dualpipe_ext.eplb.balanced import Sizes
from tests.eplb.plan_cases import LOADS, make_loads, shapes

# experts, then slots, groups, nodes, GPUs; the first four are those of DeepSeek-V3.
TABLE = [
    (256, (288, 8, 4, 32)),
    (256, (288, 8, 18, 144)),
    (256, (576, 8, 36, 288)),
    (256, (320, 8, 40, 320)),
    (256, (320, 1, 1, 64)),
    (160, (480, 1, 1, 160)),
    (300, (320, 1, 1, 8)),
    (64, (96, 64, 2, 16)),
    (1, (2048, 1, 1, 1)),
    (1024, (2048, 1, 1, 512)),
    (1024, (2048, 512, 512, 512)),
    (1024, (2048, 1024, 2, 512)),
    (1024, (2048, 1024, 4, 8)),
]


def assert_same(got, want):
    for mine, theirs in zip(got, want, strict=True):
        assert mine.is_cuda
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine.cpu(), theirs)


def assert_planned_as_on_the_cpu(loads, sizes):
    """Both ways to ask; the second one must not wait for the GPU."""
    assert_same(rebalance_experts(loads.cuda(), *sizes), rebalance_experts(loads, *sizes))
    assert_same(plan_without_waiting(loads.cuda(), sizes),
                rebalance_experts(loads, *sizes, sync=False))  # fmt: skip


def plan_without_waiting(on_gpu, sizes):
    torch.cuda.set_sync_debug_mode("error")
    try:
        return rebalance_experts(on_gpu, *sizes, sync=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_kernel_is_what_plans():
    assert core.available(), core.why_unavailable()
    assert on_device.usable(torch.device("cuda"), 1024, Sizes(2048, 1, 1, 512))


@settings(max_examples=2000)
@given(
    shape=shapes(max_nodes=8, max_gpus=96, max_experts=320, max_extra=3),
    kind=st.sampled_from(LOADS),
    seed=st.integers(1, 2**31),
)
def test_any_shape(shape, kind, seed):
    num_layers, num_experts, *sizes = shape
    assert_planned_as_on_the_cpu(make_loads(kind, num_layers, num_experts, seed), sizes)


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.parametrize(("num_experts", "sizes"), TABLE)
def test_real_shapes_and_limits(num_experts, sizes, kind):
    loads = make_loads(kind, 61 if num_experts <= 320 else 2, num_experts, 1)
    assert_planned_as_on_the_cpu(loads, sizes)


@pytest.mark.parametrize(
    ("num_experts", "sizes"),
    [
        (1025, (2050, 1, 1, 2)),  # experts
        (1000, (2052, 1, 1, 4)),  # slots
        (513, (1026, 1, 1, 513)),  # GPUs
    ],
)
def test_beyond_the_limits_the_result_is_the_same(num_experts, sizes):
    assert not on_device.usable(torch.device("cuda"), num_experts, Sizes(*sizes))
    assert_planned_as_on_the_cpu(make_loads("lognormal", 1, num_experts, 0), sizes)


def test_more_layers_than_a_grid_has_rows():
    loads = make_loads("tokens", 70_000, 4, 0)
    assert_planned_as_on_the_cpu(loads, (8, 2, 2, 4))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.bfloat16])
def test_loads_of_any_dtype_and_stride(dtype):
    loads = make_loads("tokens", 12, 64, 0).to(dtype).t().contiguous().t()
    assert not loads.is_contiguous()
    assert_planned_as_on_the_cpu(loads, (80, 8, 4, 16))


def test_as_without_the_core(monkeypatch):
    loads = make_loads("tokens", 3, 64, 0)
    sizes = (80, 8, 4, 16)
    monkeypatch.setattr(core, "_load", lambda: (None, "it was not built"))
    assert_planned_as_on_the_cpu(loads, sizes)


def test_a_graph_follows_the_loads():
    sizes = (288, 8, 4, 32)
    loads = make_loads("lognormal", 58, 256, 0)
    on_gpu = loads.cuda()
    plan_without_waiting(on_gpu, sizes)  # loads the kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        maps = rebalance_experts(on_gpu, *sizes, sync=False)
    for seed in range(3):
        loads = make_loads("lognormal", 58, 256, seed)
        on_gpu.copy_(loads)
        for tensor in maps:
            tensor.fill_(-77)
        graph.replay()
        assert_same(maps, rebalance_experts(loads, *sizes, sync=False))


def test_on_a_side_stream_behind_the_loads():
    sizes = (320, 8, 40, 320)
    loads = make_loads("lognormal", 61, 256, 7)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # the loads arrive late
        on_gpu = loads.to("cuda", non_blocking=True)
        maps = rebalance_experts(on_gpu, *sizes, sync=False)
    stream.synchronize()
    assert_same(maps, rebalance_experts(loads, *sizes, sync=False))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1.0, "got -1.0 for expert 2 of layer 1"),
        (float("nan"), "got nan for expert 2 of layer 1"),
        (float("inf"), "got inf for expert 2 of layer 1"),
        (1e300, "finite in float32"),
        (3e38, "sum to at most 1e\\+38"),
    ],
)
@pytest.mark.parametrize("sizes", [(16, 1, 1, 4), (16, 4, 2, 4)])
def test_bad_loads(value, message, sizes):
    weight = torch.ones(2, 8, dtype=torch.float64, device="cuda")
    weight[1, 2] = value
    with pytest.raises(ValueError, match=message):
        rebalance_experts(weight, *sizes)
    # Without checks: the CPU's clamped loads, and a valid plan.
    want = rebalance_experts(weight.cpu(), *sizes, sync=False)
    assert_same(plan_without_waiting(weight, sizes), want)
    Placement(*want).validate()


def test_large_loads_that_are_valid_are_not_refused():
    loads = torch.ones(2, 8)
    loads[1, 2] = 0.9e38
    assert_planned_as_on_the_cpu(loads, (16, 1, 1, 4))


def test_one_load_may_be_the_whole_limit():
    loads = torch.zeros(1, 8)
    loads[0, 2] = 1e38
    maps = rebalance_experts(loads.cuda(), 16, 1, 1, 4)
    assert_same(maps, rebalance_experts(loads, 16, 1, 1, 4))


def test_replica_ranks():
    loads = make_loads("lognormal", 4, 64, 0).cuda()
    maps, width = on_device.plan_checked(loads, loads, Sizes(96, 8, 2, 16))
    _, log2phy, logcnt = rebalance_experts(loads, 96, 8, 2, 16)
    assert width == int(logcnt.max())
    slots = torch.arange(96, device="cuda").expand_as(maps.phy2log)
    cells = maps.phy2log * width + maps.replica
    assert torch.equal(log2phy.flatten(1).gather(1, cells), slots)


@pytest.mark.parametrize("policy", ["reference", "balanced"])
def test_placement_plans_are_the_cpu_s(policy):
    loads = make_loads("lognormal", 2, 32, 0)
    current = Placement.identity(2, 32, 40)
    options = {"policy": policy, "num_groups": 4, "num_nodes": 2}
    on_cpu = plan_placement(loads, 40, 8, current=current, **options)
    on_gpu = plan_placement(loads.cuda(), 40, 8, current=current.to("cuda"), **options)
    assert_same(
        (on_gpu.placement.phy2log, on_gpu.placement.log2phy, on_gpu.placement.logcnt),
        (on_cpu.placement.phy2log, on_cpu.placement.log2phy, on_cpu.placement.logcnt),
    )
    assert on_gpu.moves == on_cpu.moves
