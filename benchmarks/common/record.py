"""Rows of ``benchmarks/results/``: what was measured, on what, with which versions and command."""

from __future__ import annotations

import csv
import datetime
import io
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dualpipe_ext.files import replacing

RESULTS = Path(__file__).parents[1] / "results"


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile of the rounds of one measurement, as p20, p50 and p80."""
    ranks = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    found = torch.quantile(torch.tensor(values, dtype=torch.float64), ranks).tolist()
    return dict(zip(("p20", "p50", "p80"), found, strict=True))


def append(name: str, command: str, values: Mapping[str, object]) -> Path:
    """Append one row to ``benchmarks/results/<name>.csv``.

    Args:
        name: the question that the file answers.
        command: what to type to measure it again.
        values: what was measured; the same keys in every row of a file.

    Raises:
        ValueError: the file has other columns.
    """
    row = {**_circumstances(), "command": command, **values}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    rows: list[dict[str, object]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if rows and list(rows[0]) != list(row):
            raise ValueError(f"expected the columns {list(rows[0])} of {path}, got {list(row)}")
    with replacing(path) as raw, io.TextIOWrapper(raw, newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, row])
    return path


def _circumstances() -> dict[str, object]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": _output("git", "describe", "--always", "--dirty"),
        "gpu": gpu,
        "num_gpus": torch.cuda.device_count(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cpu_cores": os.cpu_count(),
        "torch": torch.__version__,
    }


def _output(*command: str) -> str:
    """First line that a command prints, or "none" where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "none"
    return (done.stdout.splitlines() or ["none"])[0]
