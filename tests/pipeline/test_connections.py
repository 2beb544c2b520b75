"""Choosing how stages send, and the runtime over copy channels without a GPU.

Here a lane is a thread, and a rank's memory a file that all ranks map: slow, but with the order,
the flags and the bounded waits of the real one.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dualpipe_ext.errors import CommTimeoutError
from dualpipe_ext.launch import run_ranks
from dualpipe_ext.pipeline import copy_engine
from dualpipe_ext.pipeline.copy_channel import CopyChannel, Failure
from dualpipe_ext.pipeline.ring import MIN_BYTES
from dualpipe_ext.pipeline.runtime import DualPipeV, Pipeline
from tests.pipeline.test_runtime import Case, Mlp, Phased, Varied, mse

BOUND_S, SHORT_S = 30.0, 2.0
Place = copy_engine.SendLayout


class ThreadLane:
    """A lane whose stream is a thread; the host is the current stream."""

    failed: Failure | None = None  # of any lane of this process
    timeout_s = BOUND_S

    def __init__(self, memory, where: Place, rank: int, source: int, destination: int) -> None:
        self._sends = rank == source
        self._rank, self._peer = rank, destination if self._sends else source
        start = where.ring(source, destination)
        self.ring = memory[destination][start : start + where.ring_bytes]
        flag, word = (
            (copy_engine._ROOM_FLAG, copy_engine._SENT_WORD)
            if self._sends
            else (copy_engine._PIECE_FLAG, copy_engine._READ_WORD)
        )
        theirs = copy_engine._PIECE_FLAG if self._sends else copy_engine._ROOM_FLAG

        def number_at(owner, offset):
            return memory[owner][offset : offset + 4].view(torch.int32)

        self._flag = number_at(rank, where.end(self._peer, flag))
        self._word = number_at(rank, where.end(self._peer, word))
        self._their_flag = number_at(self._peer, where.end(rank, theirs))
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            self._queue.get()()

    def follow(self) -> None:
        """The host is where its own stream is."""

    def acquire(self, expected: int, number: int) -> None:
        def wait() -> None:
            deadline = time.monotonic() + self.timeout_s
            while self._flag.item() < expected and ThreadLane.failed is None:
                if time.monotonic() > deadline:
                    ThreadLane.failed = Failure(self._sends, self._peer, number)
                time.sleep(50e-6)
            if ThreadLane.failed is None:
                self._word.fill_(number)

        self._queue.put(wait)

    def copy(self, to, source) -> None:
        self._queue.put(lambda: to.copy_(source))

    def add(self, total, mine, other) -> None:
        self._queue.put(lambda: total.copy_(other if mine is None else mine + other))

    def signal(self) -> None:
        self._queue.put(lambda: self._their_flag.copy_(self._word))

    def mark(self):
        done = threading.Event()
        done.query = done.is_set
        self._queue.put(done.set)
        return done

    def join(self, mark) -> None:
        mark.wait()

    def blank(self, tensor) -> None:
        if ThreadLane.failed is not None:
            tensor.zero_()

    def failure(self):
        return ThreadLane.failed

    def close(self, *, abort: bool) -> None:
        """Threads end with the process."""


def open_over_files(folder: Path, group, pipeline_ranks, links, *, device, ring_bytes, timeout_s):
    """What copy_engine.open_channels does, with files for memory."""
    where = copy_engine.layout(group.size(), links, ring_bytes)
    rank = pipeline_ranks[group.rank()]
    serial = len(list(folder.glob(f"*-{rank}")))
    (folder / f"{serial}-{rank}").write_bytes(bytes(where.bytes))
    dist.barrier(group)
    memory = [
        torch.from_file(str(folder / f"{serial}-{r}"), True, where.bytes, dtype=torch.uint8)
        for r in range(group.size())
    ]
    siblings: dict = {}
    return [
        CopyChannel(
            ThreadLane(memory, where, rank, source, destination),
            source,
            destination,
            rank=rank,
            device=device,
            timeout_s=timeout_s,
            siblings=siblings,
        )
        for source, destination in sorted(links)
        if rank in (source, destination)
    ]


def over_files(folder: Path) -> None:
    """In this process, copy engines are threads."""
    copy_engine.unavailable = lambda *_: None
    copy_engine.open_channels = lambda *args, **options: open_over_files(folder, *args, **options)


def _one(stage, kind, num_chunks, rows=None, ring_bytes=1 << 16, **options):
    rank = dist.get_rank()
    case = Case(stage, kind, dist.get_world_size(), num_chunks, rows)
    modules, stages = case.local(stage, rank)
    pipeline = Pipeline(kind, modules, timeout_s=BOUND_S, ring_bytes=ring_bytes, **options)
    assert pipeline.transport == "copy_engine"
    copies = pipeline._connections.mirror
    assert (copies is not None) == (kind == "dualpipe")
    if copies is not None:
        assert isinstance(copies.outgoing, CopyChannel)
        assert isinstance(copies.incoming, CopyChannel)
    x, labels, ends = case.batch(rank)
    for times in (1, 2):
        loss, _ = pipeline.step(x, num_chunks=num_chunks, criterion=mse, labels=(labels,))
        if ends is not None:
            torch.testing.assert_close(loss, case.losses[ends], rtol=1e-12, atol=1e-12)
        case.check_grads(modules, stages, times)
    pipeline.close()


def _every_schedule(folder, ring_bytes):
    over_files(folder)
    num_ranks = dist.get_world_size()
    for kind in ("dualpipe", "dualpipev", "1f1b", "zb1p", "zbv"):
        _one(Phased, kind, 2 * num_ranks, ring_bytes=ring_bytes)
    _one(Varied, "dualpipev", 2 * num_ranks, rows=5 * num_ranks, ring_bytes=ring_bytes)
    _one(Varied, "dualpipe", 2 * num_ranks, ring_bytes=ring_bytes, transport="copy_engine")
    return True


@pytest.mark.parametrize(
    ("num_ranks", "ring_bytes"), [(2, MIN_BYTES), (4, MIN_BYTES), (4, 1 << 16)]
)
def test_every_schedule_equals_one_process(num_ranks, ring_bytes, tmp_path):
    assert all(run_ranks(_every_schedule, num_ranks, tmp_path, ring_bytes, run_timeout_s=150))


def _stalled(folder):
    over_files(folder)
    ThreadLane.timeout_s = SHORT_S
    rank = dist.get_rank()
    pipeline = DualPipeV([Mlp(0), Mlp(1)], timeout_s=SHORT_S)
    x = torch.zeros(4, 6, dtype=torch.float64)
    if rank == 1:
        time.sleep(2 * SHORT_S)
        return None
    with pytest.raises(CommTimeoutError) as caught:
        pipeline.step(x, num_chunks=4, criterion=mse, labels=(x,))
    pipeline.close()
    return str(caught.value)


def test_stalled_peer(tmp_path):
    text = run_ranks(_stalled, 2, tmp_path, run_timeout_s=60)[0]
    assert text.startswith("rank 0 waited 2 s for rank 1 to send the header of 2F0")


def _refused(rank_options):
    rank = dist.get_rank()
    stages = [Mlp(0), Mlp(1)]
    for options, message in (
        ({"transport": "pigeon"}, "expected transport to be one of auto, copy_engine, collective"),
        ({"transport": "copy_engine"}, "got 'copy_engine': the stages are not on GPUs"),
        ({"ring_bytes": 0}, "expected ring_bytes as a positive integer, got 0"),
        ({"ring_bytes": 2.5}, "expected ring_bytes as a positive integer, got 2.5"),
        (rank_options[rank], "expected the same transport on every rank"),
    ):
        with pytest.raises(ValueError, match=message):
            DualPipeV(stages, **options)
    pipeline = DualPipeV(stages)
    assert pipeline.transport == "collective"
    pipeline.close()
    return True


def test_what_is_refused():
    options = [{"transport": "auto"}, {"transport": "collective"}]
    assert all(run_ranks(_refused, 2, options, run_timeout_s=60))


def test_places_of_flags_and_rings_never_meet():
    links = [(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)]
    where = copy_engine.layout(4, links, 1000)
    assert where.ring_bytes == 1024
    for rank in range(4):
        sources = [a for a, b in links if b == rank]
        starts = [where.end(peer, what) for peer in range(4) for what in range(4)]
        places = [(0, 128), *((start, start + 128) for start in starts)]
        places += [(where.ring(s, rank), where.ring(s, rank) + 1024) for s in sources]
        places.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(places))
        assert places[-1][1] <= where.bytes
