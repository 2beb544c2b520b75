"""Reports from profiler traces: how much of the communication is hidden behind compute."""

from dualpipe_ext.profiling.report import Gap, OverlapReport, PhaseReport, analyze
from dualpipe_ext.profiling.trace import GpuEvent, Trace, read_trace

__all__ = [
    "Gap",
    "GpuEvent",
    "OverlapReport",
    "PhaseReport",
    "Trace",
    "analyze",
    "read_trace",
]
