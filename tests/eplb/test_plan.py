"""rebalance_experts against a scalar implementation of the same rules, bit for bit."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_ext.eplb import Placement, balancedness, rebalance_experts

README_LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
README_PHY2LOG = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def pack_one_by_one(loads: list[np.float32], num_packs: int) -> list[list[int]]:
    """Rule 3: the items of every pack in order of arrival."""
    room = len(loads) // num_packs
    if room == 1:
        return [[item] for item in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    totals = [np.float32(0)] * num_packs
    for item in sorted(range(len(loads)), key=lambda i: (-loads[i], i)):
        best = None
        for pack in range(num_packs):
            if len(packs[pack]) < room and (best is None or totals[pack] < totals[best]):
                best = pack
        packs[best].append(item)
        totals[best] = np.float32(totals[best] + loads[item])
    return packs


def plan_one_layer(
    loads: list[np.float32], num_slots: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[list[int], list[list[int]]]:
    """The rules for one layer with nothing but loops: (expert of each slot, slots of each expert in
    the order in which they were made)."""
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    size = len(loads) // num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
    group_loads = []
    for group in groups:
        total = np.float32(0)
        for expert in group:
            total = np.float32(total + loads[expert])
        group_loads.append(total)

    phy2log: list[int] = []
    log2phy: list[dict[int, int]] = [{} for _ in loads]
    for node_groups in pack_one_by_one(group_loads, num_nodes):
        experts = [expert for g in node_groups for expert in groups[g]]
        replicas = [(expert, 0) for expert in experts]
        count = dict.fromkeys(experts, 1)
        while len(replicas) < num_slots // num_nodes:
            heaviest = experts[0]
            for expert in experts:
                share = np.float32(loads[expert]) / np.float32(count[expert])
                if share > np.float32(loads[heaviest]) / np.float32(count[heaviest]):
                    heaviest = expert
            replicas.append((heaviest, count[heaviest]))
            count[heaviest] += 1
        shares = [np.float32(loads[e]) / np.float32(count[e]) for e, _ in replicas]
        for gpu in pack_one_by_one(shares, num_gpus // num_nodes):
            for item in gpu:
                expert, number = replicas[item]
                log2phy[expert][number] = len(phy2log)
                phy2log.append(expert)
    return phy2log, [[slots[n] for n in range(len(slots))] for slots in log2phy]


def assert_follows_rules(
    weight: torch.Tensor, num_slots: int, num_groups: int, num_nodes: int, num_gpus: int
) -> None:
    phy2log, log2phy, logcnt = rebalance_experts(weight, num_slots, num_groups, num_nodes, num_gpus)
    for layer, loads in enumerate(weight.float().numpy()):
        want_phy2log, want_log2phy = plan_one_layer(
            list(loads), num_slots, num_groups, num_nodes, num_gpus
        )
        assert phy2log[layer].tolist() == want_phy2log
        assert logcnt[layer].tolist() == [len(slots) for slots in want_log2phy]
        width = log2phy.shape[2]
        assert log2phy[layer].tolist() == [s + [-1] * (width - len(s)) for s in want_log2phy]
    assert log2phy.shape[2] == int(logcnt.max())
    assert (phy2log.dtype, log2phy.dtype, logcnt.dtype) == (torch.int64,) * 3


def test_readme_example() -> None:
    weight = torch.tensor(README_LOADS)
    phy2log, log2phy, logcnt = rebalance_experts(weight, 16, 4, 2, 8)
    assert phy2log.tolist() == README_PHY2LOG
    assert logcnt.sum(1).tolist() == [16, 16]
    assert log2phy[0, 5].tolist() == [0, 2]
    assert log2phy[0, 6].tolist() == [1, -1]
    assert_follows_rules(weight, 16, 4, 2, 8)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int, int, int, int]:
    """(layers, experts, slots, groups, nodes, GPUs) that fit together, both policies."""
    num_nodes = draw(st.integers(1, 4))
    num_gpus = num_nodes * draw(st.integers(1, 4))
    hierarchical = draw(st.booleans())
    num_groups = num_nodes * draw(st.integers(1, 3)) if hierarchical else num_nodes + 1
    num_experts = num_groups * draw(st.integers(1, 5))
    least = -(-num_experts // num_gpus)
    num_slots = num_gpus * draw(st.integers(least, least + 3))
    return draw(st.integers(1, 4)), num_experts, num_slots, num_groups, num_nodes, num_gpus


@settings(max_examples=150)
@given(shape=shapes(), data=st.data())
def test_any_shape_and_ties(shape: tuple[int, ...], data: st.DataObject) -> None:
    num_layers, num_experts, *sizes = shape
    # Few values, so that most loads tie; zero among them, so that some layers are empty.
    values = st.sampled_from([0, 1, 2, 3, 1000, 0.1, 1 / 3])
    row = st.lists(values, min_size=num_experts, max_size=num_experts)
    weight = torch.tensor([data.draw(row) for _ in range(num_layers)], dtype=torch.float32)
    assert_follows_rules(weight, *sizes)


@pytest.mark.parametrize("seed", range(4))
def test_random_loads_of_real_shapes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 64, generator=generator).exp() * 1000
    weight[1] = weight[1].round()
    weight[2] = 0
    for sizes in ((80, 8, 4, 8), (72, 8, 2, 8), (80, 8, 1, 16), (80, 8, 3, 16), (64, 8, 3, 64)):
        assert_follows_rules(weight, *sizes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.int32])
def test_loads_of_any_dtype_become_float32(dtype: torch.dtype) -> None:
    weight = torch.tensor(README_LOADS, dtype=dtype)
    assert rebalance_experts(weight, 16, 4, 2, 8)[0].tolist() == README_PHY2LOG


def test_as_many_gpus_as_slots_is_the_identity() -> None:
    weight = torch.rand(2, 12, generator=torch.Generator().manual_seed(0))
    phy2log, log2phy, logcnt = rebalance_experts(weight, 12, 1, 1, 12)
    assert phy2log.tolist() == [list(range(12))] * 2
    assert log2phy.squeeze(2).tolist() == [list(range(12))] * 2
    assert bool((logcnt == 1).all())


def test_no_load_gives_every_redundant_replica_to_the_first_expert() -> None:
    _, _, logcnt = rebalance_experts(torch.zeros(1, 4), 8, 1, 1, 2)
    assert logcnt.tolist() == [[5, 1, 1, 1]]


def test_without_sync_the_maps_are_the_same_but_wider() -> None:
    weight = torch.tensor(README_LOADS)
    exact = rebalance_experts(weight, 16, 4, 2, 8)
    wide = rebalance_experts(weight, 16, 4, 2, 8, sync=False)
    assert torch.equal(exact[0], wide[0])
    assert torch.equal(exact[2], wide[2])
    assert wide[1].shape == (2, 12, 5)
    assert torch.equal(exact[1], wide[1][..., :2])
    assert bool((wide[1][..., 2:] == -1).all())


def test_without_sync_bad_loads_still_give_a_valid_plan() -> None:
    weight = torch.full((4, 8), 5.0)
    weight[0, 3], weight[1, 3], weight[2, 3] = torch.nan, torch.inf, -1.0
    weight[3] = 3e38
    Placement(*rebalance_experts(weight, 12, 2, 2, 4, sync=False)).validate()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sync", [True, False])
def test_a_gpu_plans_the_same(sync: bool) -> None:
    weight = torch.randn(58, 256, generator=torch.Generator().manual_seed(0)).exp()
    weight[1] = weight[1].round()
    weight[2] = 0
    for sizes in ((288, 8, 4, 32), (288, 8, 18, 144), (320, 8, 40, 320)):
        on_cpu = rebalance_experts(weight, *sizes, sync=sync)
        loads = weight.cuda()
        torch.cuda.set_sync_debug_mode("default" if sync else "error")
        try:
            on_gpu = rebalance_experts(loads, *sizes, sync=sync)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for mine, want in zip(on_gpu, on_cpu, strict=True):
            assert mine.is_cuda
            assert torch.equal(mine.cpu(), want)


def test_published_balance_of_lognormal_loads() -> None:
    rng = np.random.default_rng(0)
    weight = torch.tensor(rng.lognormal(0, 1, (58, 256)) * 1000)
    hierarchical = Placement(*rebalance_experts(weight, 288, 8, 4, 32))
    spread = Placement(*rebalance_experts(weight, 288, 8, 3, 32))  # 3 does not divide 8: global
    assert float(balancedness(weight, hierarchical, 32).mean()) == pytest.approx(0.926, abs=0.01)
    assert float(balancedness(weight, spread, 32).mean()) == pytest.approx(0.996, abs=0.003)


def test_planning_deepseek_v3_takes_milliseconds() -> None:
    weight = torch.rand(58, 256, generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        rebalance_experts(weight, 288, 8, 4, 32)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.25  # about 7 ms alone; the bound leaves room for a busy machine


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
def test_bad_loads(value: float, message: str) -> None:
    weight = torch.ones(2, 4, dtype=torch.float64)
    weight[1, 2] = value
    with pytest.raises(ValueError, match=message):
        rebalance_experts(weight, 4, 1, 1, 2)


@pytest.mark.parametrize(
    ("shape", "sizes", "message"),
    [
        ((12,), (16, 4, 2, 8), r"\[layers, experts\], got \[12\]"),
        ((0, 12), (16, 4, 2, 8), r"got \[0, 12\]"),
        ((2, 12), (8, 4, 2, 8), r"as many slots as experts \(12\), got num_replicas=8"),
        ((2, 12), (17, 4, 2, 8), "multiple of num_gpus=8, got 17; 24 would work"),
        ((2, 12), (24, 8, 2, 8), "multiple of num_groups=8, got 12"),
        ((2, 12), (18, 4, 2, 9), "multiple of num_nodes=2, got 9"),
        ((2, 12), (16, 4, 0, 8), "num_nodes of at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit(
    shape: tuple[int, ...], sizes: tuple[int, int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        rebalance_experts(torch.ones(shape), *sizes)
    assert "\n" not in str(caught.value)


def test_weight_that_is_no_real_tensor() -> None:
    with pytest.raises(ValueError, match="got list"):
        rebalance_experts(README_LOADS, 16, 4, 2, 8)
    with pytest.raises(ValueError, match="real dtype, got torch"):
        rebalance_experts(torch.ones(1, 4, dtype=torch.complex64), 4, 1, 1, 1)
