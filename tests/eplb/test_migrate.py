"""Migration: bit for bit where it succeeds, untouched tensors on every rank where it does not."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dualpipe_ext.eplb import (
    MigrationReport,
    Move,
    migrate,
    migrate_optimizer,
    plan_moves,
    transfer,
)
from dualpipe_ext.errors import CommTimeoutError, DualPipeError
from dualpipe_ext.launch import run_ranks
from tests.eplb.ranks import device, expert_tables, local_rows, needs_ranks, random_map, same_bits


def test_moves_prefer_what_is_local_and_receive_once() -> None:
    # Rank 0 holds slots 0 and 1, rank 1 slots 2 and 3, rank 2 slots 4 and 5.
    assert plan_moves([0, 1, 2, 0, 3, 4], [0, 1, 2, 0, 3, 4], 3) == ()
    assert plan_moves([0, 1, 2, 0, 3, 4], [1, 0, 2, 4, 3, 3], 3 - 1) == (
        Move(1, (0,)),
        Move(0, (1,)),
        Move(5, (3,)),
        Move(4, (5,)),
    )
    both = plan_moves([0, 1, 2, 3, 1, 2], [3, 3, 0, 0, 1, 2], 3)
    assert both == (Move(3, (0, 1)), Move(0, (2, 3)))


def test_sources_are_spread_over_the_replicas() -> None:
    # Expert 0 lives on ranks 0 and 1; four more ranks want it.
    moves = plan_moves(
        [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5], [0, 1] * 2 + [0, 2, 0, 3] + [0, 4, 0, 5], 6
    )
    senders = [move.src_slot // 2 for move in moves if move.src_slot in (0, 2)]
    assert sorted(senders) == [0, 0, 1, 1]


@st.composite
def two_maps(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    num_ranks, per_rank = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    num_slots = num_ranks * per_rank
    num_experts = draw(st.integers(1, num_slots))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    maps = [random_map(num_experts, num_slots, generator) for _ in range(2)]
    return maps[0], maps[1], num_ranks


@given(two_maps())
def test_moves_turn_the_old_map_into_the_new(case: tuple[list[int], list[int], int]) -> None:
    old, new, num_ranks = case
    per_rank = len(old) // num_ranks
    slots, received = list(old), set()
    for move in plan_moves(old, new, num_ranks):
        ranks = {slot // per_rank for slot in move.dst_slots}
        assert len(ranks) == 1
        rank = ranks.pop()
        expert = old[move.src_slot]
        if move.src_slot // per_rank != rank:
            assert expert not in old[rank * per_rank : (rank + 1) * per_rank]
            assert (rank, expert) not in received
            received.add((rank, expert))
        for slot in move.dst_slots:
            assert old[slot] != expert
            slots[slot] = expert
    assert slots == new


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ([0, 1], [0, 1, 1], "same length, got 2 and 3"),
        ([0, 1, 1], [0, 1, 0], "evenly over 2 ranks, got 3 slots"),
        ([], [], "evenly over 2 ranks, got 0 slots"),
        ([0, 1, 2, 0], [0, 1, 1, 3], r"experts \[2\] only in the old and \[3\] only in the new"),
    ],
)
def test_maps_that_do_not_fit(old: list[int], new: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_moves(old, new, 2)


def test_one_process_needs_no_process_group() -> None:
    weight = torch.arange(8.0).view(4, 2)
    report = migrate([weight], [0, 1, 2, 0], [2, 0, 1, 1])
    assert weight.tolist() == [[4, 5], [0, 1], [2, 3], [2, 3]]
    assert report == MigrationReport((0,), (0,), (32,), 4)


def test_optimizer_state_of_another_shape_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.Adafactor([weight])
    weight.sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"state 'col_var' of its parameter's shape \[2, 3\]"):
        migrate_optimizer(optimizer, [weight], [0, 1], [1, 0])


def migrate_random_maps(num_cases: int) -> None:
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(num_ranks)
    for case in range(num_cases):
        per_rank = int(torch.randint(1, 6, (), generator=generator))
        num_slots = num_ranks * per_rank
        num_experts = int(torch.randint(1, num_slots + 1, (), generator=generator))
        old, new = (random_map(num_experts, num_slots, generator) for _ in range(2))
        tables = expert_tables(num_experts, seed=case)
        tensors = local_rows(tables, old)
        tensors[0].requires_grad_()  # as parameters do
        tensors.append(tensors[1].clone().t().contiguous().t())  # not contiguous
        report = migrate(tensors, torch.tensor(old), torch.tensor(new), timeout_s=30)
        wanted = local_rows(tables, new)
        for tensor, want in zip(tensors, [*wanted, wanted[1]], strict=True):
            assert same_bits(tensor, want), (case, rank, old, new)
        assert sum(report.bytes_sent) == sum(report.bytes_received)
        assert report.slots_changed == sum(a != b for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize("num_ranks", [pytest.param(n, marks=needs_ranks(n)) for n in (2, 3, 4)])
def test_random_maps_bit_for_bit(num_ranks: int) -> None:
    run_ranks(migrate_random_maps, num_ranks, 25, run_timeout_s=100)


def attempt(call: Callable[[], Any]) -> tuple[str, str, float]:
    """(type, message, seconds) of what a call raised."""
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "nothing", "", time.monotonic() - start


def fail_and_stay_intact(kind: str, timeout_s: float) -> tuple[str, str, float]:
    """Fail on rank 1 in the way of ``kind``; check that nothing has changed."""
    rank = dist.get_rank()
    old, new = [0, 1, 2, 3, 4, 0], [4, 3, 0, 2, 1, 1]
    tables = expert_tables(5, seed=0)
    tensors, before = local_rows(tables, old), local_rows(tables, old)
    group = dist.new_group(list(range(dist.get_world_size())))
    given = new
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            if kind == "other map":
                given = [4, 3, 0, 2, 1, 0]
            elif kind == "lost expert":
                given = [4, 3, 0, 2, 0, 0]
            elif kind == "other shape":
                tensors[0] = tensors[0][:, :2].contiguous()
            elif kind == "missing slot":
                tensors[0] = tensors[0][:1]
            elif kind == "out of memory":
                patch.setattr(transfer, "pack", failing(MemoryError("no memory")))
            elif kind == "send fails":
                patch.setattr(transfer, "exchange", failing(OSError("cable cut")))
        if kind == "silent" and rank == 1:
            outcome = ("silent", "", 0.0)
        else:
            outcome = attempt(lambda: migrate(tensors, old, given, group, timeout_s=timeout_s))
    for tensor, want in zip(tensors[1:], before[1:], strict=True):
        assert same_bits(tensor, want), f"{kind}: a tensor changed on rank {rank}"
    if kind in ("other map", "lost expert", "out of memory"):  # found before anything was sent
        migrate(tensors, old, new, group, timeout_s=30)
        wanted = local_rows(tables, new)
        assert all(same_bits(t, w) for t, w in zip(tensors, wanted, strict=True))
    dist.barrier()
    return outcome


def failing(error: Exception) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise error

    return call


def fail_in_every_way(kinds: list[str], timeout_s: float) -> list[tuple[str, str, float]]:
    return [fail_and_stay_intact(kind, timeout_s) for kind in kinds]


@needs_ranks(3)
def test_what_is_found_before_the_transfer_raises_on_every_rank_at_once() -> None:
    kinds = ["other map", "lost expert", "other shape", "missing slot"]
    messages = [
        "expected the same new map on all ranks, got ranks [1] to differ from rank 0",
        "rank 1: expected the old and the new map to hold the same experts, "
        "got experts [1] only in the old and [] only in the new one",
        "expected the same tensor shapes and dtypes on all ranks, "
        "got ranks [1] to differ from rank 0",
        "rank 1: expected tensors with 2 slots in the first dimension, got one of shape [1, 3, 5]",
    ]
    for outcomes in run_ranks(fail_in_every_way, 3, kinds, 30.0, run_timeout_s=60):
        assert [kind for kind, _, _ in outcomes] == ["ValueError"] * 4
        assert [message for _, message, _ in outcomes] == messages
        assert max(seconds for _, _, seconds in outcomes) < 10  # nobody sat out the time-out


@needs_ranks(3)
def test_a_rank_that_cannot_prepare_stops_all() -> None:
    results = run_ranks(fail_in_every_way, 3, ["out of memory"], 30.0, run_timeout_s=60)
    (first,), (second,), (third,) = results
    assert second[:2] == ("MemoryError", "no memory")
    for kind, message, seconds in (first, third):
        assert kind == "DualPipeError"
        assert message == "rank 1 could not prepare the migration: MemoryError: no memory"
        assert seconds < 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="a lost NCCL transfer ends the process")
def test_a_send_that_fails_in_the_middle_leaves_every_rank_intact() -> None:
    timeout_s = 2.0
    results = run_ranks(fail_in_every_way, 3, ["send fails"], timeout_s, run_timeout_s=60)
    (first,), (second,), (third,) = results
    assert second[:2] == ("OSError", "cable cut")
    for kind, message, seconds in (first, third):
        assert kind in ("DualPipeError", "CommTimeoutError")
        assert "rank 1" in message
        assert seconds < 3 * timeout_s


@pytest.mark.skipif(torch.cuda.is_available(), reason="a lost NCCL transfer ends the process")
def test_a_silent_rank_is_named() -> None:
    (first,), _, (third,) = run_ranks(fail_in_every_way, 3, ["silent"], 1.0, run_timeout_s=60)
    for rank, (kind, message, seconds) in ((0, first), (2, third)):
        assert kind == CommTimeoutError.__name__
        assert message == (
            f"rank {rank}: expected word that it is ready from rank 1 within 1 s, got no answer"
        )
        assert seconds < 5


def migrate_adam() -> None:
    old, new = [0, 1, 2, 0], [2, 0, 1, 1]
    table = torch.arange(12.0).view(3, 4)
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    weight = torch.nn.Parameter(table[old][rows].to(device()))
    bias = torch.nn.Parameter(table[old][rows, 0].to(device()))
    optimizer = torch.optim.AdamW([weight, bias], lr=0.1)

    def step() -> None:
        for param in (weight, bias):
            param.grad = param.detach() * 0.3 + 1  # the same for all replicas of an expert
        optimizer.step()
        optimizer.zero_grad()

    def everything() -> list[torch.Tensor]:
        state = [optimizer.state[p] for p in (weight, bias)]
        return [weight, bias, *(s[name] for s in state for name in ("exp_avg", "exp_avg_sq"))]

    def by_expert(phy2log: list[int]) -> list[dict[int, list[float]]]:
        return [
            dict(zip(phy2log[rows], tensor.flatten(1).tolist(), strict=True))
            for tensor in (t.unsqueeze(-1) for t in everything())
        ]

    def all_experts(phy2log: list[int]) -> list[dict[int, list[float]]]:
        gathered: list[Any] = [None, None]
        dist.all_gather_object(gathered, by_expert(phy2log))
        return [{**a, **b} for a, b in zip(*gathered, strict=True)]

    step()
    step()
    before = all_experts(old)
    report = migrate_optimizer(optimizer, [weight, bias], old, new, timeout_s=30)
    assert all_experts(new) == before
    assert float(optimizer.state[weight]["step"]) == 2
    # Weight and bias with two moments each: 5 floats x 3 a slot. Rank 0 gets expert 2 and rank 1
    # gets expert 1, once for its two slots.
    assert report.bytes_received == (60, 60)
    assert report.bytes_copied == (60, 60)
    step()  # the optimizer still works on the moved state


@needs_ranks(2)
def test_optimizer_state_moves_with_its_parameters() -> None:
    run_ranks(migrate_adam, 2, run_timeout_s=60)


def test_errors_are_run_time_failures() -> None:
    assert issubclass(CommTimeoutError, DualPipeError)
