"""SM time from a trace."""

from __future__ import annotations

from dualpipe_ext.bench.sm_time import SmTime, read_sm_times


def kernel(ts: float, dur: float, *grid: int, cat: str = "kernel") -> dict:
    return {"cat": cat, "name": "k", "ts": ts, "dur": dur, "args": {"grid": list(grid)}}


def note(name: str, ts: float, dur: float, cat: str = "user_annotation") -> dict:
    return {"cat": cat, "name": name, "ts": ts, "dur": dur}


def test_kernels_belong_to_the_case_they_start_in() -> None:
    events = [
        note("dualpipe bench: a", 100, 100),
        note("dualpipe bench: b", 300, 100),
        note("dualpipe bench: a", 0, 1000, cat="gpu_user_annotation"),
        note("other", 0, 1000),
        kernel(50, 9, 99, 1, 1),  # a warm-up, before the first case
        kernel(110, 10, 24, 1, 1),
        kernel(120, 5, 2, 3, 1),
        {**kernel(130, 70, 1, 1, 1, cat="gpu_memcpy"), "args": {"bytes": 1 << 30}},
        kernel(200, 7, 99, 1, 1),  # at the end of the first case: not in it
        kernel(399, 10, 5000, 1, 1),  # ends after its case, and has more CTAs than there are SMs
    ]
    found = read_sm_times({"traceEvents": events}, ["a", "b", "c"], 132)
    assert found == {
        "a": SmTime((240 + 30) / 5, 24),
        "b": SmTime(1320 / 5, 132),
        "c": SmTime(0.0, 0),
    }


def copy(ts: float, dur: float, size: int, name: str = "Memcpy PtoP (Device -> Device)") -> dict:
    return {"cat": "gpu_memcpy", "name": name, "ts": ts, "dur": dur, "args": {"bytes": size}}


def test_large_copies_between_gpus_have_a_rate_and_a_pack_kernel() -> None:
    mb = 1 << 20
    events = [
        note("dualpipe bench: a", 100, 200),
        kernel(110, 30, 16, 1, 1),  # packs
        copy(141, 20, 4 * mb),
        copy(141, 10, 2 * mb),  # to another peer at the same time
        kernel(142, 5, 16, 1, 1),  # beside the copies
        copy(161, 1, 128),  # a flag
        copy(163, 9, 64 * mb, "Memcpy DtoD (Device -> Device)"),
        kernel(170, 50, 16, 1, 1),  # unpacks
    ]
    found = read_sm_times({"traceEvents": events}, ["a"], 132)["a"]
    assert found.copy_gb_s == 6 * mb / 20 / 1e3
    assert found.pack_us == 30 / 5
