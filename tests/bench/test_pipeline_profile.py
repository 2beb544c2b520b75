"""A trace is cut to its calls, and launches are annotated only while a profile is taken."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch.profiler import ProfilerActivity, profile

from dualpipe_ext.bench.pipeline_profile import PhaseNotes, slow_down, within_calls


def test_only_what_ran_in_the_calls_is_left():
    def event(cat, name, ts, dur=5, correlation=None):
        args = {} if correlation is None else {"args": {"correlation": correlation}}
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, **args}

    events = [
        event("kernel", "warm-up", 10, correlation=1),
        event("cuda_runtime", "earlier launch", 90, correlation=2),
        event("user_annotation", "dualpipe bench: calls", 100, 50),
        event("user_annotation", "attention(F)", 101),
        event("cuda_runtime", "launch", 101, correlation=3),
        event("cuda_runtime", "no launch", 102),
        event("kernel", "of an earlier call, while the host was ahead", 110, correlation=2),
        event("kernel", "gemm", 120, correlation=3),
        event("cuda_driver", "another launch", 149, correlation=4),
        event("gpu_memcpy", "copy, ahead of what was launched before it", 105, correlation=4),
        event("cuda_runtime", "later launch", 150, correlation=5),
        event("gpu_memcpy", "late", 151, correlation=5),
    ]
    kept = within_calls({"traceEvents": events, "deviceProperties": [1]})
    assert [e["name"] for e in kept["traceEvents"]] == [
        "earlier launch",
        "attention(F)",
        "launch",
        "no launch",
        "gemm",
        "another launch",
        "copy, ahead of what was launched before it",
        "later launch",
    ]
    assert kept["deviceProperties"] == [1]


def test_slow_down_of_the_compute_beside_communication():
    def report(compute, communication=0.0, hidden=1.0):
        return SimpleNamespace(compute_us=compute, communication_us=communication, hidden=hidden)

    assert slow_down(report(100.0, 50.0, 1.0), report(100.0)) == 1.0
    assert slow_down(report(110.0, 60.0, 1.0), report(100.0)) == pytest.approx(1.2)
    assert slow_down(report(100.0, 0.0), report(100.0)) == 1.0
    assert slow_down(report(200.0, 50.0), report(100.0)) == float("inf")


def test_launches_are_annotated_while_a_profile_is_taken():
    notes = PhaseNotes()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        notes("before(F)")
        notes.start()
        notes("attention(F)")
        notes("combine(B)")
        notes.stop()
        notes("after(F)")
    names = [e.name for e in profiler.events() if e.name.endswith(")")]
    assert names == ["attention(F)", "combine(B)"]
