"""``dualpipe eplb`` as a user runs it: the table, the files, and mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from dualpipe_ext.cli.main import main
from dualpipe_ext.eplb import Placement, synthetic_loads

SMALL = ["--layers", "3", "--experts", "32", "--gpus", "8", "--slots", "40"]


def eplb(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main(["eplb", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def table(text: str) -> dict[str, list[str]]:
    """Per policy, its cells."""
    rows = (re.split(r"\s*│\s*", line.strip("│ \n")) for line in text.splitlines() if "│" in line)
    return {row[0]: row[1:] for row in rows}


def write_loads(path: Path) -> Path:
    path.write_text(json.dumps(synthetic_loads("lognormal", 3, 32).tolist()))
    return path


def test_synthetic_loads_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = eplb(capsys, *SMALL)
    assert code == 0
    assert "3 layers x 32 experts in 40 slots, 8 GPUs, global" in out
    assert list(table(out)) == ["in force", "balanced 2%"]
    assert float(table(out)["in force"][0]) < 0.6
    assert float(table(out)["balanced 2%"][0]) > 0.95


def test_compare_shows_all_policies(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = eplb(capsys, *SMALL, "--compare", "--nodes", 2, "--groups", 4)
    assert code == 0
    assert "8 GPUs on 2 hosts, 4 groups kept whole" in out
    rows = table(out)
    assert list(rows) == ["in force", "reference", "balanced 0%", "balanced 2%"]
    best = rows["balanced 0%"]
    assert float(rows["reference"][0]) <= float(best[0]) <= float(best[1])
    assert int(rows["balanced 2%"][3]) <= int(best[3]) <= int(rows["reference"][3])


def test_drifting_loads_start_from_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = eplb(capsys, *SMALL, "--synthetic", "drifting", "--compare")
    assert code == 0
    rows = table(out)
    assert int(rows["balanced 2%"][3]) < int(rows["reference"][3]) / 2


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_maps_go_out_and_come_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    loads, maps = write_loads(tmp_path / "loads.json"), tmp_path / f"maps{suffix}"
    sizes = [loads, "--gpus", 8, "--slots", 40]
    assert eplb(capsys, *sizes, "--out", maps)[0] == 0
    if suffix == ".json":
        read = {k: torch.tensor(v) for k, v in json.loads(maps.read_text()).items()}
    else:
        read = torch.load(maps, weights_only=True)
    Placement(**read).validate()
    code, out, _ = eplb(capsys, *sizes, "--current", maps)
    assert code == 0
    assert table(out)["in force"][0] == table(out)["balanced 2%"][0]
    assert table(out)["balanced 2%"][3] == "0"


def test_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "heat.svg"
    code, out, _ = eplb(capsys, *SMALL, "--picture", picture)
    assert code == 0
    assert f"Wrote {picture}" in out
    text = picture.read_text()
    assert "Before" in text
    assert "After: balanced" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--slots", 30], "as many slots as experts (32), got num_replicas=30"),
        (["--slots", 41], "multiple of num_gpus=8, got 41; 48 would work"),
        (["--groups", 5], "multiple of num_groups=5, got 32"),
        (["--nodes", 3, "--groups", 3], "multiple of num_groups=3, got 32"),
        (["--gpus", 0], "num_gpus of at least 1, got 0"),
        (["--policy", "best"], "policy of reference, balanced, got 'best'"),
        (["--policy", "best", "--compare"], "policy of reference, balanced, got 'best'"),
        (["--synthetic", "normal"], "lognormal, zipf, uniform, drifting, got 'normal'"),
        (["--spread", "-1"], "spread from 0 to 10, got -1"),
        (["--layers", 0], "at least one layer"),
        (["--tolerance", 1], "tolerance"),
        (["--expert-mib", 0], "--expert-mib to be positive, got 0"),
        (["--gb-per-s", "nan"], "--gb-per-s to be positive, got nan"),
        (["--out", "maps.txt"], "--out ending in .json, .pt, got maps.txt"),
        (["--picture", "heat.gif"], "picture ending in"),
        (["--picture", "no/such/folder.svg"], "existing folder"),
        (["missing.npy"], "missing.npy: No such file"),
        (["--current", "missing.pt"], "missing.pt: No such file"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], args: list[object], message: str
) -> None:
    code, out, err = eplb(capsys, *SMALL, *args)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("-1", "got -1.0 for expert 1 of layer 0"),
        ("NaN", "got nan for expert 1 of layer 0"),
        ("Infinity", "got inf for expert 1 of layer 0"),
        ('"x"', "'x' for expert 1 of layer 0"),
    ],
)
def test_bad_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str, message: str
) -> None:
    path = tmp_path / "loads.json"
    path.write_text(f"[[1, {value}, 3, 4]]")
    code, _, err = eplb(capsys, path, "--gpus", 2, "--slots", 6)
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ({"phy2log": [[0, 1, 2, 3, 0, 1]]}, "8 slots, got 1, 4 and 6"),
        ({"phy2log": [[0, 1, 2, 3, 0, 1, 2, 9]]}, "expert ids from 0 to 3, got 9"),
        ({"phy2log": [[0, 1, 2, 0, 0, 1, 2, 0]]}, "none for expert 3 in layer 0"),
        ({"log2phy": []}, "phy2log"),
        ([1], "maps as --out writes them"),
    ],
)
def test_maps_that_do_not_match(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], maps: object, message: str
) -> None:
    loads, path = tmp_path / "loads.json", tmp_path / "maps.json"
    loads.write_text("[[1, 2, 3, 4]]")
    path.write_text(json.dumps(maps))
    code, _, err = eplb(capsys, loads, "--gpus", 2, "--slots", 8, "--current", path)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
