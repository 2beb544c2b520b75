"""How much of the communication is hidden, and what is left: figures from a trace.

The definitions, so that figures of different tools can be compared:

- *busy* is the length of the union of the intervals of a kind of kernel;
- *hidden* is the length of communication intersected with compute, over that of communication;
- *serial over overlapped* is (compute busy + communication busy) over the span: what the overlap is
  worth against running one after the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from dualpipe_ext.profiling.intervals import Intervals, gaps, intersection, length, union
from dualpipe_ext.profiling.trace import GpuEvent, Trace


@dataclass(frozen=True, slots=True)
class Gap:
    """A stretch of time in which nothing computes.

    Attributes:
        start_us, duration_us: microseconds, from the first GPU event.
        communicating_us: how long communication runs in it: exposed communication.
        after, before: names of the compute kernels around it ("" at the ends of the trace).
        phase: phase of the compute kernel that follows, which is what had to wait.
    """

    start_us: float
    duration_us: float
    communicating_us: float
    after: str
    before: str
    phase: str


@dataclass(frozen=True, slots=True)
class PhaseReport:
    """The kernels launched in one annotation, all its occurrences together; microseconds."""

    name: str
    compute_us: float
    communication_us: float
    hidden: float


@dataclass(frozen=True, slots=True)
class OverlapReport:
    """What a trace says about the overlap of communication and compute; times in microseconds.

    Attributes:
        span_us: first start to last end on the GPU.
        compute_us, communication_us: busy times.
        hidden: share of the communication during which something computes, 0 to 1; 1 if there is
            no communication.
        speed_up: serial over overlapped.
        transfer_us, waiting_us: communication by whether it moves data or waits for other ranks.
        comm_ctas: thread blocks of the transfer kernels, the number most of their time is spent
            with; 0 for copy engines.
        num_sms: multiprocessors of the GPU, 0 if not known.
        gaps: stretches without compute, the longest first.
        phases: per annotation, in the order in which they first appear.
    """

    span_us: float
    compute_us: float
    communication_us: float
    hidden: float
    speed_up: float
    transfer_us: float
    waiting_us: float
    comm_ctas: int
    num_sms: int
    gaps: tuple[Gap, ...]
    phases: tuple[PhaseReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def analyze(trace: Trace) -> OverlapReport:
    """Measure a trace of one GPU."""
    events = trace.events
    compute = _union(e for e in events if e.kind == "compute")
    communication = _union(e for e in events if e.kind != "compute")
    start, end = events[0].start, max(e.end for e in events)
    span = end - start
    busy, comm_busy = length(compute), length(communication)
    return OverlapReport(
        span_us=span,
        compute_us=busy,
        communication_us=comm_busy,
        hidden=_hidden(communication, compute),
        speed_up=(busy + comm_busy) / span if span else 1.0,
        transfer_us=length(_union(e for e in events if e.kind == "transfer")),
        waiting_us=length(_union(e for e in events if e.kind == "waiting")),
        comm_ctas=_usual_ctas(events),
        num_sms=trace.num_sms,
        gaps=_gaps(events, compute, communication, start, end),
        phases=_phases(events, compute),
    )


def _union(events: Iterable[GpuEvent]) -> Intervals:
    return union([(e.start, e.end) for e in events])


def _hidden(communication: Intervals, compute: Intervals) -> float:
    total = length(communication)
    return length(intersection(communication, compute)) / total if total else 1.0


def _usual_ctas(events: Iterable[GpuEvent]) -> int:
    time_with: dict[int, float] = defaultdict(float)
    for event in events:
        if event.kind == "transfer":
            time_with[event.num_ctas] += event.end - event.start
    return max(time_with, key=lambda ctas: time_with[ctas], default=0)


def _gaps(
    events: Iterable[GpuEvent],
    compute: Intervals,
    communication: Intervals,
    start: float,
    end: float,
) -> tuple[Gap, ...]:
    kernels = [e for e in events if e.kind == "compute"]
    by_end = {e.end: e for e in kernels}
    by_start = {e.start: e for e in reversed(kernels)}
    found = []
    for low, high in gaps(compute, start, end).tolist():
        after, before = by_end.get(low), by_start.get(high)
        found.append(
            Gap(
                start_us=low,
                duration_us=high - low,
                communicating_us=length(intersection(communication, union([(low, high)]))),
                after=after.name if after else "",
                before=before.name if before else "",
                phase=before.phase if before else "",
            )
        )
    return tuple(sorted(found, key=lambda gap: -gap.duration_us))


def _phases(events: Iterable[GpuEvent], compute: Intervals) -> tuple[PhaseReport, ...]:
    by_phase: dict[str, list[GpuEvent]] = defaultdict(list)
    for event in events:
        if event.phase:
            by_phase[event.phase].append(event)
    reports = []
    for name, members in by_phase.items():
        communication = _union(e for e in members if e.kind != "compute")
        reports.append(
            PhaseReport(
                name=name,
                compute_us=length(_union(e for e in members if e.kind == "compute")),
                communication_us=length(communication),
                hidden=_hidden(communication, compute),
            )
        )
    return tuple(reports)
