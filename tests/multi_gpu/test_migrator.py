"""Migration between GPUs: both paths, beside compute, and under training."""

from __future__ import annotations

import functools
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dualpipe_ext.eplb import LoadMonitor, Migrator
from dualpipe_ext.eplb.migrator import DEFAULT_SPARE_BYTES
from dualpipe_ext.launch import run_ranks
from dualpipe_ext.training import experts
from tests.eplb.ranks import random_map
from tests.eplb.test_migrator import migrate_beside_compute
from tests.multi_gpu import GRID, RANKS
from tests.training.small_costs import reckon_as_on_a_cpu
from tests.training.test_compare import go_on_in_both_ways
from tests.training.test_experts import MOVING, optimizer_state_follows, watch_a_run

both = pytest.mark.parametrize("path", ["copy_engine", "point_to_point"])

CONFIG = replace(MOVING, **GRID)
_CYCLES_PER_S = 2e9  # at least the GPU's clock: a sleep is not shorter than asked for


@both
@pytest.mark.parametrize("slow_rank", [None, 1])
def test_random_maps_bit_for_bit(path: str, slow_rank: int | None) -> None:
    run_ranks(migrate_beside_compute, RANKS, 5, slow_rank, path, run_timeout_s=150)


def waves_behind_a_busy_gpu(path: str) -> float:
    """Wave after wave, while the compute stream lags behind the host and writes what will move.

    A transfer that does not wait for the optimizer takes old rows; one that does not wait for the
    last commit writes over rows that are still to be read.
    """
    rank, num_slots, width = dist.get_rank(), 8, 1 << 18
    per_rank = num_slots // RANKS
    generator = torch.Generator().manual_seed(0)
    migrator = Migrator(timeout_s=60, path=path)
    phy2log = random_map(6, num_slots, generator)
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    weight = torch.tensor(phy2log[mine]).cuda().float()[:, None].repeat(1, width)
    slowest = 0.0
    for wave in range(1, 9):
        torch.cuda._sleep(int(0.05 * _CYCLES_PER_S))
        weight += 100  # the optimizer: nobody may read before this
        new = random_map(6, num_slots, generator)
        begin = time.monotonic()
        migrator.start({0: [weight]}, {0: phy2log}, {0: new})
        slowest = max(slowest, time.monotonic() - begin)
        torch.cuda._sleep(int((0.05 if wave % 2 else 0.0) * _CYCLES_PER_S))
        migrator.wait()
        # The rows are put into place while the next wave is on its way, as far as the host knows.
        torch.cuda._sleep(int(0.05 * _CYCLES_PER_S))
        migrator.commit()
        phy2log = new
    want = torch.tensor(phy2log[mine]).cuda().float() + 800
    assert torch.equal(weight, want[:, None].expand_as(weight)), "rows of the wrong time or place"
    migrator.close()
    return slowest


@both
def test_waves_follow_the_optimizer_and_the_host_does_not_wait(path: str) -> None:
    for slowest in run_ranks(waves_behind_a_busy_gpu, RANKS, path, run_timeout_s=120):
        assert slowest < 0.04  # the GPU still slept for 50 ms


def with_path(path: str, fn: Any, *args: Any) -> Any:
    reckon_as_on_a_cpu()
    experts.Migrator = functools.partial(Migrator, path=path)
    return fn(*args, "cuda")


@both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_masters_and_moments_move_bit_for_bit(path: str, dtype: str) -> None:
    config = replace(CONFIG, dtype=dtype)
    moved = run_ranks(with_path, RANKS, path, optimizer_state_follows, config, run_timeout_s=150)
    assert all(size > 0 for size in moved)


@both
@pytest.mark.parametrize("spare_bytes", [0, DEFAULT_SPARE_BYTES])
def test_losses_are_those_of_a_run_without_migration(path: str, spare_bytes: int) -> None:
    config = replace(CONFIG, spare_bytes=spare_bytes)
    still = replace(config, rebalance_every=0)
    want = run_ranks(with_path, RANKS, path, watch_a_run, still, 10, run_timeout_s=150)[0]
    for seen in run_ranks(with_path, RANKS, path, watch_a_run, config, 10, run_timeout_s=150):
        assert seen["loss"] == pytest.approx(want["loss"], abs=1e-4)
        assert all(seen["equal"])
        assert sum(seen["moved"]) > 0


def test_the_comparison_goes_on_from_the_runs_own_weights() -> None:
    config = replace(CONFIG, steps=6)
    for with_it, without, _, _ in run_ranks(
        go_on_in_both_ways, RANKS, config, "cuda", run_timeout_s=150
    ):
        assert with_it == pytest.approx(without, abs=1e-4)


def summed_loads() -> float:
    monitor = LoadMonitor(2, 4, device="cuda", decay=0.0, group=dist.new_group())
    monitor.record(0, torch.full((4,), dist.get_rank() + 1, device="cuda"))
    monitor.step()
    total = 4 * sum(range(1, dist.get_world_size() + 1))
    assert monitor.start_loads().wait(30).sum() == total  # connects
    torch.cuda._sleep(int(0.2 * _CYCLES_PER_S))
    begin = time.monotonic()
    pending = monitor.start_loads()
    started = time.monotonic() - begin
    assert not pending.done()
    assert pending.wait(30).sum() == total
    return started


def test_loads_are_summed_without_a_wait_of_the_host() -> None:
    assert max(run_ranks(summed_loads, RANKS, run_timeout_s=60)) < 0.1
