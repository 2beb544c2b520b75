"""``dualpipe bench gemm`` as a user runs it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from dualpipe_ext.cli.main import main

ARGS = [
    *("--device", "cpu", "--experts", "3", "--rows", "20", "--hidden", "256", "--inner", "128"),
    *("--rounds", "2", "--calls", "1"),
]


def test_table_and_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "gemm", *ARGS]) == 0
    out = capsys.readouterr().out
    assert "3 experts, 60 rows; medians of 2 rounds" in out
    assert out.count("weight_grad ") == out.count("weight_grad_add ") == 10
    assert main(["bench", "gemm", *ARGS, "--json", "--output", "mine.csv"]) == 0
    rows = json.loads(capsys.readouterr().out)
    with (tmp_path / "mine.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["variant"] for row in written] == [row["variant"] for row in rows]
    assert written[0]["command"].startswith("dualpipe bench gemm --experts 3")
    with (tmp_path / "gemm.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--hidden", "100"], "expected --hidden to be a multiple of 128, got 100"),
        (["--rows", "0"], "expected --rows of at least 1, got 0"),
        (["--sms", "-1"], "expected --sms of at least 0"),
        (["--device", "tpu"], "expected --device of cuda, cpu, got 'tpu'"),
    ],
)
def test_mistakes(args, message, capsys):
    assert main(["bench", "gemm", *ARGS, *args]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_try_it(capsys):
    assert main(["bench", "gemm"]) != 0
    assert "dualpipe bench gemm --device cpu" in capsys.readouterr().err
