"""The pipeline benchmark between GPUs: pairs over every transport, and every schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dualpipe_ext.bench import pipeline_run
from dualpipe_ext.bench.link import SLOW_LINKS
from dualpipe_ext.bench.ranks import start
from tests.bench.pipeline_runs import OPTIONS, PROCESSES
from tests.gpu.test_bench_pipeline import WIDE
from tests.multi_gpu import RANKS

# At the size of WIDE a launch may well be over before the next one comes, and nothing is beside it.
LONG = replace(WIDE, tokens=8 * WIDE.tokens)


def test_pairs_over_every_transport():
    transports = ("nvlink", "copy_engine", "collective")
    options = replace(LONG, parts=("pair",), transports=transports)
    rows = start(pipeline_run.run, RANKS, options, **PROCESSES)
    assert [row.reason for row in rows if row.status != "ok"] == []
    assert {row.transport for row in rows} == set(transports)
    for row in rows:
        assert 0 <= row.hidden_share <= 1
        assert row.comm_ms > 0
    slowed = [row for row in rows if row.repeats > 1]
    how = {"copy_engine": "host"}
    assert all(row.slow_link == how.get(row.transport, "calls") for row in slowed)
    # With collective the host waits for counts, and compute may come when all has moved.
    waited_for = [row for row in slowed if row.transport != "collective"]
    assert [(row.transport, row.repeats) for row in waited_for if row.hidden_share == 0] == []
    assert waited_for


@pytest.mark.parametrize("slow_link", SLOW_LINKS)
def test_pairs_as_graphs(slow_link):
    options = replace(
        WIDE,
        parts=("pair",),
        transports=("nvlink", "copy_engine", "collective"),
        graphs=True,
        slow_link=slow_link,
    )
    rows = start(pipeline_run.run, RANKS, options, **PROCESSES)
    *good, collective = rows
    assert [row.reason for row in good] == [""] * len(good)
    slowed = []
    for transport in ("nvlink", "copy_engine"):
        as_it_is, *slower = [row for row in good if row.transport == transport]
        assert as_it_is.repeats == 1
        # None where communication takes longer than compute as it is, as among several GPUs.
        assert len(slower) <= 1
        slowed += slower
    assert min(row.repeats for row in slowed) > 1
    assert min(row.hidden_share for row in slowed) > 0
    assert collective.status == "unavailable"
    assert "transport collective waits for counts on the host" in collective.reason


def test_steps_under_every_schedule():
    options = replace(
        WIDE, parts=("steps",), step_experts=8, step_transport="auto", num_chunks=2 * RANKS
    )
    rows = start(pipeline_run.run, RANKS, options, **PROCESSES)
    assert [row.reason for row in rows if row.status != "ok"] == []
    assert {row.stage_transport for row in rows} <= {"copy_engine", "collective"}
    assert [row.schedule for row in rows] == list(OPTIONS.schedules)
    for row in rows:
        assert row.tokens_per_s > 0
        assert row.predicted_span_ms > 0


def test_steps_with_the_stage_transport_that_was_asked_for():
    options = replace(
        WIDE,
        parts=("steps",),
        step_experts=8,
        step_transport="auto",
        schedules=("1f1b",),
        stage_transport="collective",
    )
    (row,) = start(pipeline_run.run, RANKS, options, **PROCESSES)
    assert (row.status, row.stage_transport) == ("ok", "collective"), row.reason


def test_steps_with_expert_parallel_ranks():
    options = replace(
        WIDE, parts=("steps",), ep=2, step_experts=8, step_transport="auto", schedules=("1f1b",)
    )
    (row,) = start(pipeline_run.run, RANKS, options, **PROCESSES)
    assert (row.status, row.pp, row.ep) == ("ok", RANKS // 2, 2), row.reason
    assert (row.send_ms == 0) == (row.pp == 1)
