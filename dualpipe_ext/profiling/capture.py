"""From torch's profiler to a :class:`Trace`, in the process that ran it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from dualpipe_ext.profiling.report import OverlapReport, analyze
from dualpipe_ext.profiling.trace import COMM_PATTERNS, Trace, read_trace

T = TypeVar("T")
Document = dict[str, Any]


def trace_from(
    profiler: profile,
    cut: Callable[[Document], Document] | None = None,
    comm: Sequence[str] = COMM_PATTERNS,
) -> Trace:
    """What a profiler that has stopped saw of this process' GPU.

    Args:
        profiler: with CUDA among its activities.
        cut: changes the Chrome trace before it is read.
        comm: patterns of what communicates.

    Raises:
        ValueError: it saw nothing on a GPU.
    """
    with tempfile.TemporaryDirectory(prefix="dualpipe-") as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        if cut is not None:
            path.write_text(json.dumps(cut(json.loads(path.read_text()))))
        return read_trace(path, comm=comm)


def overlap_of(step: Callable[[], T]) -> tuple[T, OverlapReport | None]:
    """Run ``step`` and report how much of its communication something computed beside.

    Returns:
        What ``step`` returned, and the report, or None where the profiler has none to give.
    """
    profiler = _quietly(_started)
    try:
        result = step()
    except BaseException:
        if profiler is not None:
            _quietly(profiler.stop)
        raise
    return result, None if profiler is None else _quietly(lambda: _report(profiler))


def _started() -> profile:
    profiler = profile(activities=[ProfilerActivity.CUDA])
    profiler.start()
    return profiler


def _report(profiler: profile) -> OverlapReport:
    torch.cuda.synchronize()
    profiler.stop()
    return analyze(trace_from(profiler))


def _quietly(act: Callable[[], T]) -> T | None:
    """A figure that is missing must not end what it is about, whatever the profiler has."""
    try:
        return act()
    except Exception:
        return None
