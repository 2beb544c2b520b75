"""Records of a step from marks in time."""

from __future__ import annotations

import time

import pytest
import torch

from dualpipe_ext.pipeline.timing import ActionTime, StepRecord, Stopwatch


def test_bubble_is_what_is_not_busy():
    record = StepRecord(
        (ActionTime("0F0", 0.5, 1.0, 2.0), ActionTime("0B0", 1.0, 3.0, 6.0)), span_s=6.0
    )
    assert record.busy_s == 4.0
    assert record.wait_s == 1.5
    assert record.bubble() == pytest.approx(1 / 3)
    assert record.bubble(8.0) == 0.5
    assert StepRecord((), 0.0).bubble() == 0.0


def test_stopwatch():
    watch = Stopwatch(torch.device("cpu"))
    asked = watch.mark()
    time.sleep(0.01)
    start = watch.mark()
    end = watch.mark()
    watch.add("0F0", asked, start, end)
    record = watch.record()
    (action,) = record.actions
    assert action.label == "0F0"
    assert action.wait_s >= 0.01
    assert action.start_s <= action.end_s == record.span_s
