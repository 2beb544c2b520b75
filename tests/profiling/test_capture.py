"""A profile of a running step: the step comes first."""

from __future__ import annotations

import json

import pytest

from dualpipe_ext.profiling import capture
from dualpipe_ext.training.run import hidden_share
from tests.profiling.test_report import document


class Profiler:
    """Saw the small trace of test_report.py."""

    def __init__(self, found):
        self.found, self.running, self.stops = found, True, 0

    def stop(self):
        assert self.running
        self.running, self.stops = False, self.stops + 1

    def export_chrome_trace(self, path):
        assert not self.running
        with open(path, "w") as file:
            json.dump(self.found, file)


@pytest.fixture
def profiler(monkeypatch):
    made = Profiler(document())
    monkeypatch.setattr(capture, "_started", lambda: made)
    monkeypatch.setattr(capture.torch.cuda, "synchronize", lambda: None)
    return made


def test_result_and_report(profiler):
    result, report = capture.overlap_of(lambda: 7)
    assert (result, profiler.stops) == (7, 1)
    assert report.communication_us == 15
    assert report.hidden == pytest.approx(9 / 15)
    assert hidden_share(report) == "60.0% of the last step's, 27% of it waiting for ranks"


def test_a_step_that_fails_fails_as_it_would_alone(profiler):
    with pytest.raises(ZeroDivisionError):
        capture.overlap_of(lambda: 1 // 0)
    assert profiler.stops == 1


@pytest.mark.parametrize(
    "found", [{"traceEvents": []}, [], {"traceEvents": [{"ph": "X", "cat": "kernel"}]}]
)
def test_a_trace_that_says_nothing_costs_the_figure_only(profiler, found):
    profiler.found = found
    result, report = capture.overlap_of(lambda: 7)
    assert (result, report) == (7, None)
    assert hidden_share(report) == "not known: the profiler saw no GPU"


def test_a_profiler_that_does_not_start_costs_the_figure_only(monkeypatch):
    def fails():
        raise RuntimeError("no CUPTI")

    monkeypatch.setattr(capture, "_started", fails)
    assert capture.overlap_of(lambda: 7) == (7, None)


def test_cut_before_reading(profiler):
    profiler.stop()

    def without_gemms(found):
        kept = [e for e in found["traceEvents"] if not e["name"].startswith("gemm")]
        return {**found, "traceEvents": kept}

    trace = capture.trace_from(profiler, without_gemms)
    assert {event.kind for event in trace.events} == {"transfer", "waiting"}
