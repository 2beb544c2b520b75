"""Rows on two ranks: of everything that is right, and of what is wrong or not there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dualpipe_ext.bench import pipeline_run
from dualpipe_ext.bench.pipeline_table import print_rows
from dualpipe_ext.bench.ranks import start
from tests.bench.pipeline_runs import OPTIONS, all_kinds, told_by_all_means


@pytest.fixture(scope="module")
def found():
    return start(all_kinds, 2, OPTIONS, virtual=False, device_type="cpu")


def test_every_figure_that_a_cpu_can_give(found):
    pair, *steps = found[0]
    assert (pair.part, pair.status, pair.ep, pair.repeats) == ("pair", "ok", 2, 1.0)
    assert min(pair.compute_ms, pair.comm_ms, pair.serial_ms_p50, pair.pair_ms_p50) > 0
    assert pair.speed_up == pytest.approx(pair.serial_ms_p50 / pair.pair_ms_p50, abs=1e-3)
    longer = max(pair.compute_ms, pair.comm_ms)
    assert pair.pair_over_longer == pytest.approx(pair.pair_ms_p50 / longer, abs=1e-3)
    assert pair.hidden_share is None  # needs a GPU
    assert pair.stage_transport is None
    assert [row.schedule for row in steps] == list(OPTIONS.schedules)
    for row in steps:
        assert (row.part, row.status, row.pp, row.ep) == ("step", "ok", 2, 1)
        assert row.stage_transport == "collective"
        assert row.tokens_per_s == pytest.approx(16 * 4 / row.step_ms_p50 * 1e3, rel=0.01)
        assert 0 < row.mfu < 1
        assert 0 <= row.predicted_bubble < 1
        assert 0 <= row.bubble < 1
        assert row.span_ms > 0
        assert row.predicted_span_ms > 0
        assert row.send_ms > 0
        assert row.f_ms > 0
    by_kind = {row.schedule: row for row in steps}
    assert by_kind["1f1b"].fb_ms is None
    assert by_kind["dualpipev"].fb_ms > by_kind["dualpipev"].f_ms
    assert by_kind["zb1p"].w_ms > 0


def test_what_is_wrong_is_not_timed(found):
    (pair,) = found[1]
    assert pair.status == "FAILED"
    assert "the gradient of layers.1." in pair.reason
    assert pair.pair_ms_p50 is None
    good, wrong = found[2]
    assert (good.status, wrong.status) == ("ok", "FAILED")
    assert wrong.reason.startswith("expected squared gradients that sum to ")
    assert wrong.step_ms_p50 is None


def test_steps_with_a_stage_transport_that_is_not_here(capsys):
    steps = replace(OPTIONS, parts=("steps",), schedules=("1f1b",), stage_transport="copy_engine")
    (row,) = start(pipeline_run.run, 2, steps, virtual=False, device_type="cpu")
    assert (row.stage_transport, row.status) == ("copy_engine", "error")
    assert "one that can be used here, got 'copy_engine'" in row.reason


def test_steps_of_one_pipeline_rank_have_no_stage_transport(capsys, monkeypatch):
    steps = replace(OPTIONS, parts=("steps",), schedules=("dualpipev",))
    (row,) = start(pipeline_run.run, 1, steps, virtual=False, device_type="cpu")
    assert (row.stage_transport, row.status) == (None, "ok")
    monkeypatch.setenv("COLUMNS", "80")
    print_rows([row.to_dict()])
    assert "from stage to stage" not in capsys.readouterr().out


def test_a_transport_that_is_not_here_is_a_row_and_the_run_goes_on(found):
    missing, there = found[3]
    assert (missing.transport, missing.num_sms, missing.status) == ("nvlink", 8, "unavailable")
    assert "'nvlink'" in missing.reason
    assert (there.transport, there.status) == ("collective", "ok")


def test_table(found, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_rows([row.to_dict() for rows in found for row in rows])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:3])) <= 80
    assert "\u2026" not in printed
    assert "Steps, from stage to stage by collective" in printed
    for text in (
        "limit",
        "dualpipev",
        "FAILED: dualpipe: ",
        "unavailable: nvlink 8 SMs, yielding: ",
    ):
        assert text in printed


def test_a_row_for_each_means_where_sms_are_taken(capsys, monkeypatch):
    rows = start(told_by_all_means, 1, OPTIONS, virtual=False, device_type="cpu")
    assert [(row.transport, row.num_sms, row.sm_means, row.status) for row in rows] == [
        ("nvlink", 8, "none", "ok"),
        ("nvlink", 8, "persistent", "ok"),
        ("nvlink", 8, "green_context", "unavailable"),
        ("copy_engine", 64, "none", "ok"),
    ]
    assert "no green contexts" in rows[2].reason
    monkeypatch.setenv("COLUMNS", "80")
    print_rows([row.to_dict() for row in rows])
    printed = capsys.readouterr().out
    assert "A forward and a backward, ms, SMs told by persistent" in printed
    assert "unavailable: nvlink 8 SMs, green_context: " in printed
