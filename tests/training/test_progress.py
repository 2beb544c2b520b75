"""The metrics file: what survives a crash, and what is refused."""

from __future__ import annotations

import io
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from dualpipe_ext.errors import CheckpointError
from dualpipe_ext.training.progress import Metrics, ProgressDisplay, read_metrics, summarize
from dualpipe_ext.training.trainer import StepReport


def report(step: int, **changes: float) -> StepReport:
    plain = StepReport(
        step=step,
        loss=1 / step,
        seconds=0.1,
        tokens=8,
        bubble=0.2,
        balance=0.9,
        grad_norm=1.0,
        lr=0.1,
        moved_bytes=0,
        moves_wait_s=0.0,
        rebalance=0,
        saved_s=0.0,
        cost_s=0.0,
    )
    return replace(plain, **changes)


def write(path: Path, steps: int) -> None:
    metrics = Metrics(path, steps_done=0)
    for step in range(1, steps + 1):
        metrics.add(report(step))
    metrics.close()


def test_rows_past_the_checkpoint_are_dropped(tmp_path: Path):
    write(tmp_path / "metrics.csv", 3)
    Metrics(tmp_path / "metrics.csv", steps_done=2).close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == [1, 2]


def test_a_row_cut_short_is_dropped(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    write(path, 2)
    with path.open("a") as file:
        file.write("3,0.3")
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"\xff\xfe\x00"])
def test_another_file_is_one_clear_line(tmp_path: Path, content: bytes):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"expected a run's metrics in .*metrics\.csv") as e:
        read_metrics(path)
    assert "\n" not in str(e.value)


def test_a_decision_is_shown_with_its_reasons():
    text = io.StringIO()
    display = ProgressDisplay(Console(file=text, width=60), steps=100, steps_done=0)
    display.update(report(7))
    display.update(report(8, rebalance=1, saved_s=0.5, cost_s=0.001))
    display.update(report(9, rebalance=-1))
    assert text.getvalue().splitlines() == [
        "step     8/100  experts move: 500 ms saved until the next plan, 1 ms to move",
        "step     9/100  experts stay: 0 ms saved until the next plan, 0 ms to move",
    ]


def test_the_summary_counts_what_has_moved():
    rows = [
        asdict(report(1)),
        asdict(report(2, rebalance=1)),
        asdict(report(3, moved_bytes=2_000_000, moves_wait_s=0.25)),
        asdict(report(4, rebalance=-1)),
    ]
    found = summarize(rows, {}, predicted_bubble=0.1)
    assert found["placements changed"] == "1 of 2 times, 2.0 MB moved, 0.25 s waited for it"
