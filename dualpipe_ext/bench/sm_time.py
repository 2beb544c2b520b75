"""How much of the GPU's SMs a call takes, and how fast its copies are: from the torch profiler.

SM time of a call is the sum over its kernels of duration x SMs occupied, in SM microseconds; a
kernel occupies as many SMs as it has CTAs, at most all. Waiting for other ranks inside a kernel is
part of it: the SM is taken. Copies and memsets are done by copy engines and count nothing.

The rate of copies is the bytes of all large copies between GPUs over the time in which at least one
of them is under way.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dualpipe_ext.bench.ranks import Ranks
from dualpipe_ext.bench.timing import Call

# Calls per case: the first of them also waits for ranks that come later.
_CALLS = 5
_PREFIX = "dualpipe bench: "
# GPU and host clocks of a trace agree to some microseconds: keep the cases further apart.
_APART_S = 1e-3
# Smaller copies carry flags and numbers.
_LARGE_COPY = 1 << 20


@dataclass(frozen=True, slots=True)
class SmTime:
    """One call."""

    sm_us: float
    """SM microseconds."""
    most_sms: int
    """SMs that the kernel with the largest share of it occupies."""
    copy_gb_s: float = 0.0
    """Of large copies to other GPUs while they move, GB/s; 0 without any."""
    pack_us: float = 0.0
    """Duration of the kernels that such copies start right after."""


def sm_times(calls: Mapping[str, Call], ranks: Ranks) -> dict[str, SmTime]:
    """SM time of each call, the largest over ranks (of copies, the slowest); virtual ranks: of all
    of them together."""
    num_sms = torch.cuda.get_device_properties(ranks.device).multi_processor_count
    watches = ranks.local is None or ranks.rank == 0
    document: dict[str, Any] = {"traceEvents": []}
    if watches:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            _run(calls, ranks)
        with tempfile.TemporaryDirectory(prefix="dualpipe-") as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            document = json.loads(path.read_text())
    else:
        _run(calls, ranks)
    mine = read_sm_times(document, list(calls), num_sms)
    flat = [
        number
        for one in (mine[name] for name in calls)
        for number in (one.sm_us, float(one.most_sms), -one.copy_gb_s, one.pack_us)
    ]
    worst = iter(ranks.maxima(flat))
    return {
        name: SmTime(us, int(most), -rate, pack)
        for name, us, most, rate, pack in zip(calls, worst, worst, worst, worst, strict=True)
    }


def _run(calls: Mapping[str, Call], ranks: Ranks) -> None:
    for call in calls.values():
        call()
    for name, call in calls.items():
        ranks.barrier()
        torch.cuda.synchronize()
        time.sleep(_APART_S)
        ranks.gather_object(None)
        with record_function(_PREFIX + name):
            for _ in range(_CALLS):
                call()
            torch.cuda.synchronize()
        time.sleep(_APART_S)


def read_sm_times(document: Mapping[str, Any], names: list[str], num_sms: int) -> dict[str, SmTime]:
    """SM time per call from a Chrome trace of :func:`sm_times`; 0 for a name that is not there.

    Args:
        document: the trace.
        names: the cases.
        num_sms: SMs of the GPU.

    A case annotated from 0 to 100 us made five calls, each a kernel of 10 us on 4 SMs:

    >>> note = {"cat": "user_annotation", "name": "dualpipe bench: a", "ts": 0, "dur": 100}
    >>> kernel = {"cat": "kernel", "name": "k", "dur": 10, "args": {"grid": [4, 1, 1]}}
    >>> events = [note, *({**kernel, "ts": 15 * i} for i in range(5))]
    >>> read_sm_times({"traceEvents": events}, ["a"], 132)
    {'a': SmTime(sm_us=40.0, most_sms=4, copy_gb_s=0.0, pack_us=0.0)}
    """
    events = document["traceEvents"]
    spans = {
        e["name"].removeprefix(_PREFIX): (e["ts"], e["ts"] + e.get("dur", 0))
        for e in events
        if e.get("cat") == "user_annotation" and e["name"].startswith(_PREFIX)
    }
    kernels = [e for e in events if e.get("cat") == "kernel"]
    found = {}
    for name in names:
        start, end = spans.get(name, (0, 0))
        shares: dict[int, float] = {}
        for kernel in kernels:
            if start <= kernel["ts"] < end:
                x, y, z = kernel.get("args", {}).get("grid") or (1, 1, 1)
                occupied = min(x * y * z, num_sms)
                shares[occupied] = shares.get(occupied, 0.0) + occupied * kernel.get("dur", 0)
        most = max(shares, key=lambda sms: shares[sms], default=0)
        inside = [e for e in events if e.get("cat") == "gpu_memcpy" and start <= e["ts"] < end]
        rate, pack = _copies(inside, [k for k in kernels if start <= k["ts"] < end])
        found[name] = SmTime(sum(shares.values()) / _CALLS, most, rate, pack)
    return found


def _copies(copies: list[dict[str, Any]], kernels: list[dict[str, Any]]) -> tuple[float, float]:
    """GB/s of the large copies between GPUs, and us a call of the kernels that they start after."""
    large = sorted(
        (c["ts"], c["ts"] + c["dur"], c["args"]["bytes"])
        for c in copies
        if "PtoP" in c["name"] and c["args"]["bytes"] >= _LARGE_COPY
    )
    if not large:
        return 0.0, 0.0
    busy, until = 0.0, 0.0
    for start, end, _ in large:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    before = {}
    for start, _, _ in large:
        ended = [k for k in kernels if k["ts"] + k["dur"] <= start]
        if ended:
            last = max(ended, key=lambda k: k["ts"] + k["dur"])
            before[last["ts"]] = last["dur"]
    return sum(size for *_, size in large) / busy / 1e3, sum(before.values()) / _CALLS
