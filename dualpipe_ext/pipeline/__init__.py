"""Pipeline schedules: plans as data, their simulation and pictures, and the runtime that runs them.

Plans and simulation need no torch and load at once; the runtime is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from dualpipe_ext.pipeline.plan import KINDS, Action, Op, Pair, Plan, build_plan
from dualpipe_ext.pipeline.simulate import Durations, Simulation, simulate

_NEEDS_TORCH = {
    "DualPipe": "dualpipe_ext.pipeline.runtime",
    "DualPipeV": "dualpipe_ext.pipeline.runtime",
    "Pipeline": "dualpipe_ext.pipeline.runtime",
    "Phase": "dualpipe_ext.pipeline.overlap",
}

__all__ = [
    "KINDS",
    "Action",
    "DualPipe",
    "DualPipeV",
    "Durations",
    "Op",
    "Pair",
    "Phase",
    "Pipeline",
    "Plan",
    "Simulation",
    "build_plan",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name in _NEEDS_TORCH:
        return getattr(importlib.import_module(_NEEDS_TORCH[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
