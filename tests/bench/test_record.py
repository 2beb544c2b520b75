"""Rows of measurements: what is in them, and where they go."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from dualpipe_ext.bench.record import append, check_columns, results_file


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_appended_with_their_circumstances(tmp_path: Path) -> None:
    path = tmp_path / "speed.csv"
    check_columns(path, ["us", "note"])
    assert not path.exists()
    append(path, "measure", [{"us": 1.5, "note": "a, b"}, {"us": None, "note": ""}])
    check_columns(path, ["us", "note"])
    append(path, "measure --more", [{"us": 3, "note": ""}])
    rows = read(path)
    assert [row["us"] for row in rows] == ["1.5", "", "3"]
    assert rows[0]["note"] == "a, b"
    assert [row["command"] for row in rows] == ["measure", "measure", "measure --more"]
    assert list(rows[0]) == [
        *("date", "commit", "gpu", "num_gpus", "driver", "cpu_cores", "torch"),
        *("command", "us", "note"),
    ]
    assert all(row["date"] and row["torch"] for row in rows)


def test_one_hardware_queue_is_part_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "speed.csv"
    for value in ("8", "1"):
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", value)
        append(path, "measure", [{"us": 1}])
    commands = [row["command"] for row in read(path)]
    assert commands == ["measure", "CUDA_DEVICE_MAX_CONNECTIONS=1 measure"]


@pytest.mark.parametrize("columns", [["us"], ["note", "us"], ["us", "note", "more"]])
def test_other_columns_are_refused_and_change_nothing(tmp_path: Path, columns: list[str]) -> None:
    path = tmp_path / "speed.csv"
    append(path, "measure", [{"us": 1, "note": ""}])
    before = path.read_bytes()
    for use in (
        lambda: check_columns(path, columns),
        lambda: append(path, "measure", [dict.fromkeys(columns, 2)]),
    ):
        with pytest.raises(ValueError, match=r"expected the columns .* in .*speed\.csv, got date"):
            use()
    assert path.read_bytes() == before


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="existing folder"):
        check_columns(tmp_path / "no" / "speed.csv", ["us"])


def test_results_go_into_the_repository_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "repository" / "docs" / "deep"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    assert results_file("speed") == inside / "speed.csv"
    results = tmp_path / "repository" / "benchmarks" / "results"
    results.mkdir(parents=True)
    assert results_file("speed") == inside / "speed.csv"  # somebody else's repository
    (tmp_path / "repository" / "dualpipe_ext").mkdir()
    assert results_file("speed") == results / "speed.csv"
