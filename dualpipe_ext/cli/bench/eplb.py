"""``dualpipe bench eplb``: its options. What is measured is in ``dualpipe_ext.bench.eplb``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dualpipe_ext.cli.bench.options import JSON, output_option, report, target_of


def command(
    context: typer.Context,
    rounds: Annotated[int, typer.Option(help="Numbers per planner.")] = 20,
    balance: Annotated[bool, typer.Option(help="Also make the balanced plans.")] = True,
    output: Annotated[Path | None, output_option("eplb")] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Time the planner kernel against NumPy and plain loops; show the balance of its plans."""
    if rounds < 1:
        raise ValueError(f"expected --rounds of at least 1, got {rounds}")
    from dualpipe_ext.bench.eplb import CASES, measure, print_rows

    target = target_of("eplb", output)
    rows = (measure(case, rounds=rounds, balance=balance) for case in CASES)
    report(rows, target, context, print_rows, as_json=as_json)
