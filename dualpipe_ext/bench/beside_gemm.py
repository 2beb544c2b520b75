"""What a call costs the GEMM that runs beside it, and what running them together gains.

Measured: a bfloat16 GEMM of 8192 x 4096 x 7168 over and over on one stream, the call over and over
on another, of high priority; as many of each as take equally long alone. *Slow-down* is the time of
those GEMMs that ran wholly beside calls over the time of one alone; *speed-up* is the time of both
one after the other over the span from the common start to the last end: 2 at most. The GEMM knows
nothing of the SMs that are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch

from dualpipe_ext.bench.ranks import Ranks
from dualpipe_ext.bench.timing import Call, measure, no_garbage_collection

GEMM_SHAPE = (8192, 4096, 7168)  # M, N, K
_SPAN_US = 8000.0
# Both streams are held back until the host has given them everything.
_HOLD_US_PER_CALL = 60.0
_CYCLES_PER_US = 2000
_WARM_UP = 3


@dataclass(frozen=True, slots=True)
class Beside:
    """Medians over rounds, of the slowest rank in each."""

    gemm_us: float
    """One GEMM alone."""
    slow_down: float
    """Time of a GEMM beside calls over that of one alone."""
    speed_up: float
    """Serial over overlapped."""
    call_us: float
    """One call beside GEMMs."""


class GemmBeside:
    """The GEMM and the two streams; needs CUDA and a process per rank."""

    def __init__(self, ranks: Ranks) -> None:
        m, n, k = GEMM_SHAPE
        generator = torch.Generator(ranks.device).manual_seed(ranks.rank)
        draw = {"generator": generator, "device": ranks.device, "dtype": torch.bfloat16}
        self._a, self._b = torch.randn(m, k, **draw), torch.randn(k, n, **draw)
        self._out = torch.empty(m, n, device=ranks.device, dtype=torch.bfloat16)
        self._ranks = ranks
        self._compute = torch.cuda.Stream(ranks.device)
        # Kernels of this stream go first wherever an SM becomes free, as they must to overlap.
        self._comm = torch.cuda.Stream(ranks.device, priority=-1)

    def measure(self, calls: Mapping[str, Call], *, rounds: int) -> dict[str, Beside]:
        """Measure each of the calls; all ranks call this with the same names."""
        found: dict[str, list[list[float]]] = {name: [] for name in calls}
        self._warm_up(calls)
        with no_garbage_collection():
            for _ in range(rounds):
                for name, call in calls.items():
                    found[name].append(self._round(call))
        return {name: self._summary(values) for name, values in found.items()}

    def _warm_up(self, calls: Mapping[str, Call]) -> None:
        torch.cuda.synchronize()
        for stream, work in ((self._compute, [self._gemm]), (self._comm, list(calls.values()))):
            with torch.cuda.stream(stream):
                for call in work * _WARM_UP:
                    call()
        torch.cuda.synchronize()

    def _gemm(self) -> None:
        torch.mm(self._a, self._b, out=self._out)

    def _round(self, call: Call) -> list[float]:
        """gemm_us, slow_down, speed_up and call_us; the slowest rank's of each."""
        ranks = self._ranks
        gemm_us, call_us = ranks.maxima([measure(self._gemm, 10, ranks), measure(call, 10, ranks)])
        # The ranks must agree on these numbers.
        num_calls = max(4, round(_SPAN_US / call_us))
        num_gemms = max(4, round(num_calls * call_us / gemm_us))
        span_us, beside_us, comm_us = self._together(call, num_calls, num_gemms)
        serial_us = num_gemms * gemm_us + num_calls * call_us
        worst = ranks.maxima([beside_us / gemm_us, span_us, comm_us / num_calls])
        return [gemm_us, worst[0], serial_us / worst[1], worst[2]]

    def _together(self, call: Call, num_calls: int, num_gemms: int) -> tuple[float, float, float]:
        """The span, a GEMM's time while calls run, and the time of all calls; microseconds."""
        start = torch.cuda.Event(enable_timing=True)
        edges = [torch.cuda.Event(enable_timing=True) for _ in range(num_gemms + 1)]
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        self._ranks.barrier()
        hold_us = _HOLD_US_PER_CALL * (num_calls + num_gemms)
        torch.cuda._sleep(int(hold_us * _CYCLES_PER_US))
        start.record()
        for stream in (self._compute, self._comm):
            stream.wait_event(start)
        with torch.cuda.stream(self._compute):
            edges[0].record()
            for edge in edges[1:]:
                self._gemm()
                edge.record()
        with torch.cuda.stream(self._comm):
            for _ in range(num_calls):
                call()
            end.record()
        torch.cuda.synchronize()
        ends = [1e3 * start.elapsed_time(edge) for edge in edges]
        comm_us = 1e3 * start.elapsed_time(end)
        times = [late - early for early, late in pairwise(ends)]
        within = [t for t, late in zip(times, ends[1:], strict=True) if late <= comm_us]
        return max(ends[-1], comm_us), median(within or times[:1]), comm_us

    @staticmethod
    def _summary(values: list[list[float]]) -> Beside:
        return Beside(*(median(column) for column in zip(*values, strict=True)))
