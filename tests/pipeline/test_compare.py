"""Schedules side by side: rows, shapes that do not exist, and large clusters."""

from __future__ import annotations

import time

import pytest

from dualpipe_ext.pipeline.compare import compare
from dualpipe_ext.pipeline.plan import KINDS
from dualpipe_ext.pipeline.simulate import Durations


def test_rows() -> None:
    rows = compare(num_ranks=8, num_chunks=20)
    assert tuple(row.kind for row in rows) == KINDS
    assert [row.makespan for row in rows] == [66, 67, 81, 67, 63.5]
    assert [row.bubble for row in rows] == [6, 7, 21, 7, 3.5]
    assert [row.peak_activations for row in rows] == [9, 8.5, 8, 8, 8]
    assert [row.parameter_copies for row in rows] == [2, 1, 1, 1, 1]
    assert not any(row.problem for row in rows)


def test_overlap_decides() -> None:
    """What the pair hides is DualPipe's case: without it ZB-V is shorter, with it DualPipe is."""
    shape = {"num_ranks": 8, "num_chunks": 20}
    dualpipe, zbv = compare(["dualpipe", "zbv"], **shape)
    assert zbv.makespan < dualpipe.makespan
    dualpipe, zbv = compare(["dualpipe", "zbv"], **shape, durations=Durations(FB=2.2))
    assert dualpipe.makespan < zbv.makespan


def test_a_kind_that_does_not_exist_for_the_shape() -> None:
    first, second = compare(["dualpipe", "1f1b"], num_ranks=3, num_chunks=4)
    assert first.problem.startswith("expected an even num_ranks for dualpipe, got 3")
    assert first.makespan != first.makespan  # NaN
    assert second.problem == ""
    with pytest.raises(ValueError, match="expected a kind of"):
        compare(["pipedream"], num_ranks=3, num_chunks=4)


def test_a_thousand_ranks() -> None:
    began = time.process_time()
    rows = compare(num_ranks=1024, num_chunks=2048)
    assert [row.bubble for row in rows] == [1022, 1023, 3069, 1023, 511.5]
    assert [row.peak_activations for row in rows] == [1025, 1024.5, 1024, 1024, 1024]
    # 4 s on a slow core; the bound tells work per action in Python (a minute) from work per sweep.
    assert time.process_time() - began < 30
