"""DeepSeek's parallel stack for any PyTorch user: expert-parallel dispatch/combine, DualPipe, EPLB.

The public names are loaded on first use, so that the parts that need no torch (plans, simulation)
start at once.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualpipe_ext.ep import Buffer as Buffer
    from dualpipe_ext.eplb import LoadMonitor as LoadMonitor
    from dualpipe_ext.eplb import rebalance_experts as rebalance_experts
    from dualpipe_ext.pipeline import DualPipe as DualPipe
    from dualpipe_ext.pipeline import DualPipeV as DualPipeV
    from dualpipe_ext.pipeline import build_plan as build_plan
    from dualpipe_ext.pipeline import simulate as simulate

_PUBLIC = {
    "Buffer": "dualpipe_ext.ep",
    "DualPipe": "dualpipe_ext.pipeline",
    "DualPipeV": "dualpipe_ext.pipeline",
    "LoadMonitor": "dualpipe_ext.eplb",
    "build_plan": "dualpipe_ext.pipeline",
    "rebalance_experts": "dualpipe_ext.eplb",
    "simulate": "dualpipe_ext.pipeline",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

try:
    __version__ = version("dualpipe_ext")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+source"


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
