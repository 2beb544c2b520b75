"""``dualpipe bench gemm``: its options. What is measured is in ``dualpipe_ext.bench.gemm``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dualpipe_ext.cli.bench.options import (
    JSON,
    ROUNDS,
    SIZE,
    WHAT,
    check_device,
    output_option,
    read_numbers,
    report,
    target_of,
)


def command(
    context: typer.Context,
    experts: Annotated[int, typer.Option(help="Experts.", rich_help_panel=SIZE)] = 128,
    rows: Annotated[int, typer.Option(help="Rows per expert.", rich_help_panel=SIZE)] = 256,
    hidden: Annotated[int, typer.Option(help="Values per row.", rich_help_panel=SIZE)] = 7168,
    inner: Annotated[
        int, typer.Option(help="Inner width of an expert.", rich_help_panel=SIZE)
    ] = 2048,
    sms: Annotated[
        str, typer.Option(help="Limits on the SMs; 0: all.", rich_help_panel=WHAT)
    ] = "0,112",
    rounds: Annotated[
        int, typer.Option(help="Numbers per variant.", rich_help_panel=WHAT)
    ] = ROUNDS,
    calls: Annotated[
        int, typer.Option(help="Calls in a row behind a number.", rich_help_panel=WHAT)
    ] = 10,
    device: Annotated[
        str, typer.Option(help="cuda, or cpu to try it out.", rich_help_panel=WHAT)
    ] = "cuda",
    output: Annotated[Path | None, output_option("gemm")] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Time the experts' products in BF16 and FP8, with all SMs and fewer, checked first."""
    from dualpipe_ext.bench.gemm import GemmOptions, print_rows, run
    from dualpipe_ext.bench.ranks import start

    check_device(device, small="gemm --device cpu --experts 4 --rows 50 --hidden 256 --inner 128")
    options = GemmOptions(
        experts=experts,
        rows=rows,
        hidden=hidden,
        inner=inner,
        sms=read_numbers("--sms", sms),
        rounds=rounds,
        calls=calls,
    )
    target = target_of("gemm", output)
    found = start(run, 1, options, virtual=True, device_type=device)
    report(found, target, context, print_rows, as_json=as_json)
