"""Counting, decay, sums over ranks, and resuming with the same bits."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from dualpipe_ext.eplb import LoadMonitor, count_experts
from dualpipe_ext.errors import CommTimeoutError
from dualpipe_ext.launch import run_ranks


def test_count_experts_ignores_what_is_no_expert() -> None:
    topk_idx = torch.tensor([[0, 2], [-1, 2], [2, 7]], dtype=torch.int32)
    assert count_experts(topk_idx, 4).tolist() == [1, 0, 3, 0]
    assert count_experts(topk_idx[:0], 4).tolist() == [0, 0, 0, 0]


def test_decay_is_per_step_and_not_per_micro_batch() -> None:
    monitor = LoadMonitor(2, 3, decay=0.5)
    assert monitor.loads().tolist() == [[0, 0, 0], [0, 0, 0]]
    for _ in range(4):  # micro-batches of one step
        monitor.record(1, torch.tensor([1, 0, 2]))
    assert monitor.loads().tolist() == [[0, 0, 0], [0, 0, 0]]  # the step is still open
    monitor.step()
    assert monitor.loads().tolist() == [[0, 0, 0], [4, 0, 8]]
    monitor.record(1, torch.tensor([16, 1, 8]))
    monitor.step()
    # (0.5 * first + second) / 1.5
    want = torch.tensor([0, 0, 0, 18, 1, 12], dtype=torch.float64).view(2, 3) / 1.5
    assert torch.equal(monitor.loads(), want.float())


@pytest.mark.parametrize(("decay", "want"), [(0.0, 8.0), (1.0, 5.0)])
def test_ends_of_the_decay_range(decay: float, want: float) -> None:
    monitor = LoadMonitor(1, 1, decay=decay)
    for count in (3, 4, 8):
        monitor.record(0, torch.tensor([count]))
        monitor.step()
    assert monitor.loads().tolist() == [[want]]


def test_resume_is_bit_exact_in_the_middle_of_a_step() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 1000, (12, 8), generator=generator)

    def run(monitor: LoadMonitor, steps: range) -> None:
        for i in steps:
            monitor.record(0, counts[i])
            if i % 3 == 2:
                monitor.step()

    straight, first, second = (LoadMonitor(1, 8, decay=0.9) for _ in range(3))
    run(straight, range(12))
    run(first, range(7))
    state = first.state_dict()
    run(first, range(7, 12))  # must not reach into the saved state
    second.load_state_dict(state)
    run(second, range(7, 12))
    assert torch.equal(second.loads(), straight.loads())
    assert torch.equal(second.state_dict()["sums"], straight.state_dict()["sums"])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"decay from 0 to 1, got 1\.5"):
        LoadMonitor(1, 1, decay=1.5)
    with pytest.raises(ValueError, match="at least one layer"):
        LoadMonitor(0, 1)
    monitor = LoadMonitor(2, 3)
    with pytest.raises(ValueError, match="layer from 0 to 1, got 2"):
        monitor.record(2, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"integers \[3\], got torch.int64 \[4\]"):
        monitor.record(0, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"of \[2, 3\] layers x experts, got \[2, 4\]"):
        monitor.load_state_dict(LoadMonitor(2, 4).state_dict())
    with pytest.raises(ValueError, match=r"without \['sums', 'weight'\]"):
        monitor.load_state_dict({"current": torch.zeros(2, 3)})


def summed_loads() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rank = dist.get_rank()
    pair = [dist.new_group([0, 1]), dist.new_group([2])][rank // 2]
    monitor = LoadMonitor(1, 3, decay=0.5)
    for step in range(3):
        monitor.record(0, torch.tensor([rank, 1, step]))
        monitor.step()
    return monitor.loads(), monitor.loads(group=pair), monitor.local_loads()


def test_loads_are_summed_over_the_group() -> None:
    results = run_ranks(summed_loads, 3, backend="gloo", run_timeout_s=60)
    last = (0 * 0.25 + 1 * 0.5 + 2) / 1.75
    for rank, (world, pair, local) in enumerate(results):
        assert torch.equal(world, results[0][0])
        torch.testing.assert_close(world, torch.tensor([[3.0, 3.0, 3 * last]]))
        ranks = (0, 1) if rank < 2 else (2,)
        want = torch.tensor([[float(sum(ranks)), len(ranks), len(ranks) * last]])
        torch.testing.assert_close(pair, want)
        torch.testing.assert_close(local, torch.tensor([[float(rank), 1.0, last]]))


def test_pending_loads_of_one_process() -> None:
    monitor = LoadMonitor(1, 2)
    monitor.record(0, torch.tensor([3, 1]))
    monitor.step()
    pending = monitor.start_loads()
    assert pending.done()
    assert pending.wait().tolist() == [[3, 1]]


def summed_beside_a_step(delay_s: float) -> tuple[float, bool, torch.Tensor, torch.Tensor]:
    """Start after one step, take after the next; the last rank is late in starting."""
    rank = dist.get_rank()
    own = dist.new_group()
    monitor = LoadMonitor(1, 2, decay=0.0, group=own)
    monitor.record(0, torch.tensor([rank + 1, 10]))
    monitor.step()
    dist.barrier()
    if rank == dist.get_world_size() - 1:
        time.sleep(delay_s)
    begin = time.monotonic()
    pending = monitor.start_loads()
    started_s = time.monotonic() - begin
    early = pending.done()
    monitor.record(0, torch.tensor([100, 100]))  # the next step: must not be in the sum
    monitor.step()
    dist.all_reduce(torch.ones(1), group=dist.group.WORLD)
    return started_s, early, pending.wait(30), monitor.loads()


def test_a_sum_that_is_waited_for_later_holds_nobody_up() -> None:
    results = run_ranks(summed_beside_a_step, 3, 0.5, backend="gloo", run_timeout_s=60)
    for rank, (started_s, early, first, second) in enumerate(results):
        assert first.tolist() == [[1 + 2 + 3, 30]]
        assert second.tolist() == [[300, 300]]
        if rank < 2:
            assert started_s < 0.4  # the late rank comes half a second after
            assert not early


def wait_for_an_absent_rank() -> str:
    own = dist.new_group()
    monitor = LoadMonitor(1, 2, group=own)
    if dist.get_rank() == 1:
        time.sleep(2)
        return ""
    begin = time.monotonic()
    with pytest.raises(CommTimeoutError) as caught:
        monitor.start_loads().wait(0.5)
    assert time.monotonic() - begin < 1.5
    return str(caught.value)


def test_waiting_for_loads_is_bounded() -> None:
    first, _ = run_ranks(wait_for_an_absent_rank, 2, backend="gloo", run_timeout_s=60)
    assert first == "rank 0: expected the loads of all ranks within 0.5 s, got no answer"
