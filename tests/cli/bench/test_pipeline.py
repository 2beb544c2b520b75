"""``dualpipe bench pipeline`` as a user runs it."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from typer.testing import CliRunner

from dualpipe_ext.bench.pipeline_cases import PEAK_TFLOPS
from dualpipe_ext.cli.bench import app
from dualpipe_ext.cli.bench import pipeline as cli

SMALL = [
    *("--device", "cpu", "--ranks", "1", "--hidden", "64", "--tokens", "8", "--experts", "4"),
    *("--top-k", "2", "--expert-hidden", "32", "--layers", "1", "--step-experts", "4"),
    *("--dtype", "float32", "--rounds", "1", "--calls", "1", "--num-chunks", "2"),
    "--no-throttle",
]


def test_the_command_prints_and_records(tmp_path):
    target = tmp_path / "rows.csv"
    args = ["pipeline", *SMALL, "--output", str(target)]
    done = CliRunner().invoke(app, args, env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    assert "zb1p" in done.output
    assert f"Wrote {target}" in done.output
    found = CliRunner().invoke(app, [*args, "--json", "--parts", "steps"])
    document = json.loads(found.stdout)
    assert [row["schedule"] for row in document] == ["1f1b", "zb1p", "dualpipev"]
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["part"] for row in rows] == ["pair", *["step"] * 6]
    assert rows[0]["command"].startswith("dualpipe bench pipeline --ranks 1 --device cpu")
    assert rows[0]["schedule"] == rows[1]["speed_up"] == ""


def test_nothing_measured_is_exit_code_1(tmp_path):
    args = [
        *SMALL,
        "--parts",
        "pair",
        "--transports",
        "nvlink",
        "--output",
        str(tmp_path / "r.csv"),
    ]
    done = CliRunner().invoke(app, ["pipeline", *args])
    assert done.exit_code == 1
    assert "unavailable: nvlink 24 SMs" in done.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--transports", "mail"], "copy_engine, low_latency, collective, got 'mail'"),
        (["--dtype", "int8"], "--dtype of float64, float32, bfloat16, got 'int8'"),
        (["--picture", "x.png"], "--device cuda for --picture, got cpu"),
        (["--graphs"], "--device cuda for --graphs, got cpu"),
        (
            ["--sm-means", "loud"],
            "--sm-means of none, persistent, yielding, carve_out, green_context, got",
        ),
        (
            ["--sm-means", ","],
            "--sm-means of none, persistent, yielding, carve_out, green_context, got",
        ),
        (["--ep", "2"], "--ep to divide 1 ranks, got 2"),
        (
            ["--stage-transport", "pigeon"],
            "--stage-transport of auto, copy_engine, collective, got 'pigeon'",
        ),
    ],
)
def test_bad_options(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = CliRunner().invoke(app, ["pipeline", *SMALL, *args])
    assert message in str(refused.exception)
    assert not list(tmp_path.iterdir())


def test_the_peak_is_the_one_that_is_explained():
    assert cli._PEAK == PEAK_TFLOPS


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_type():
    refused = CliRunner().invoke(app, ["pipeline"])
    assert "dualpipe bench pipeline --device cpu --dtype float32 --tokens 64" in str(
        refused.exception
    )
