"""Replica gradients: the right sum, the same bits everywhere, and no more traffic than needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import dualpipe_ext.eplb.replica_grads as replica_grads
from dualpipe_ext.eplb import (
    LoadMonitor,
    Placement,
    count_experts,
    migrate_optimizer,
    rebalance_experts,
    reduce_replica_grads,
    select_replicas,
)
from dualpipe_ext.launch import run_ranks
from tests.eplb.ranks import device, needs_ranks, random_map, same_bits

LAYOUT = [
    (torch.float32, (3, 5)),
    (torch.bfloat16, (7,)),
    (torch.float64, ()),
    (torch.float16, (2,)),
]


def test_sum_in_one_process() -> None:
    grad = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    reduce_replica_grads([grad], [0, 1, 0, 0])
    assert grad.tolist() == [[13.0], [2.0], [13.0], [13.0]]


def test_low_precision_is_rounded_once() -> None:
    # In bfloat16 256 + 1 is 256 again, twice; the exact sum 258 has a place of its own.
    grad = torch.tensor([256.0, 1.0, 1.0], dtype=torch.bfloat16)
    reduce_replica_grads([grad], [0, 0, 0])
    assert grad.tolist() == [258.0] * 3


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.ones(3, 2), r"with 4 slots in the first dimension, got torch.float32 \[3, 2\]"),
        (torch.ones(4, 2, dtype=torch.int32), "expected floating-point gradients"),
        (torch.tensor(1.0), r"got torch.float32 \[\]"),
    ],
)
def test_gradients_that_do_not_fit(grad: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reduce_replica_grads([grad], [0, 1, 2, 0])


def sum_random_maps(num_cases: int) -> None:
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(num_ranks)
    for case in range(num_cases):
        per_rank = int(torch.randint(1, 6, (), generator=generator))
        num_slots = num_ranks * per_rank
        num_experts = int(torch.randint(1, num_slots + 1, (), generator=generator))
        phy2log = random_map(num_experts, num_slots, generator)
        mine = slice(rank * per_rank, (rank + 1) * per_rank)
        everyone = [
            torch.randn(num_slots, *shape, generator=generator, dtype=torch.float64).to(dtype)
            for dtype, shape in LAYOUT
        ]
        grads = [grad[mine].clone().to(device()) for grad in everyone]
        reduce_replica_grads(grads, torch.tensor(phy2log), timeout_s=30)
        for grad, shares in zip(grads, everyone, strict=True):
            exact = torch.promote_types(grad.dtype, torch.float32)
            for row, expert in enumerate(phy2log[mine]):
                slots = [s for s, e in enumerate(phy2log) if e == expert]
                in_slot_order = shares[slots[0]].to(exact)
                for slot in slots[1:]:
                    in_slot_order = in_slot_order + shares[slot].to(exact)
                assert same_bits(grad[row], in_slot_order.to(grad.dtype)), (case, phy2log)
                reference = shares[slots].double().sum(0)
                # Rounded once to the gradient's dtype, and once for each addition in float32.
                unit = torch.finfo(grad.dtype).eps + len(slots) * torch.finfo(exact).eps
                bound = unit * shares[slots].double().abs().sum(0)
                assert bool(((grad[row].cpu().double() - reference).abs() <= bound).all())


@pytest.mark.parametrize("num_ranks", [pytest.param(n, marks=needs_ranks(n)) for n in (2, 3, 4)])
def test_sum_in_slot_order_and_against_float64(num_ranks: int) -> None:
    run_ranks(sum_random_maps, num_ranks, 15, run_timeout_s=100)


def test_sums_go_to_the_slots_of_the_next_map() -> None:
    # Expert 0 gives up slot 2 to expert 1, which had slot 1 alone; expert 2 changes its slot.
    grad = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
    reduce_replica_grads([grad], [0, 1, 0, 2, 0], onto=[0, 1, 1, 0, 2])
    assert grad.tolist() == [[21.0], [2.0], [2.0], [21.0], [8.0]]


def test_a_next_map_of_other_experts_is_refused_before_anything_changes() -> None:
    grad = torch.ones(4, 1)
    with pytest.raises(ValueError, match=r"experts \[1\] only in the old and \[2\] only in"):
        reduce_replica_grads([grad], [0, 1, 0, 0], onto=[0, 2, 0, 0])
    with pytest.raises(ValueError, match="same length, got 4 and 5"):
        reduce_replica_grads([grad], [0, 1, 0, 0], onto=[0, 1, 0, 0, 0])
    assert grad.tolist() == [[1.0]] * 4


def sum_onto_random_maps(num_cases: int) -> None:
    """The sums for the next map have the bits of the sums for this one, moved."""
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(num_ranks)
    for case in range(num_cases):
        per_rank = int(torch.randint(1, 6, (), generator=generator))
        num_slots = num_ranks * per_rank
        num_experts = int(torch.randint(1, num_slots + 1, (), generator=generator))
        old, new = (random_map(num_experts, num_slots, generator) for _ in range(2))
        mine = slice(rank * per_rank, (rank + 1) * per_rank)
        everyone = [
            torch.randn(num_slots, *shape, generator=generator, dtype=torch.float64).to(dtype)
            for dtype, shape in LAYOUT
        ]
        grads = [grad[mine].clone().to(device()) for grad in everyone]
        reduce_replica_grads(grads, old, onto=new, timeout_s=30)
        for grad, shares in zip(grads, everyone, strict=True):
            exact = torch.promote_types(grad.dtype, torch.float32)
            for row, expert in enumerate(new[mine]):
                slots = [s for s, e in enumerate(old) if e == expert]
                in_slot_order = shares[slots[0]].to(exact)
                for slot in slots[1:]:
                    in_slot_order = in_slot_order + shares[slot].to(exact)
                assert same_bits(grad[row], in_slot_order.to(grad.dtype)), (case, old, new)


@pytest.mark.parametrize("num_ranks", [pytest.param(n, marks=needs_ranks(n)) for n in (2, 3, 4)])
def test_sums_for_the_next_map_have_the_same_bits(num_ranks: int) -> None:
    run_ranks(sum_onto_random_maps, num_ranks, 15, run_timeout_s=100)


def count_bytes() -> tuple[int, int, int]:
    """Bytes sent and received; calls of the exchange with anything to send in a map of singles."""
    sent = received = idle = 0
    original = replica_grads.exchange

    def counting(sends: Any, receives: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal sent, received, idle
        sent += sum(m.numel() for m in sends.values())
        received += sum(m.numel() for m in receives.values())
        idle += not sends and not receives
        original(sends, receives, *args, **kwargs)

    replica_grads.exchange = counting
    grads = [torch.ones(2, 1024, device=device())]
    # Expert 0 on all three ranks, expert 1 twice on rank 0's neighbour, the others once.
    reduce_replica_grads(grads, [0, 2, 0, 1, 1, 0])
    reduce_replica_grads(grads, [0, 1, 2, 3, 4, 5])
    replica_grads.exchange = original
    return sent, received, idle


@needs_ranks(3)
def test_only_replicated_experts_travel_and_only_to_their_holders() -> None:
    row = 4096
    assert run_ranks(count_bytes, 3, run_timeout_s=60) == [
        (2 * row, 2 * row, 1),
        (3 * row, 3 * row, 1),  # expert 0 to both others, expert 1 to rank 2
        (3 * row, 3 * row, 1),
    ]


NUM_EXPERTS, NUM_SLOTS, TOP_K, STEPS = 6, 8, 2, 12


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs [T, 3], expert ids [T, K]) of all ranks together; expert 0 is always busy."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(64, 3, generator=generator, dtype=torch.float64)
    other = torch.randint(1, NUM_EXPERTS, (64, 1), generator=generator)
    return x, torch.cat([torch.zeros_like(other), other], 1)


def loss_of(weight: torch.Tensor, x: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """Sum over the (token, k) pairs with idx >= 0; weight is [slots or experts, 3]."""
    token, k = (idx >= 0).nonzero(as_tuple=True)
    return (((weight[idx[token, k]] * x[token]).sum(1) - 1.0) ** 2).sum()


def train_with_migration(rebalance_every: int) -> tuple[list[float], int]:
    """Every rank routes its part of the batch; slots are trained where they live."""
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    per_rank = NUM_SLOTS // num_ranks
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    placement = Placement.identity(1, NUM_EXPERTS, NUM_SLOTS)
    table = torch.randn(
        NUM_EXPERTS, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    weight = torch.nn.Parameter(table[placement.phy2log[0, mine]].to(device()))
    optimizer = torch.optim.Adam([weight], lr=0.05)
    monitor = LoadMonitor(1, NUM_EXPERTS, device=device())
    losses, moved = [], 0
    for step in range(STEPS):
        x, idx = (t.to(device()) for t in batch(step))
        maps = placement.to(device())
        parts = [
            select_replicas(part, maps.log2phy[0], maps.logcnt[0], offset=r)
            for r, part in enumerate(idx.chunk(num_ranks))
        ]
        monitor.record(0, count_experts(idx.chunk(num_ranks)[rank], NUM_EXPERTS))
        monitor.step()
        local = torch.cat(parts) - mine.start
        local[(local < 0) | (local >= per_rank)] = -1
        loss = loss_of(weight, x, local)
        loss.backward()
        reduce_replica_grads([weight.grad], placement.phy2log[0], timeout_s=30)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total))
        if rebalance_every and (step + 1) % rebalance_every == 0:
            plan = rebalance_experts(monitor.loads().cpu(), NUM_SLOTS, 1, 1, num_ranks)
            old, placement = placement, Placement(*plan)
            maps_of_layer = old.phy2log[0], placement.phy2log[0]
            report = migrate_optimizer(optimizer, [weight], *maps_of_layer, timeout_s=30)
            moved += report.slots_changed
    return losses, moved


@needs_ranks(2)
@pytest.mark.parametrize("rebalance_every", [0, 3])
def test_training_with_replicas_and_migration_follows_the_plain_run(rebalance_every: int) -> None:
    weight = torch.nn.Parameter(
        torch.randn(NUM_EXPERTS, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    optimizer = torch.optim.Adam([weight], lr=0.05)
    want = []
    for step in range(STEPS):
        loss = loss_of(weight, *batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        want.append(loss.item())
    for losses, moved in run_ranks(train_with_migration, 2, rebalance_every, run_timeout_s=60):
        assert losses == pytest.approx(want, rel=1e-12)
        assert (moved > 0) == (rebalance_every > 0)
    assert want[-1] < 0.8 * want[0]
