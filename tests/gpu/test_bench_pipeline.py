"""The pipeline benchmark on one GPU: every figure of a pair, at a size for tests."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dualpipe_ext.bench import pipeline_run
from dualpipe_ext.bench.ranks import start
from dualpipe_ext.sms import MEANS
from tests.bench.pipeline_runs import MODEL, OPTIONS, PROCESSES, check_pairs

WIDE = replace(
    OPTIONS,
    model=MODEL.with_overrides(
        hidden=1024, num_heads=8, num_experts=8, expert_hidden=512, shared_hidden=512
    ),
    tokens=1024,
    seq_len=512,
    dtype=torch.bfloat16,
    throttle=True,
)


def test_the_check_on_a_gpu():
    good, lost, doubled = start(check_pairs, 1, **PROCESSES)
    assert good == ""
    assert "gradient" in lost
    assert "gradient" in doubled


@pytest.mark.parametrize("transport", ["nvlink", "copy_engine", "collective"])
def test_every_figure_of_a_pair(transport, tmp_path):
    options = replace(WIDE, parts=("pair",), transports=(transport,), picture=tmp_path / "pair.png")
    rows = start(pipeline_run.run, 1, options, **PROCESSES)
    assert [row.status for row in rows] == ["ok"] * len(rows), [row.reason for row in rows]
    for row in rows:
        assert 0 <= row.hidden_share <= 1
        assert row.compute_slow_down > 0
        assert row.busy_over_span > 0
        assert row.waiting_ms >= 0
        assert row.speed_up > 0
    assert len(list(tmp_path.glob(f"pair-{transport}*.png"))) == len(rows)
    if len(rows) == 2:
        # Nearer to each other than they were, at a size where launches, which take as long as they
        # like, are most of either.
        assert rows[1].repeats > 1
        apart = [max(r.comm_ms / r.compute_ms, r.compute_ms / r.comm_ms) for r in rows]
        assert apart[1] < min(2, apart[0])


@pytest.mark.parametrize("transport", ["nvlink", "copy_engine"])
def test_every_figure_of_a_pair_as_a_graph(transport):
    options = replace(WIDE, parts=("pair",), transports=(transport,), graphs=True)
    rows = start(pipeline_run.run, 1, options, **PROCESSES)
    assert [row.status for row in rows] == ["ok"] * len(rows), [row.reason for row in rows]
    for row in rows:
        assert row.graphs
        assert row.reason == ""
        assert 0 <= row.hidden_share <= 1
        assert row.compute_ms > 0
        assert row.speed_up > 0


def test_the_check_of_pairs_as_graphs():
    options = replace(WIDE, transports=("copy_engine",), graphs=True)
    good, lost, doubled = start(check_graphs, 1, options, **PROCESSES)
    assert good == ""
    assert "gradient" in lost
    assert "gradient" in doubled


def check_graphs(ranks, options):
    with torch.cuda.stream(torch.cuda.Stream()):
        return check_pairs(ranks, options)


def test_a_pair_told_by_every_means():
    """The check compares serial and overlapped under each; then both are timed."""
    options = replace(WIDE, parts=("pair",), transports=("nvlink",), throttle=False, sm_means=MEANS)
    rows = start(pipeline_run.run, 1, options, **PROCESSES)
    assert [(row.sm_means, row.status, row.reason) for row in rows] == [
        (means, "ok", "") for means in MEANS
    ]
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    (taken,) = options.sms
    in_groups = (num_sms - taken) // 8 * 8
    assert [row.compute_sms for row in rows] == [
        None,
        num_sms - taken,
        num_sms,
        num_sms - taken,
        in_groups,
    ]
