"""What scripts of ``benchmarks/`` that measure on all GPUs have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dualpipe_ext.bench import ranks
from dualpipe_ext.bench.record import append, results_file

Row = dict[str, object]


def add_numbers(parser: argparse.ArgumentParser, defaults: Mapping[str, int]) -> None:
    """An option for each whole number."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)


def run(
    name: str,
    command: list[str],
    measure: Callable[[ranks.Ranks, Any], list[Row]],
    options: object,
    line: Callable[[Row], str],
) -> None:
    """Measure with a rank per GPU, print a line per row, and append the rows.

    Args:
        name: of the file in ``benchmarks/results``.
        command: words to type to measure it again.
        measure: called on every rank, with ``options``; the rows of rank 0 count.
        line: tells what a row says.
    """
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        raise SystemExit("expected a GPU that torch can use, got none")
    rows = ranks.start(measure, num_gpus, options, virtual=False, device_type="cuda")
    if rows is None:
        return  # another rank of torchrun
    for row in rows:
        print(line(row))
    print(f"recorded in {append(results_file(name), ' '.join(command), rows)}")
