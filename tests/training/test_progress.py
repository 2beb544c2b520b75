"""The metrics file: what survives a crash, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualpipe_ext.errors import CheckpointError
from dualpipe_ext.training.progress import Metrics, read_metrics
from dualpipe_ext.training.trainer import StepReport


def write(path: Path, steps: int) -> None:
    metrics = Metrics(path, steps_done=0)
    for step in range(1, steps + 1):
        metrics.add(
            StepReport(
                step=step,
                loss=1 / step,
                seconds=0.1,
                tokens=8,
                bubble=0.2,
                balance=0.9,
                grad_norm=1.0,
                lr=0.1,
                moved_bytes=0,
            )
        )
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
