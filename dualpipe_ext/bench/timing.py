"""How long calls take: many in a row, several rounds, the slowest rank.

Protocol: warm up; in every round each of the calls to be compared is measured once, after the
others, so that a drifting clock meets all of them alike; a measurement is ``num_calls`` calls in a
row with nothing between them, started together by all ranks (a barrier), divided by their number;
a round counts as long as its slowest rank. On a GPU one more call comes before them, so that the
host is ahead when the measurement begins, as it is in a loop. Traps: a host that is slower than its
GPU is measured too, as users would see it; a result must be dropped before the next call, or its
memory is not the memory that a loop in a model would use; Python's garbage collector stays off
during a round.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dualpipe_ext.bench.ranks import Ranks

Call = Callable[[], object]
_WARM_UP = 3


@dataclass(frozen=True, slots=True)
class Series:
    """Calls that only run in a row, all of them, such as those of a CUDA graph.

    Attributes:
        lead: what comes before and is not measured.
        body: what is.
        num_calls: how many calls ``body`` makes.
    """

    lead: Call
    body: Call
    num_calls: int

    def __call__(self) -> None:
        self.lead()
        self.body()

    @classmethod
    def of(cls, call: Call, num_calls: int, *, num_lead: int = 0) -> Series:
        """So many calls in a row, after others; itself if it is a series already."""
        if isinstance(call, Series):
            return call
        return cls(partial(_repeat, call, num_lead), partial(_repeat, call, num_calls), num_calls)


def _repeat(call: Call, times: int) -> None:
    for _ in range(times):
        call()


def measure(call: Call, num_calls: int, ranks: Ranks) -> float:
    """Microseconds per call at this rank, all ranks starting together; waits for the end.

    A :class:`Series` has its own number of calls.
    """
    on_gpu = ranks.device.type == "cuda"
    series = Series.of(call, num_calls, num_lead=1 if on_gpu else 0)
    if not on_gpu:
        ranks.barrier()
        series.lead()
        begin = time.perf_counter()
        series.body()
        return 1e6 * (time.perf_counter() - begin) / series.num_calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    ranks.barrier()
    series.lead()
    start.record()
    series.body()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(end) / series.num_calls


def interleaved(
    calls: Mapping[str, Call], ranks: Ranks, *, rounds: int, num_calls: int
) -> dict[str, list[float]]:
    """Microseconds per call of the slowest rank, a number per round, for each of ``calls``.

    Args:
        calls: by name; every rank gives the same names in the same order.
        ranks: the ranks, all of which call this.
        rounds: numbers per call.
        num_calls: calls in a row behind one number.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        Series.of(call, _WARM_UP)()
    with no_garbage_collection():
        for _ in range(rounds):
            for name, call in calls.items():
                found[name].append(measure(call, num_calls, ranks))
    return {name: ranks.maxima(values) for name, values in found.items()}


def captured(call: Call, *, pool: Any = None, stream: torch.cuda.Stream | None = None) -> Call:
    """``call`` as a CUDA graph; calling the result replays it.

    Args:
        call: what to capture.
        pool: of the memory, where graphs that run one after the other share it.
        stream: to capture on; by default torch's own for captures.

    Raises:
        Exception: what the call, or CUDA, has against being captured.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # Other threads (NCCL's watchdog) may go on asking for events meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        call()
    return graph.replay


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep Python's collector out of the body."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
