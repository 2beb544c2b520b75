"""Placements, replica choice and balancedness."""

from __future__ import annotations

import pytest
import torch

from dualpipe_ext.eplb import (
    Placement,
    balancedness,
    count_experts,
    gpu_loads,
    rebalance_experts,
    select_replicas,
)


def random_placement(seed: int, num_layers: int = 3, num_experts: int = 12) -> Placement:
    weight = torch.rand(num_layers, num_experts, generator=torch.Generator().manual_seed(seed)) ** 4
    return Placement(*rebalance_experts(weight, num_experts + 8, 1, 1, 4))


def test_a_plan_is_a_valid_placement() -> None:
    placement = random_placement(0).validate()
    assert (placement.num_layers, placement.num_experts, placement.num_slots) == (3, 12, 20)


def test_from_phy2log_inverts_the_map() -> None:
    placement = Placement.from_phy2log(torch.tensor([[2, 0, 1, 2], [0, 1, 2, 0]]), 3)
    assert placement.logcnt.tolist() == [[1, 1, 2], [2, 1, 1]]
    assert placement.log2phy.tolist() == [
        [[1, -1], [2, -1], [0, 3]],
        [[0, 3], [1, -1], [2, -1]],
    ]
    placement.validate()


def test_identity() -> None:
    assert Placement.identity(2, 3).phy2log.tolist() == [[0, 1, 2]] * 2
    doubled = Placement.identity(1, 3, 5).validate()
    assert doubled.phy2log.tolist() == [[0, 1, 2, 0, 1]]
    assert doubled.logcnt.tolist() == [[2, 2, 1]]
    with pytest.raises(ValueError, match=r"as many slots as experts \(3\), got 2"):
        Placement.identity(1, 3, 2)


@pytest.mark.parametrize(
    ("phy2log", "message"),
    [
        ([[0, 1, 1]], "got none for expert 2 in layer 0"),
        ([[0, 1, 2], [0, 1, 3]], "from 0 to 2, got 3"),
        ([[0, -1, 2]], "from 0 to 2, got -1"),
    ],
)
def test_maps_that_are_no_placement(phy2log: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement.from_phy2log(torch.tensor(phy2log), 3)


def test_shapes_and_dtypes_that_cannot_belong_together() -> None:
    good = random_placement(0)
    with pytest.raises(ValueError, match="expected logcnt as int64 with 2 dimensions, got"):
        Placement(good.phy2log, good.log2phy, good.logcnt.float())
    with pytest.raises(ValueError, match=r"expected phy2log \[L, S\], log2phy"):
        Placement(good.phy2log[:2], good.log2phy, good.logcnt)
    with pytest.raises(ValueError, match="phy2log as integers"):
        Placement.from_phy2log(torch.zeros(3, dtype=torch.int64), 1)


def test_validate_finds_maps_that_disagree() -> None:
    good = Placement.from_phy2log(torch.tensor([[2, 0, 1, 2]]), 3)
    swapped = good.log2phy.clone()
    swapped[0, 0, 0], swapped[0, 1, 0] = 2, 1
    padded_first = good.log2phy.clone()
    padded_first[0, 0] = torch.tensor([-1, 1])
    count = good.logcnt.clone()
    count[0, 0] = 2
    for maps in ((swapped, good.logcnt), (padded_first, good.logcnt), (good.log2phy, count)):
        with pytest.raises(ValueError, match=r"puts expert 0 of layer 0 into slots \[1\]; got"):
            Placement(good.phy2log, *maps).validate()
    reordered = good.log2phy.clone()
    reordered[0, 2] = torch.tensor([3, 0])
    Placement(good.phy2log, reordered, good.logcnt).validate()


@pytest.mark.parametrize("offset", [0, 1, 5])
def test_tokens_are_spread_evenly_for_any_routing(offset: int) -> None:
    placement = random_placement(1)
    log2phy, logcnt = placement.log2phy[0], placement.logcnt[0]
    generator = torch.Generator().manual_seed(offset)
    # Alternating tokens want experts 0 and 1: spreading by the token's position would fail here.
    skewed = torch.arange(200)[:, None] % 2
    dropped = torch.randint(-1, 12, (257, 4), generator=generator)
    for topk_idx in (skewed, dropped, dropped[:0]):
        slots = select_replicas(topk_idx, log2phy, logcnt, offset=offset)
        assert slots.shape == topk_idx.shape
        assert bool((slots[topk_idx == -1] == -1).all())
        kept = topk_idx >= 0
        assert torch.equal(placement.phy2log[0][slots[kept]], topk_idx[kept])
        used = count_experts(slots, placement.num_slots)
        for expert in range(12):
            per_replica = used[log2phy[expert, : logcnt[expert]]]
            assert int(per_replica.max() - per_replica.min()) <= 1


def test_choice_is_round_robin_from_the_offset() -> None:
    placement = Placement.from_phy2log(torch.tensor([[0, 1, 0, 0]]), 2)
    topk_idx = torch.tensor([[0, 1], [0, -1], [1, 0], [0, 1]], dtype=torch.int32)
    slots = select_replicas(topk_idx, placement.log2phy[0], placement.logcnt[0], offset=1)
    assert slots.dtype == torch.int32
    assert slots.tolist() == [[2, 1], [3, -1], [1, 0], [2, 1]]


def test_ranks_with_their_own_offset_use_all_replicas_alike() -> None:
    placement = Placement.from_phy2log(torch.tensor([[0, 0, 0, 0]]), 1)
    topk_idx = torch.zeros(5, 1, dtype=torch.int64)
    maps = placement.log2phy[0], placement.logcnt[0]
    used = sum(count_experts(select_replicas(topk_idx, *maps, offset=r), 4) for r in range(4))
    assert used.tolist() == [5, 5, 5, 5]


def test_bad_routing() -> None:
    placement = Placement.identity(1, 3)
    maps = placement.log2phy[0], placement.logcnt[0]
    for bad in (3, -2):
        with pytest.raises(ValueError, match=f"expert ids from -1 to 2, got {bad}"):
            select_replicas(torch.tensor([[0, bad]]), *maps)
    with pytest.raises(ValueError, match="of one layer"):
        select_replicas(torch.tensor([[0]]), placement.log2phy, placement.logcnt)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_choice_on_a_gpu_is_the_same_and_waits_for_nothing() -> None:
    placement = random_placement(2)
    log2phy, logcnt = placement.log2phy[1], placement.logcnt[1]
    topk_idx = torch.randint(-1, 12, (999, 4), generator=torch.Generator().manual_seed(0))
    want = select_replicas(topk_idx, log2phy, logcnt, offset=3)
    wrong = topk_idx.clone()
    wrong[5, 2] = 12
    topk_idx, wrong, *maps = (t.cuda() for t in (topk_idx, wrong, log2phy, logcnt))
    torch.cuda.set_sync_debug_mode("error")
    try:
        slots = select_replicas(topk_idx, *maps, offset=3)
        counts = count_experts(slots, 20)
        reported = select_replicas(wrong, *maps, offset=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(slots.cpu(), want)
    assert torch.equal(counts.cpu(), count_experts(want, 20))
    assert int(reported[5, 2]) == 2**31 - 1


def test_gpu_loads_and_balancedness() -> None:
    placement = Placement.from_phy2log(torch.tensor([[0, 1, 0, 2], [0, 1, 2, 2]]), 3)
    loads = torch.tensor([[4, 2, 6], [0, 0, 0]])
    assert gpu_loads(loads, placement, 2).tolist() == [[4, 8], [0, 0]]
    assert balancedness(loads, placement, 2).tolist() == [0.75, 1.0]
    with pytest.raises(ValueError, match="divide the 4 slots, got 3"):
        gpu_loads(loads, placement, 3)
    with pytest.raises(ValueError, match=r"shape \[2, 3\], got \[2, 4\]"):
        balancedness(torch.ones(2, 4), placement, 2)
