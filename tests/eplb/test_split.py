"""Uneven splits: the fullest GPU against what max-flow finds, and everything that is degenerate."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_ext.eplb import (
    Placement,
    balancedness,
    gpu_loads,
    plan_placement,
    split_replicas,
    synthetic_loads,
)


def best_fullest(loads: list[float], phy2log: list[int], num_gpus: int) -> float:
    """The lowest load of the fullest GPU, by looking at every set of GPUs.

    Min-cut of the network experts -> GPUs (Hall's condition): a limit can be kept if and only if no
    set of GPUs would have to take more from the experts that are nowhere else.
    """
    room = len(phy2log) // num_gpus
    homes = [
        {s // room for s, e in enumerate(phy2log) if e == expert} for expert in range(len(loads))
    ]
    lowest = 0.0
    for size in range(1, num_gpus + 1):
        for gpus in combinations(range(num_gpus), size):
            captive = sum(
                load for load, home in zip(loads, homes, strict=True) if home <= set(gpus)
            )
            lowest = max(lowest, captive / size)
    return lowest


@st.composite
def placements(draw) -> tuple[torch.Tensor, Placement, int]:
    """Loads [L, E], any valid placement of them (an expert twice on a GPU too) and its GPUs."""
    num_gpus = draw(st.integers(1, 6))
    room = draw(st.integers(1, 4))
    num_experts = draw(st.integers(1, num_gpus * room))
    num_layers = draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num_layers):
        extra = torch.randint(num_experts, (num_gpus * room - num_experts,), generator=generator)
        slots = torch.cat([torch.arange(num_experts), extra])
        rows.append(slots[torch.randperm(len(slots), generator=generator)])
    loads = torch.rand(num_layers, num_experts, generator=generator) ** draw(st.integers(0, 6))
    loads *= torch.rand(loads.shape, generator=generator) < draw(st.sampled_from([0.5, 1.0]))
    return 1000 * loads, Placement.from_phy2log(torch.stack(rows), num_experts), num_gpus


@settings(max_examples=200)
@given(case=placements())
def test_reaches_the_optimum_and_proves_it(case):
    loads, placement, num_gpus = case
    split = split_replicas(loads, placement, num_gpus, iterations=300)
    real = torch.arange(placement.log2phy.shape[2]) < placement.logcnt[..., None]
    assert not split.weights[~real].any()
    assert bool((split.weights >= 0).all())
    torch.testing.assert_close(split.weights.sum(2), torch.ones_like(loads), rtol=0, atol=1e-6)

    found = gpu_loads(loads, placement, num_gpus, weights=split.weights)
    torch.testing.assert_close(found.sum(1), loads.sum(1), rtol=1e-5, atol=1e-3)
    after = balancedness(loads, placement, num_gpus, weights=split.weights)
    torch.testing.assert_close(after, split.after, rtol=1e-5, atol=0)
    even = balancedness(loads, placement, num_gpus)
    assert bool((split.after >= even * (1 - 1e-6)).all())
    for layer, experts in enumerate(placement.phy2log.tolist()):
        best = best_fullest(loads[layer].tolist(), experts, num_gpus)
        if best == 0:
            assert (split.after[layer], split.bound[layer]) == (1, 1)
            continue
        optimum = float(loads[layer].sum()) / num_gpus / best
        assert float(split.bound[layer]) >= optimum * (1 - 1e-5)
        assert float(split.after[layer]) <= optimum * (1 + 1e-5)
        assert float(split.after[layer]) >= optimum * (1 - 2e-3)
        assert float(split.gap[layer]) <= 2e-3


def test_example_of_the_docstring():
    placement = Placement.from_phy2log(torch.tensor([[0, 1, 0, 2]]), 3)
    split = split_replicas(torch.tensor([[6, 2, 0]]), placement, 2)
    torch.testing.assert_close(
        split.weights, torch.tensor([[[1 / 3, 2 / 3], [1.0, 0.0], [1.0, 0.0]]])
    )
    torch.testing.assert_close(split.after, torch.ones(1))
    assert split.shares[0, 0].tolist() == pytest.approx([2**24 / 3, 2**24], abs=1)


@pytest.mark.parametrize("policy", ["reference", "balanced"])
@pytest.mark.parametrize(("slots", "gpus"), [(288, 32), (288, 144), (320, 320)])
def test_planned_placements_at_real_size(policy, slots, gpus):
    for kind in ("lognormal", "zipf"):
        loads = synthetic_loads(kind, 4, 256)
        placement = plan_placement(loads, slots, gpus, policy=policy).placement
        split = split_replicas(loads, placement, gpus)
        assert float(split.gap.max()) < 1e-3
        even = balancedness(loads, placement, gpus)
        assert bool((split.after >= even * (1 - 1e-6)).all())


def test_loads_that_have_drifted_are_evened_out():
    loads = synthetic_loads("lognormal", 8, 256, seed=0)
    placement = plan_placement(loads, 288, 32).placement
    drifted = loads * torch.exp(0.3 * torch.randn(loads.shape, generator=torch.manual_seed(0)))
    even = balancedness(drifted, placement, 32)
    split = split_replicas(drifted, placement, 32)
    assert bool((split.after >= even * (1 - 1e-6)).all())
    assert float(split.after.mean()) > float(even.mean()) + 0.08


def test_nothing_to_do():
    identity = Placement.identity(2, 8)
    loads = synthetic_loads("lognormal", 2, 8)
    split = split_replicas(loads, identity, 4)
    assert bool((split.weights == 1).all())
    torch.testing.assert_close(split.after, balancedness(loads, identity, 4))
    torch.testing.assert_close(split.gap, torch.zeros(2), rtol=0, atol=1e-6)
    one_gpu = split_replicas(loads, Placement.identity(2, 8, 11), 1)
    torch.testing.assert_close(one_gpu.after, torch.ones(2))
    empty = split_replicas(torch.zeros(2, 8), Placement.identity(2, 8, 12), 4)
    assert empty.after.tolist() == empty.bound.tolist() == [1, 1]
    assert empty.weights[0, 0].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_only_proportions_count(scale):
    loads = synthetic_loads("lognormal", 2, 16)
    placement = plan_placement(loads, 24, 4).placement
    want, found = (split_replicas(x, placement, 4) for x in (loads, loads * scale))
    torch.testing.assert_close(found.weights, want.weights, rtol=1e-4, atol=1e-4)


def test_bad_input():
    placement = Placement.identity(1, 4, 8)
    with pytest.raises(ValueError, match="at least one iteration, got 0"):
        split_replicas(torch.ones(1, 4), placement, 2, iterations=0)
    with pytest.raises(ValueError, match="divide the 8 slots, got 3"):
        split_replicas(torch.ones(1, 4), placement, 3)
    with pytest.raises(ValueError, match="not negative"):
        split_replicas(torch.tensor([[1.0, -1, 1, 1]]), placement, 2)
    with pytest.raises(ValueError, match=r"weights of shape \[1, 4, 2\], got \[1, 4\]"):
        gpu_loads(torch.ones(1, 4), placement, 2, weights=torch.ones(1, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_same_without_a_wait() -> None:
    loads = synthetic_loads("lognormal", 6, 256)
    placement = plan_placement(loads, 288, 32).placement
    want = split_replicas(loads, placement, 32)
    loads, placement = loads.cuda(), placement.to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [split_replicas(loads, placement, 32) for _ in range(2)]
        shares = [split.shares for split in found]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(*shares)
    torch.testing.assert_close(found[0].after.cpu(), want.after, rtol=1e-4, atol=0)
    torch.testing.assert_close(found[0].bound.cpu(), want.bound, rtol=1e-4, atol=0)
    assert float(found[0].gap.max()) < 1e-3
