"""Figures of a trace small enough to add up by hand, and of DeepSeek's published one if here.

The small trace, in microseconds:

    compute  (stream 7)  0--10   12----20     24--30
    transfer (stream 9)     5------------16
    waiting  (stream 9)                    20--24
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from dualpipe_ext.profiling import analyze, read_trace

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "deepseek-v3-train-trace.json.gz"
ORIGIN = 1_000_000


def gpu(name, start, end, stream, *, ctas=64, launched=0, category="kernel"):
    correlation = launched * 100 + start
    args = {"device": 0, "stream": stream, "correlation": correlation, "grid": [ctas, 1, 1]}
    kernel = {"ph": "X", "cat": category, "name": name, "ts": ORIGIN + start, "dur": end - start}
    launch = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 1}
    launch |= {"ts": ORIGIN + launched, "tid": 2, "args": {"correlation": correlation}}
    return [{**kernel, "args": args}, launch]


def annotation(name, start, end):
    span = {"ph": "X", "cat": "user_annotation", "name": name, "dur": end - start}
    return {**span, "ts": ORIGIN + start, "tid": 1, "args": {}}


def document() -> dict:
    events = [
        *gpu("gemm_a", 0, 10, 7, launched=1),
        *gpu("gemm_b", 12, 20, 7, launched=3),
        *gpu("gemm_c", 24, 30, 7, launched=8),
        *gpu("ncclDevKernel_SendRecv", 5, 16, 9, ctas=20, launched=4),
        *gpu("dpsk::ep::notify", 20, 24, 9, ctas=1, launched=5),
        annotation("ProfilerStep#1", 0, 40),
        annotation("layer", 0, 10),
        annotation("attention", 0, 3),
        annotation("dispatch", 4, 6),
    ]
    return {"traceEvents": events, "deviceProperties": [{"id": 0, "numSms": 132}]}


@pytest.fixture
def trace_file(tmp_path) -> Path:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(document()))
    return path


def test_copies_between_gpus_belong_to_the_gpu_that_copies(tmp_path):
    """Their events name three GPUs, and none of them ``device``."""
    found = document()
    mine, other = (gpu("Memcpy PtoP", 30, 34, 11, category="gpu_memcpy") for _ in range(2))
    for (copy, _), own in ((mine, 0), (other, 1)):
        del copy["args"]["device"], copy["args"]["grid"]
        copy["args"] |= {"fromDevice": own, "inDevice": own, "toDevice": 1 - own}
    found["traceEvents"] += [*mine, *other]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(found))
    trace = read_trace(path)
    assert [(e.start, e.end, e.kind) for e in trace.events if "PtoP" in e.name] == [
        (30, 34, "transfer")
    ]
    assert len(read_trace(path, device=1).events) == 1


def test_figures_add_up(trace_file):
    report = analyze(read_trace(trace_file))
    assert report.span_us == 30
    assert report.compute_us == 24
    assert report.communication_us == 15
    assert (report.transfer_us, report.waiting_us) == (11, 4)
    assert report.hidden == pytest.approx((5 + 4) / 15)
    assert report.speed_up == pytest.approx((24 + 15) / 30)
    assert (report.comm_ctas, report.num_sms) == (20, 132)


def test_gaps_name_what_waited(trace_file):
    longest, second = analyze(read_trace(trace_file)).gaps
    assert (longest.start_us, longest.duration_us, longest.communicating_us) == (20, 4, 4)
    assert (longest.after, longest.before, longest.phase) == ("gemm_b", "gemm_c", "layer")
    assert (second.start_us, second.duration_us, second.communicating_us) == (10, 2, 2)


def test_kernels_belong_to_the_innermost_annotation_of_their_launch(trace_file):
    phases = {p.name: p for p in analyze(read_trace(trace_file)).phases}
    assert list(phases) == ["attention", "dispatch", "layer"]
    assert phases["attention"].compute_us == 18
    assert phases["dispatch"].communication_us == 15
    assert phases["layer"].compute_us == 6


def test_compressed_and_bare_lists_read_alike(trace_file, tmp_path):
    expected = analyze(read_trace(trace_file))
    (tmp_path / "t.json.gz").write_bytes(gzip.compress(trace_file.read_bytes()))
    assert analyze(read_trace(tmp_path / "t.json.gz")) == expected
    (tmp_path / "bare.json").write_text(json.dumps(document()["traceEvents"]))
    assert analyze(read_trace(tmp_path / "bare.json")).hidden == expected.hidden


def test_patterns_decide_what_communicates(trace_file):
    report = analyze(read_trace(trace_file, comm=["gemm_b"], waiting=[]))
    assert report.communication_us == 8
    assert report.waiting_us == 0


def test_without_communication_all_of_it_is_hidden(trace_file):
    report = analyze(read_trace(trace_file, comm=["nothing of that name"]))
    assert (report.hidden, report.communication_us, report.comm_ctas) == (1.0, 0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json", "expected a profiler trace"),
        (b"\x1f\x8b broken", "expected a profiler trace"),
        (b"{}", "with traceEvents"),
        (b'{"traceEvents": []}', "with GPU kernels, got none"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_trace(path)
    assert "\n" not in str(caught.value)


def test_bad_patterns_and_devices_are_refused(trace_file):
    with pytest.raises(ValueError, match="expected regular expressions"):
        read_trace(trace_file, comm=["("])
    with pytest.raises(ValueError, match=r"expected a GPU of \[0\] .*got 3"):
        read_trace(trace_file, device=3)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="DeepSeek's published trace is not here")
def test_deepseeks_published_trace():
    report = analyze(read_trace(PUBLISHED))
    assert report.span_us / 1e3 == pytest.approx(129.0, abs=0.05)
    assert report.compute_us / 1e3 == pytest.approx(124.3, abs=0.05)
    assert report.communication_us / 1e3 == pytest.approx(113.4, abs=0.05)
    assert report.hidden == pytest.approx(0.963, abs=0.0005)
    assert report.speed_up == pytest.approx(1.84, abs=0.005)
    assert report.waiting_us / report.communication_us == pytest.approx(0.287, abs=0.0005)
    assert (report.comm_ctas, report.num_sms) == (20, 132)
    # The four layers of the pair, in the order in which their phases were launched.
    assert [p.name for p in report.phases][:3] == ["combine(B)", "attn(F)", "dispatch(F)"]
