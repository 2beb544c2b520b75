"""``dualpipe schedule`` as a user runs it: the table, the files, and mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dualpipe_ext.cli.main import main
from dualpipe_ext.pipeline.export import read_csv
from dualpipe_ext.pipeline.plan import KINDS, build_plan


def schedule(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main(["schedule", *args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def table(text: str) -> dict[str, list[str]]:
    """Per schedule, its cells."""
    rows = (re.split(r"\s*│\s*", line.strip("│ \n")) for line in text.splitlines() if "│" in line)
    return {row[0]: row[1:] for row in rows}


def test_default_is_the_published_picture(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = schedule(capsys)
    assert code == 0
    assert table(out) == {"dualpipe": ["66", "6", "9.1%", "9", "2x"]}
    assert "F 1, B 2, I 1, W 1, F&B 3, comm 0" in out


def test_all_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = schedule(capsys, "--kind", "all")
    assert code == 0
    assert table(out) == {
        "dualpipe": ["66", "6", "9.1%", "9", "2x"],
        "dualpipev": ["67", "7", "10.4%", "8.5", "1x"],
        "1f1b": ["81", "21", "25.9%", "8", "1x"],
        "zb1p": ["67", "7", "10.4%", "8", "1x"],
        "zbv": ["63.5", "3.5", "5.5%", "8", "1x"],
    }


def test_all_kinds_where_one_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = schedule(capsys, "--kind", "all", "--ranks", "7")
    assert code == 0
    assert table(out)["dualpipe"] == ["-"] * 5
    assert list(table(out)) == list(KINDS)
    assert "dualpipe: expected an even num_ranks for dualpipe, got 7" in out


def test_times_are_used(capsys: pytest.CaptureFixture[str]) -> None:
    args = [
        "--kind",
        "1f1b",
        "--ranks",
        "2",
        "--chunks",
        "2",
        "--f",
        "1",
        "--b",
        "2",
        "--w",
        "0.5",
        "--fb",
        "2.5",
        "--comm",
        "0.5",
    ]
    code, out, _ = schedule(capsys, *args)
    assert code == 0
    assert table(out)["1f1b"][:2] == ["10", "4"]
    assert "F 1, B 2, I 1.5, W 0.5, F&B 2.5, comm 0.5" in out


def test_kinds_are_shown_once_and_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = schedule(capsys, "--kind", "ZBV", "--kind", "1f1b", "--kind", "zbv")
    assert code == 0
    assert list(table(out)) == ["zbv", "1f1b"]


def test_writes_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, actions, trace = (tmp_path / name for name in ("out.svg", "out.csv", "out.json"))
    shape = ["--kind", "dualpipev", "--ranks", "3", "--chunks", "7"]
    files = ["--out", str(picture), "--csv", str(actions), "--trace", str(trace)]
    code, out, _ = schedule(capsys, *shape, *files)
    assert code == 0
    assert [f"Wrote {path}" in out for path in (picture, actions, trace)] == [True] * 3
    assert "DualPipeV: 3 ranks, 7 chunks" in picture.read_text()
    assert read_csv(actions, kind="dualpipev") == build_plan("dualpipev", num_ranks=3, num_chunks=7)
    assert json.loads(trace.read_text())["traceEvents"]
    assert "cannot" not in out


def test_csv_of_two_pipes_says_what_torch_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.csv"
    code, out, _ = schedule(capsys, "--csv", str(path))
    assert code == 0
    assert len(path.read_text().splitlines()) == 8
    said = [line for line in out.splitlines() if "torch" in line]
    assert len(said) == 1
    assert "parse it but not execute it: dualpipe has 2 pipes" in said[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--chunks 15", "expected an even num_chunks of at least 16 for dualpipe on 8 ranks"),
        ("--ranks 7", "expected an even num_ranks for dualpipe, got 7"),
        ("--kind all --chunks 0", "expected num_chunks to be a positive integer, got 0"),
        ("--kind gpipe", "expected a kind of dualpipe, dualpipev, 1f1b, zb1p, zbv, got 'gpipe'"),
        ("--f -1", "expected F to be a finite time of at least 0, got -1"),
        ("--b 1 --w 2", "expected a split of B = 1 into I and W of at least 0"),
        ("--out FOLDER/out.jpg", "expected a picture ending in .svg, .png, .pdf, got"),
        ("--out FOLDER/none/out.svg", "expected a file in an existing folder, got"),
        ("--kind all --csv FOLDER/out.csv", "expected one --kind with --csv, got 5"),
        ("--trace FOLDER", "expected a file name, got the folder"),
        ("--ranks many", "--ranks"),
    ],
)
def test_mistakes_take_one_line(
    args: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = schedule(capsys, *args.replace("FOLDER", str(tmp_path)).split())
    assert code == 2
    assert out == ""
    assert err.startswith("dualpipe: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_needs_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys; from dualpipe_ext.cli.main import main; main(['schedule']); "
        "print({'torch', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
