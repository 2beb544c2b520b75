"""Reading a torch profiler trace: what ran on the GPU, when, on which stream, launched by what.

The format is the Chrome trace that ``torch.profiler`` exports. A kernel is communication if its
name matches one of some patterns, and *waiting* if it matches those of kernels that only wait for
other ranks; everything else on the GPU is compute.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["compute", "transfer", "waiting"]

# DeepSeek's own kernels, DeepEP's, NCCL's, NVSHMEM's, this package's, and copies between GPUs.
COMM_PATTERNS = (
    r"\bdpsk::ep::",
    r"\bdeep_ep::",
    r"\bnccl",
    r"\bnvshmem",
    r"\bdualpipe::",
    r"Memcpy PtoP",
)
WAIT_PATTERNS = (r"notify", r"barrier", r"flag_wait", r"arrivals_kernel")

_GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCH_CATEGORIES = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True, slots=True)
class GpuEvent:
    """One kernel, copy or memset.

    Attributes:
        name: as the profiler gives it.
        start, end: microseconds since the first GPU event of the trace.
        stream: CUDA stream number.
        kind: ``compute``, ``transfer`` (communication) or ``waiting`` (for other ranks).
        num_ctas: thread blocks of a kernel, 0 for copies and memsets.
        phase: the innermost annotation (``record_function``) in which it was launched, or "".
    """

    name: str
    start: float
    end: float
    stream: int
    kind: Kind
    num_ctas: int
    phase: str


@dataclass(frozen=True, slots=True)
class Trace:
    """The GPU side of a trace.

    Attributes:
        events: by start time.
        num_sms: multiprocessors of the GPU, 0 if the trace does not say.
    """

    events: tuple[GpuEvent, ...]
    num_sms: int


def read_trace(
    path: Path,
    *,
    comm: Sequence[str] = COMM_PATTERNS,
    waiting: Sequence[str] = WAIT_PATTERNS,
    device: int | None = None,
) -> Trace:
    """Read a trace file (.json or .json.gz).

    Args:
        path: the file.
        comm: regular expressions; a kernel whose name matches one is communication.
        waiting: regular expressions; communication that matches one is waiting.
        device: the GPU to look at, by default the first one in the trace.

    Raises:
        ValueError: the file is no trace, holds no GPU events, or a pattern is no regular
            expression.
    """
    comm_re, wait_re = _compiled(comm), _compiled(waiting)
    document = _load(path)
    events = document["traceEvents"]
    gpu = [e for e in events if e.get("ph") == "X" and e.get("cat") in _GPU_CATEGORIES]
    devices = sorted({_device_of(e) for e in gpu})
    if not devices:
        raise ValueError(f"expected a trace with GPU kernels, got none in {path}")
    device = devices[0] if device is None else device
    gpu = [e for e in gpu if _device_of(e) == device]
    if not gpu:
        raise ValueError(f"expected a GPU of {devices} in {path}, got {device}")
    origin = min(e["ts"] for e in gpu)
    phases = _Phases(events)
    found = []
    for event in gpu:
        name, args = event["name"], event["args"]
        is_comm = comm_re is not None and comm_re.search(name)
        is_waiting = is_comm and wait_re is not None and wait_re.search(name)
        grid = args.get("grid") or (0, 1, 1)
        found.append(
            GpuEvent(
                name=name,
                start=float(event["ts"] - origin),
                end=float(event["ts"] - origin + event.get("dur", 0)),
                stream=int(args.get("stream", 0)),
                kind="waiting" if is_waiting else "transfer" if is_comm else "compute",
                num_ctas=grid[0] * grid[1] * grid[2],
                phase=phases.of(args.get("correlation")),
            )
        )
    found.sort(key=lambda e: (e.start, e.end))
    properties = {p.get("id"): p for p in document.get("deviceProperties", ())}
    return Trace(tuple(found), int(properties.get(device, {}).get("numSms", 0)))


def _device_of(event: Mapping[str, Any]) -> int:
    """The GPU that an event ran on. A copy between two GPUs has three: from, to, and its own."""
    args = event["args"]
    return args["device"] if "device" in args else args["inDevice"]


def _compiled(patterns: Sequence[str]) -> re.Pattern[str] | None:
    if not patterns:
        return None
    joined = "|".join(f"(?:{pattern})" for pattern in patterns)
    try:
        return re.compile(joined)
    except re.error as error:
        raise ValueError(f"expected regular expressions, got {joined!r}: {error}") from None


def _load(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    try:
        document = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"expected a profiler trace (JSON) in {path}, got: {error}") from None
    if isinstance(document, list):  # the format's other form: the events alone
        document = {"traceEvents": document}
    if not isinstance(document, dict) or not isinstance(document.get("traceEvents"), list):
        raise ValueError(f"expected a profiler trace with traceEvents in {path}, got other JSON")
    return document


class _Phases:
    """Which annotation a kernel was launched in.

    By time and not by thread: autograd launches a backward from a thread of its own, while the
    annotation is open on the thread that waits for it.
    """

    def __init__(self, events: Sequence[Mapping[str, Any]]) -> None:
        self._launched = {
            e["args"]["correlation"]: e["ts"]
            for e in events
            if e.get("cat") in _LAUNCH_CATEGORIES and "correlation" in e.get("args", ())
        }
        spans = [
            (e["ts"], e["ts"] + e.get("dur", 0), e["name"])
            for e in events
            if e.get("cat") == "user_annotation" and not e["name"].startswith("ProfilerStep")
        ]
        # Shortest first, so that the first that contains a launch is the innermost.
        self._spans = sorted(spans, key=lambda span: span[1] - span[0])

    def of(self, correlation: int | None) -> str:
        when = self._launched.get(correlation)
        if when is None:
            return ""
        return next((name for start, end, name in self._spans if start <= when <= end), "")
