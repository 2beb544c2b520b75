"""Experts that move under training: when, in what waves, and with which bits."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext.eplb import plan_placement, split_replicas, transfer
from dualpipe_ext.eplb.migrator import DEFAULT_SPARE_BYTES
from dualpipe_ext.errors import DualPipeError, WorkerFailedError
from dualpipe_ext.launch import run_ranks
from dualpipe_ext.training import TrainConfig, Trainer
from dualpipe_ext.training.costs import expert_seconds
from tests.training.test_trainer import CONFIG, ONE, TEXT, drift

MOVING = replace(CONFIG, redundant_experts=4, rebalance_every=2)


def by_expert(trainer: Trainer) -> list[tuple[list[int], list[Tensor]]]:
    """For each local layer its map, and what all slots of the group hold: weights and state."""
    config, found = trainer.config, []
    for layer in trainer.balancer.layers:
        tensors = [
            tensor
            for name, _ in layer.expert_parameters()
            for tensor in trainer.optimizer.tensors_of(name)
        ]
        slots = []
        for tensor in tensors:
            everywhere = [torch.empty_like(tensor) for _ in range(config.ep)]
            dist.all_gather(everywhere, tensor, group=trainer.balancer.group)
            slots.append(torch.cat(everywhere))
        found.append((trainer.balancer.placement.phy2log[layer.index].tolist(), slots))
    return found


def replicas_equal(trainer: Trainer) -> bool:
    """Whether the replicas of every expert have the same bits, optimizer state included."""
    for phy2log, slots in by_expert(trainer):
        for tensor in slots:
            first: dict[int, int] = {}
            for slot, expert in enumerate(phy2log):
                if not torch.equal(tensor[slot], tensor[first.setdefault(expert, slot)]):
                    return False
    return True


def watch_a_run(config: TrainConfig, steps: int, device: str = "cpu") -> dict[str, list[Any]]:
    trainer = Trainer(config, TEXT, device=torch.device(device))
    names = ("loss", "balance", "moved", "switched", "rebalance", "equal")
    seen: dict[str, list[Any]] = {name: [] for name in names}
    for _ in range(steps):
        before = trainer.balancer.placement.phy2log
        report = drift(trainer).step()
        after = trainer.balancer.placement.phy2log
        seen["switched"].append((before != after).any(1).nonzero().flatten().tolist())
        seen["loss"].append(report.loss)
        seen["balance"].append(report.balance)
        seen["moved"].append(report.moved_bytes)
        seen["rebalance"].append(report.rebalance)
        seen["equal"].append(replicas_equal(trainer))
    trainer.close()
    return seen


@pytest.mark.parametrize(
    "changes",
    [{}, {"dtype": "bfloat16"}, {"schedule": "dualpipe", "spare_bytes": 0}],
    ids=["float32", "bfloat16", "dualpipe, one layer at a time"],
)
def test_experts_move_and_replicas_stay_equal(changes) -> None:
    results = run_ranks(watch_a_run, 4, replace(MOVING, **changes), 8, run_timeout_s=120)
    for seen in results:
        assert all(seen["equal"])
        assert seen["switched"] == results[0]["switched"]
        assert seen["rebalance"] == results[0]["rebalance"]
        assert seen["rebalance"][0] == 0  # not asked
        assert seen["rebalance"][1] == 1
        assert seen["switched"][1] == []  # planned after this step, moved during the next
        assert seen["switched"][2] != []
    assert sum(sum(seen["moved"]) for seen in results) > 0


@pytest.mark.parametrize("spare_bytes", [0, DEFAULT_SPARE_BYTES])
def test_losses_are_those_of_one_process_without_replicas(spare_bytes: int) -> None:
    (one,) = run_ranks(watch_a_run, 1, ONE, 9, run_timeout_s=120)
    config = replace(MOVING, spare_bytes=spare_bytes)
    for seen in run_ranks(watch_a_run, 4, config, 9, run_timeout_s=120):
        assert seen["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert sum(seen["moved"]) > 0


def reckoned_saving(config: TrainConfig, steps: int) -> tuple[float, float]:
    """What the balancer says that a plan saves after some steps, and what it should say."""
    trainer = Trainer(config, TEXT, device=torch.device("cpu"))
    for _ in range(steps):
        drift(trainer).step()
    balancer, ranks = trainer.balancer, config.ep
    for layer in balancer.layers:
        assert torch.equal(layer.module.replica_split, balancer.split.shares[layer.index])
    loads, current = balancer.monitor.local_loads(), balancer.placement
    new = plan_placement(loads, config.num_slots, ranks, current=current).placement
    said = balancer.plan().saved_s
    trainer.close()
    before, after = (split_replicas(loads, at, ranks).after.double() for at in (current, new))
    saved = (1 / before - 1 / after).mean().item() * expert_seconds(config, "cpu")
    return said, saved * config.rebalance_every


def test_moves_are_reckoned_between_placements_with_uneven_replicas() -> None:
    config = replace(CONFIG, redundant_experts=4, rebalance_every=10, uneven_replicas=True)
    for said, saved in run_ranks(reckoned_saving, 4, config, 5, run_timeout_s=120):
        assert said == pytest.approx(saved)


def test_uneven_replicas_follow_the_loads_where_nothing_moves() -> None:
    config = replace(CONFIG, redundant_experts=4)
    uneven = replace(config, uneven_replicas=True)
    even, uneven, one = (
        run_ranks(watch_a_run, run.pp * run.ep, run, 9, run_timeout_s=120)
        for run in (config, uneven, ONE)
    )
    for name in ("balance", "loss"):
        assert all(seen[name] == uneven[0][name] for seen in uneven)
    # Other experts become busy at steps 0, 3 and 6: what is known of the step before is of no use.
    for step in (1, 2, 4, 5, 7, 8):
        assert uneven[0]["balance"][step] > even[0]["balance"][step] + 0.02
    assert uneven[0]["loss"] == pytest.approx(one[0]["loss"], abs=1e-4)


def test_a_small_budget_spreads_a_rebalancing_over_steps() -> None:
    config = replace(MOVING, spare_bytes=0, rebalance_every=1)
    seen = run_ranks(watch_a_run, 4, config, 3, run_timeout_s=120)[0]
    first, second = seen["switched"][1:]
    assert first
    assert second
    assert not set(first) & set(second)
    # Pipeline rank 0 holds layers 0 and 3, the other one 1 and 2.
    assert all(len(part & set(w)) <= 1 for part in ({0, 3}, {1, 2}) for w in (first, second))
    assert seen["rebalance"][:2] == [1, 0]  # no new plan while one is being carried out


def optimizer_state_follows(config: TrainConfig, device: str = "cpu") -> int:
    """What every expert has before a switch it has after it, apart from the step in between."""
    trainer = Trainer(config, TEXT, device=torch.device(device))
    balancer = trainer.balancer
    drift(trainer).step()
    drift(trainer).step()
    before = by_expert(trainer)
    balancer.wait_for_moves()
    moved = balancer.finish_moves()  # no gradients are there: nothing but the moves
    changed = 0
    for (old, was), (new, now) in zip(before, by_expert(trainer), strict=True):
        changed += old != new
        for a, b in zip(was, now, strict=True):
            for slot, expert in enumerate(new):
                assert torch.equal(b[slot], a[old.index(expert)])
    trainer.close()
    assert changed > 0
    return moved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_masters_and_moments_move_bit_for_bit(dtype) -> None:
    moved = run_ranks(optimizer_state_follows, 4, replace(MOVING, dtype=dtype), run_timeout_s=120)
    assert all(size > 0 for size in moved)


def train_with_a_slow_transfer(config: TrainConfig, delay_s: float) -> tuple[list[float], float]:
    original = transfer.exchange

    def slow(*args: Any, **kwargs: Any) -> None:
        if dist.get_rank() == 1:
            time.sleep(delay_s)
        original(*args, **kwargs)

    transfer.exchange = slow
    trainer = Trainer(config, TEXT, device=torch.device("cpu"))
    reports = [drift(trainer).step() for _ in range(5)]
    trainer.close()
    return [r.loss for r in reports], max(r.moves_wait_s for r in reports)


def test_a_transfer_that_outlasts_a_step_is_waited_for() -> None:
    fast = run_ranks(train_with_a_slow_transfer, 4, MOVING, 0.0, run_timeout_s=120)
    slow = run_ranks(train_with_a_slow_transfer, 4, MOVING, 1.0, run_timeout_s=120)
    assert [losses for losses, _ in slow] == [losses for losses, _ in fast]  # to the bit
    assert min(wait for _, wait in slow[:2]) > 0.3  # the two ranks of the first expert group


def die_while_experts_move(config: TrainConfig, folder: Path) -> None:
    """Rank 1 dies in a transfer; the launcher asks the others to end, but they finish checking."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    trainer = Trainer(config, TEXT, device=torch.device("cpu"))
    rank, balancer = dist.get_rank(), trainer.balancer
    if rank == 1:
        transfer.exchange = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
    drift(trainer).step()
    old = balancer.placement
    drift(trainer).step()
    if rank != 0:
        time.sleep(10)
        return
    before = [p.clone() for p in trainer._parameters.values()]
    with pytest.raises(DualPipeError, match="rank 0: expected "):
        balancer.wait_for_moves()
    assert balancer.placement is old
    assert all(torch.equal(a, b) for a, b in zip(before, trainer._parameters.values(), strict=True))
    (folder / "intact").touch()


def test_a_rank_that_dies_while_experts_move_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    config = replace(MOVING, timeout_s=10.0)
    with pytest.raises(WorkerFailedError, match="was killed by signal 9"):
        run_ranks(die_while_experts_move, 4, config, tmp_path, run_timeout_s=60, grace_s=20)
    assert (tmp_path / "intact").exists()
