"""The Migrator: nothing changes before the commit, everything is right after it, in any weather."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dualpipe_ext.eplb import Migrator, migrate, plan_moves, transfer
from dualpipe_ext.errors import DualPipeError, WorkerFailedError
from dualpipe_ext.launch import run_ranks
from tests.eplb.ranks import expert_tables, local_rows, needs_ranks, random_map, same_bits

gloo_only = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a lost NCCL transfer ends the process"
)

NUM_EXPERTS, NUM_SLOTS, NUM_LAYERS = 6, 12, 4


class Model:
    """Layers of experts with known contents, on this rank's slots."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tables = {
            layer: expert_tables(NUM_EXPERTS, seed=100 * seed + layer)
            for layer in range(NUM_LAYERS)
        }
        self.maps = self.random_maps()
        self.tensors = {
            layer: local_rows(table, self.maps[layer]) for layer, table in self.tables.items()
        }

    def random_maps(self) -> dict[int, list[int]]:
        return {
            layer: random_map(NUM_EXPERTS, NUM_SLOTS, self.generator) for layer in range(NUM_LAYERS)
        }

    def holds(self, maps: dict[int, list[int]]) -> bool:
        return all(
            same_bits(tensor, want)
            for layer, tensors in self.tensors.items()
            for tensor, want in zip(
                tensors, local_rows(self.tables[layer], maps[layer]), strict=True
            )
        )


def need_of(model: Model, new: dict[int, list[int]], layer: int) -> int:
    moves = plan_moves(model.maps[layer], new[layer], dist.get_world_size())
    tensors = model.tensors[layer]
    return transfer.spare_bytes_of(tensors, moves, len(tensors[0]), dist.get_world_size())


def migrate_beside_compute(num_cases: int, slow_rank: int | None, path: str = "auto") -> None:
    """Random maps over several layers; this rank computes, and another one may be late."""
    rank = dist.get_rank()
    migrator = Migrator(timeout_s=30, path=path)
    assert path in ("auto", migrator.path)
    for case in range(num_cases):
        model = Model(case)
        new = model.random_maps()
        if rank == slow_rank:
            time.sleep(0.2)
        migrator.start(model.tensors, model.maps, new)
        assert migrator.in_flight
        if slow_rank is not None and rank != slow_rank:
            time.sleep(0.1)
            assert model.holds(model.maps)  # nothing has changed while it is under way
        dist.all_reduce(torch.ones(1))  # training's own group works meanwhile
        assert migrator.wait() == tuple(range(NUM_LAYERS))
        assert model.holds(model.maps)
        reports = migrator.commit()
        assert model.holds(new)
        for layer in range(NUM_LAYERS):
            twin = Model(case)
            alone = migrate(twin.tensors[layer], twin.maps[layer], new[layer], timeout_s=30)
            assert reports[layer] == alone
            assert sum(alone.bytes_sent) == sum(alone.bytes_received)
    assert migrator.finish() == {}  # without a wave there is nothing to do
    migrator.close()


@pytest.mark.parametrize("num_ranks", [pytest.param(n, marks=needs_ranks(n)) for n in (2, 3, 4)])
def test_random_maps_bit_for_bit(num_ranks: int) -> None:
    run_ranks(migrate_beside_compute, num_ranks, 5, None, run_timeout_s=100)


@needs_ranks(4)
def test_a_slow_rank_is_waited_for() -> None:
    run_ranks(migrate_beside_compute, 4, 2, 2, run_timeout_s=100)


def test_one_process_needs_no_process_group() -> None:
    weight = torch.arange(8.0).view(4, 2)
    migrator = Migrator(device=torch.device("cpu"))
    assert migrator.path == "point_to_point"
    migrator.start({7: [weight]}, {7: [0, 1, 2, 0]}, {7: [2, 0, 1, 1]})
    assert migrator.finish()[7].slots_changed == 4
    assert weight.tolist() == [[4, 5], [0, 1], [2, 3], [2, 3]]


def migrate_with_little_memory() -> list[tuple[int, ...]]:
    """Layers go as far as they fit, and the rest later; each switches as a whole."""
    model = Model(3)
    new = model.random_maps()
    needs = [need_of(model, new, layer) for layer in range(NUM_LAYERS)]
    migrator = Migrator(timeout_s=30, spare_bytes=max(max(needs), needs[0] + needs[1]))
    left, waves = list(range(NUM_LAYERS)), []
    while left:
        migrator.start(
            {layer: model.tensors[layer] for layer in left},
            {layer: model.maps[layer] for layer in left},
            {layer: new[layer] for layer in left},
        )
        waves.append(tuple(migrator.finish()))
        assert sum(needs[layer] for layer in waves[-1]) <= migrator._spare_bytes
        for layer in waves[-1]:
            model.maps[layer] = new[layer]
            left.remove(layer)
        assert model.holds(model.maps)
    assert model.maps == new
    return waves


@needs_ranks(2)
def test_a_small_budget_makes_several_waves() -> None:
    first, second = run_ranks(migrate_with_little_memory, 2, run_timeout_s=60)
    assert first == second
    assert len(first) > 1
    assert len(first[0]) > 1


def test_layers_are_taken_in_order_as_far_as_they_fit() -> None:
    need = {4: 10, 2: 30, 7: 0, 1: 5}
    assert transfer.layers_that_fit(need, 45) == (4, 2, 7, 1)
    assert transfer.layers_that_fit(need, 44) == (4, 2, 7)
    assert transfer.layers_that_fit(need, 39) == (4,)  # the last would fit, but not in its turn
    with pytest.raises(ValueError, match="spare_bytes of at least 10, which layer 4 needs alone"):
        transfer.layers_that_fit(need, 9)


def test_spare_memory_counts_what_arrives_and_what_is_copied() -> None:
    tensors = [torch.ones(2, 5, dtype=torch.float32)]  # 20 bytes a row, 32 in a message of one
    # Rank 0 gets two rows of rank 1, in one message of 48 bytes; rank 1 copies one within itself.
    moves = plan_moves([0, 1, 2, 3], [2, 3, 0, 1], 2)
    assert transfer.spare_bytes_of(tensors, moves, 2, 2) == 48
    moves = plan_moves([0, 0, 1, 2], [0, 2, 1, 1], 2)
    assert transfer.spare_bytes_of(tensors, moves, 2, 2) == 32


def attempt(call: Callable[[], Any]) -> tuple[str, str, float]:
    """(type, message, seconds) of what a call raised."""
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "nothing", "", time.monotonic() - start


def fail_and_stay_intact(kind: str, timeout_s: float) -> tuple[str, str, float]:
    """Go wrong on rank 1 in the way of ``kind``; nothing may have changed anywhere."""
    rank = dist.get_rank()
    migrator = Migrator(timeout_s=timeout_s, spare_bytes=100 if kind == "no memory" else 1 << 20)
    model = Model(0)
    new = given = model.random_maps()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            if kind == "other map":
                given = model.random_maps()
            elif kind == "fewer layers":
                model.tensors.pop(3)
                model.maps.pop(3)
                given = {layer: new[layer] for layer in range(3)}
            elif kind == "send fails":
                patch.setattr(transfer, "exchange", failing)
            elif kind == "slow transfer":
                patch.setattr(transfer, "exchange", slow(transfer.exchange, 0.3))
            elif kind == "stalled transfer":
                patch.setattr(transfer, "exchange", slow(transfer.exchange, 3 * timeout_s))
        if kind == "silent" and rank == 1:
            outcome = ("silent", "", 0.0)
        else:
            migrator.start(model.tensors, model.maps, given)
            outcome = attempt(migrator.wait)
    assert model.holds(model.maps), f"{kind}: a tensor changed on rank {rank}"
    if kind == "slow transfer":
        migrator.commit()
        assert model.holds(new)
    elif outcome[0] == "ValueError" and kind == "other map":  # the migrator can go on
        migrator.start(model.tensors, model.maps, new)
        migrator.finish()
        assert model.holds(new)
    elif outcome[0] in ("DualPipeError", "CommTimeoutError"):
        with pytest.raises(DualPipeError, match="a migrator without a failure, got one: rank "):
            migrator.start(model.tensors, model.maps, new)
    dist.barrier()
    return outcome


def failing(*args: Any, **kwargs: Any) -> None:
    raise OSError("cable cut")


def slow(call: Callable[..., None], seconds: float) -> Callable[..., None]:
    def late(*args: Any, **kwargs: Any) -> None:
        time.sleep(seconds)
        call(*args, **kwargs)

    return late


@needs_ranks(3)
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "other map",
            "expected the same new map on all ranks, got ranks [1] to differ from rank 0",
        ),
        (
            "fewer layers",
            "expected the same old map on all ranks, got ranks [1] to differ from rank 0",
        ),
        ("no memory", "spare_bytes of at least"),
    ],
)
def test_what_does_not_fit_raises_on_every_rank(kind: str, message: str) -> None:
    for name, text, seconds in run_ranks(fail_and_stay_intact, 3, kind, 30.0, run_timeout_s=60):
        assert name == "ValueError"
        assert message in text
        assert seconds < 10


@gloo_only  # copies between GPUs do not go through what is slowed down
@needs_ranks(3)
def test_a_slow_transfer_is_waited_for() -> None:
    results = run_ranks(fail_and_stay_intact, 3, "slow transfer", 30.0, run_timeout_s=60)
    assert [name for name, _, _ in results] == ["nothing"] * 3
    assert max(seconds for _, _, seconds in results) > 0.25


@gloo_only
def test_a_send_that_fails_in_the_middle_leaves_every_rank_intact() -> None:
    results = run_ranks(fail_and_stay_intact, 3, "send fails", 2.0, run_timeout_s=60)
    assert results[1][:2] == ("OSError", "cable cut")
    for name, message, seconds in (results[0], results[2]):
        assert name in ("DualPipeError", "CommTimeoutError")
        assert "rank 1" in message
        assert seconds < 10


@gloo_only
@pytest.mark.parametrize(
    ("kind", "phase"),
    [("silent", "word that it is ready"), ("stalled transfer", "expert weights")],
)
def test_a_rank_that_does_not_answer_is_named_with_the_phase(kind: str, phase: str) -> None:
    results = run_ranks(fail_and_stay_intact, 3, kind, 1.0, run_timeout_s=60)
    for rank in (0, 2):
        name, message, seconds = results[rank]
        assert name in ("DualPipeError", "CommTimeoutError")
        assert message.startswith(f"rank {rank}: expected ")
        assert phase in message
        assert seconds < 8
    assert any("rank 1" in results[r][1] and "within 1 s" in results[r][1] for r in (0, 2))


def die_in_flight(folder: Path) -> None:
    """The launcher asks the others to end when it sees the death: they finish their checks."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rank = dist.get_rank()
    migrator = Migrator(timeout_s=10)
    model = Model(1)
    if rank == 2:
        # After the ranks have agreed to begin, in the middle of the layers.
        calls = 0

        def dying(*args: Any, **kwargs: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            original(*args, **kwargs)

        original, transfer.exchange = transfer.exchange, dying
    migrator.start(model.tensors, model.maps, model.random_maps())
    name, message, seconds = attempt(migrator.finish)
    assert name in ("DualPipeError", "CommTimeoutError"), message
    assert f"rank {rank}: expected " in message
    assert seconds < 15
    assert model.holds(model.maps)
    (folder / f"rank {rank}").write_text("intact")


@gloo_only
def test_a_rank_killed_in_flight_leaves_the_others_intact(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailedError, match="was killed by signal 9") as caught:
        run_ranks(die_in_flight, 4, tmp_path, run_timeout_s=60, grace_s=20)
    assert caught.value.rank == 2
    assert {file.name for file in tmp_path.iterdir()} == {"rank 0", "rank 1", "rank 3"}


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="a path of auto, copy_engine, point_to_point, got 'tcp'"):
        Migrator(path="tcp")
    with pytest.raises(ValueError, match="spare_bytes of at least 1, got 0"):
        Migrator(spare_bytes=0)
    with pytest.raises(ValueError, match="timeout_s above 0"):
        Migrator(timeout_s=0)
    with pytest.raises(ValueError, match="each other's memory, but the tensors are on the CPU"):
        Migrator(device=torch.device("cpu"), path="copy_engine")
    migrator = Migrator(device=torch.device("cpu"))
    weight = torch.ones(2, 1)
    with pytest.raises(ValueError, match=r"tensors, old and new, got \[0\], \[0\] and \[1\]"):
        migrator.start({0: [weight]}, {0: [0, 1]}, {1: [0, 1]})
    migrator.start({0: [weight]}, {0: [0, 1]}, {0: [1, 0]})
    with pytest.raises(ValueError, match="one wave at a time"):
        migrator.start({0: [weight]}, {0: [0, 1]}, {0: [1, 0]})
    migrator.wait()
    with pytest.raises(ValueError, match="one wave at a time"):
        migrator.start({0: [weight]}, {0: [0, 1]}, {0: [1, 0]})
    migrator.close()
    with pytest.raises(DualPipeError, match="it has been closed"):
        migrator.start({0: [weight]}, {0: [0, 1]}, {0: [1, 0]})


def test_a_dropped_wave_leaves_the_old_placement() -> None:
    weight = torch.arange(2.0).view(2, 1)
    migrator = Migrator(device=torch.device("cpu"))
    migrator.start({0: [weight]}, {0: [0, 1]}, {0: [1, 0]})
    migrator.drop()
    assert weight.tolist() == [[0], [1]]
    migrator.start({0: [weight]}, {0: [0, 1]}, {0: [1, 0]})
    migrator.finish()
    assert weight.tolist() == [[1], [0]]
