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

from dualpipe_ext import env, hardware_queue
from dualpipe_ext.files import check_target, replacing

RESULTS = Path("benchmarks") / "results"


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile of the rounds of one measurement, as p20, p50 and p80.

    >>> percentiles([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    {'p20': 2.0, 'p50': 3.5, 'p80': 5.0}
    """
    ranks = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    found = torch.quantile(torch.tensor(values, dtype=torch.float64), ranks).tolist()
    return dict(zip(("p20", "p50", "p80"), found, strict=True))


def results_file(name: str) -> Path:
    """Where the rows that answer the question ``name`` go.

    ``benchmarks/results/<name>.csv`` of this project's repository if the current folder is inside
    one, else ``<name>.csv`` in the current folder.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        # Both, because other projects have benchmarks/results too.
        if (folder / RESULTS).is_dir() and (folder / "dualpipe_ext").is_dir():
            return folder / RESULTS / f"{name}.csv"
    return here / f"{name}.csv"


def check_columns(path: Path, columns: Sequence[str]) -> None:
    """Refuse with ``ValueError`` a file that :func:`append` could not append to.

    Args:
        path: the file, which need not exist.
        columns: keys of the rows to come, without what :func:`append` adds.
    """
    check_target(path)
    _read(path, [*_CIRCUMSTANCES, "command", *columns])


def append(path: Path, command: str, rows: Sequence[Mapping[str, object]]) -> Path:
    """Append rows to a CSV file, each with date, commit, machine and versions.

    Args:
        path: the file, made if there is none.
        command: what to type to measure it again. The file has it behind the variable of
            ``hardware_queue``, if that is set.
        rows: what was measured, at least one row; the same keys in every row of a file.

    Returns:
        ``path``.

    Raises:
        ValueError: the file has other columns, or cannot be there.
    """
    if hardware_queue.is_shared():
        command = f"{hardware_queue.VARIABLE}=1 {command}"
    shared = {**circumstances(), "command": command}
    new = [{**shared, **row} for row in rows]
    columns = list(new[0])
    old = _read(path, columns)
    with replacing(path) as raw, io.TextIOWrapper(raw, newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*old, *new])
    return path


def _read(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if reader.fieldnames and list(reader.fieldnames) != list(columns):
        raise ValueError(
            f"expected the columns {', '.join(columns)} in {path}, "
            f"got {', '.join(reader.fieldnames)}"
        )
    return rows


_CIRCUMSTANCES = ("date", "commit", "gpu", "num_gpus", "driver", "cpu_cores", "torch")


def circumstances() -> dict[str, object]:
    """When and on what this process runs: the first columns of every row.

    The commit is git's, or what ``DUALPIPE_COMMIT`` says where a tree was copied without its
    history.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    values = (
        datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        env.read("DUALPIPE_COMMIT") or _output("git", "describe", "--always", "--dirty"),
        gpu,
        torch.cuda.device_count(),
        _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        os.cpu_count(),
        torch.__version__,
    )
    return dict(zip(_CIRCUMSTANCES, values, strict=True))


def _output(*command: str) -> str:
    """First line that a command prints, or "none" where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "none"
    return (done.stdout.splitlines() or ["none"])[0]
