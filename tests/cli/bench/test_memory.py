"""``dualpipe bench memory`` as a user runs it."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from typer.testing import CliRunner

from dualpipe_ext.cli.bench import app

SMALL = [
    *("--device", "cpu", "--hidden", "128", "--tokens", "16", "--experts", "4", "--top-k", "2"),
    *("--expert-hidden", "64", "--rounds", "1", "--in-flight", "1"),
]


def test_the_command_prints_and_records_every_level(tmp_path):
    target = tmp_path / "rows.csv"
    done = CliRunner().invoke(
        app, ["memory", *SMALL, "--output", str(target)], env={"COLUMNS": "80"}
    )
    assert done.exit_code == 0, done.output
    assert "level 0" in done.output
    assert f"Wrote {target}" in done.output
    found = CliRunner().invoke(app, ["memory", *SMALL, "--json", "--output", str(target)])
    assert [row["memory_level"] for row in json.loads(found.output)] == [0, 1, 2, 3]
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert rows[0]["command"].startswith("dualpipe bench memory --device cpu")
    refused = CliRunner().invoke(app, ["memory", *SMALL, "--dtype", "int8"])
    assert "--dtype of float64, float32, bfloat16" in str(refused.exception)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_type():
    refused = CliRunner().invoke(app, ["memory"])
    assert "dualpipe bench memory --device cpu --hidden 256 --tokens 64" in str(refused.exception)
