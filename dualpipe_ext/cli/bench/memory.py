"""``dualpipe bench memory``: its options. What is measured is in ``dualpipe_ext.bench.memory``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from dualpipe_ext.cli.arguments import given_or, takes
from dualpipe_ext.cli.bench.options import (
    JSON,
    RANKS,
    ROUNDS,
    SIZE,
    WHAT,
    layers_of,
    output_option,
    read_processes,
    report,
    target_of,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """What the command line says."""

    ranks: Annotated[
        int | None,
        typer.Option(
            help="Processes. [default: one per GPU; on a CPU 1]",
            rich_help_panel=RANKS,
            show_default=False,
        ),
    ] = None
    device: Annotated[
        str, typer.Option(help="cuda, or cpu to try it out.", rich_help_panel=RANKS)
    ] = "cuda"
    layers: Annotated[int, typer.Option(help="Layers.", rich_help_panel=SIZE)] = 2
    tokens: Annotated[
        int, typer.Option(help="Tokens per rank and micro-batch.", rich_help_panel=SIZE)
    ] = 4096
    seq_len: Annotated[
        int | None,
        typer.Option(
            help="Tokens per sequence. [default: all]", rich_help_panel=SIZE, show_default=False
        ),
    ] = None
    in_flight: Annotated[
        int, typer.Option(help="Micro-batches kept at a time.", rich_help_panel=SIZE)
    ] = 4
    hidden: Annotated[int, typer.Option(help="Width.", rich_help_panel=SIZE)] = 7168
    experts: Annotated[int, typer.Option(help="Experts over all ranks.", rich_help_panel=SIZE)] = 64
    expert_hidden: Annotated[
        int, typer.Option(help="Inner width of an expert.", rich_help_panel=SIZE)
    ] = 2048
    top_k: Annotated[int, typer.Option(help="Experts per token.", rich_help_panel=SIZE)] = 8
    dtype: Annotated[
        str, typer.Option(help="bfloat16, float32 or float64.", rich_help_panel=SIZE)
    ] = "bfloat16"
    transport: Annotated[
        str, typer.Option(help="How tokens reach their experts.", rich_help_panel=RANKS)
    ] = "auto"
    rounds: Annotated[int, typer.Option(help="Steps per level.", rich_help_panel=WHAT)] = ROUNDS
    output: Annotated[Path | None, output_option("memory")] = None
    as_json: Annotated[bool, JSON] = False


@takes(Arguments)
def command(context: typer.Context, given: Arguments) -> None:
    """Measure what each memory level saves and costs, against plain autograd (level 0)."""
    from dualpipe_ext.bench import memory as bench
    from dualpipe_ext.bench.ranks import start
    from dualpipe_ext.training.config import DTYPES

    small = "memory --device cpu --hidden 256 --tokens 64"
    num_processes = read_processes(given.ranks, given.device, small=small, on_cpu=1)
    if given.dtype not in DTYPES:
        raise ValueError(f"expected --dtype of {', '.join(DTYPES)}, got {given.dtype!r}")
    options = bench.MemoryOptions(
        model=layers_of(given),
        tokens=given.tokens,
        seq_len=given_or(given.seq_len, given.tokens),
        in_flight=given.in_flight,
        dtype=DTYPES[given.dtype],
        transport=given.transport,
        rounds=given.rounds,
    ).checked(num_processes)
    target = target_of("memory", given.output)
    rows = start(bench.run, num_processes, options, virtual=False, device_type=given.device)
    if rows is None:  # under torchrun, not the first rank
        return
    report(rows, target, context, bench.print_rows, as_json=given.as_json)
