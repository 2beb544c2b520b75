"""How much of a pair's communication hides, from the profiler.

What belongs here: a profile of some calls, cut to what ran in them, read by
``dualpipe_ext.profiling``. In a pass of its own, so that it cannot disturb a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dualpipe_ext.bench.ranks import Ranks
from dualpipe_ext.bench.timing import Call, Series
from dualpipe_ext.profiling.capture import trace_from
from dualpipe_ext.profiling.report import OverlapReport
from dualpipe_ext.profiling.trace import COMM_PATTERNS, Trace

# In a row, after some that are not looked at: the first begins with nothing to hide behind, and its
# rank perhaps earlier than the others, for whom it waits then.
NUM_LEAD, NUM_CALLS = 2, 6
_SPAN = "dualpipe bench: calls"
# GPU and host clocks of a trace agree to some microseconds.
_APART_S = 1e-3
_GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCH_CATEGORIES = ("cuda_runtime", "cuda_driver")


class PhaseNotes:
    """Annotates every launch with the name of its phase, while a profile is taken.

    Give it to a ``Launcher`` as ``on_launch``.
    """

    def __init__(self) -> None:
        self._active = False
        self._open: Any = None

    def __call__(self, name: str) -> None:
        """A launch begins, and the one before has ended."""
        if self._active:
            self._close()
            self._open = record_function(name)
            self._open.__enter__()

    def start(self) -> None:
        self._active = True

    def stop(self) -> None:
        self._close()
        self._active = False

    def _close(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None


def trace_of(
    call: Call,
    ranks: Ranks,
    notes: PhaseNotes | None = None,
    comm: Sequence[str] = COMM_PATTERNS,
) -> Trace:
    """What ran on this rank's GPU during some calls in a row, which all ranks begin together."""
    series = Series.of(call, NUM_CALLS, num_lead=NUM_LEAD)
    ranks.gather_object(None)  # whoever had a problem before communicates no more
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()  # the first one under a profiler is slow
        torch.cuda.synchronize()
        time.sleep(_APART_S)
        ranks.gather_object(None)
        series.lead()
        with record_function(_SPAN):
            if notes is not None:
                notes.start()
            series.body()
            torch.cuda.synchronize()
            if notes is not None:
                notes.stop()
        time.sleep(_APART_S)
    return trace_from(profiler, within_calls, comm)


def within_calls(document: dict[str, Any]) -> dict[str, Any]:
    """The trace without GPU work from before or after the calls, and without their annotation.

    The host runs ahead of the GPU: what belongs to the calls is what was launched within them.
    """
    events = document["traceEvents"]
    start, end = next(
        (e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("cat") == "user_annotation" and e["name"] == _SPAN
    )
    launched = {
        e["args"]["correlation"]
        for e in events
        if e.get("cat") in _LAUNCH_CATEGORIES
        and "correlation" in e.get("args", ())
        and start <= e["ts"] < end
    }
    kept = [
        e
        for e in events
        if e.get("name") != _SPAN
        and (e.get("cat") not in _GPU_CATEGORIES or e["args"].get("correlation") in launched)
    ]
    return {**document, "traceEvents": kept}


def slow_down(pair: OverlapReport, alone: OverlapReport) -> float:
    """How much longer compute takes while something communicates: 1.08 is 8% longer.

    Args:
        pair: communication and compute overlapped.
        alone: the same compute, with nothing beside it.

    10 ms of compute became 11 ms, of which 6 ms were beside communication: what took 5 ms alone
    took 6 ms there.

    >>> from types import SimpleNamespace as Report
    >>> pair = Report(compute_us=11e3, communication_us=8e3, hidden=0.75)
    >>> slow_down(pair, Report(compute_us=10e3))
    1.2
    """
    beside = pair.hidden * pair.communication_us
    extra = pair.compute_us - alone.compute_us
    if not beside:
        return 1.0
    return beside / (beside - extra) if extra < beside else math.inf
