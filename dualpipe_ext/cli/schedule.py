"""``dualpipe schedule``: compare pipeline schedules on paper, draw them, export them.

What belongs here: the options, the table on the terminal, and handing the rest to
``dualpipe_ext.pipeline``. No torch, so that it answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dualpipe_ext.files import check_picture, check_target
from dualpipe_ext.pipeline.compare import Score, try_kind
from dualpipe_ext.pipeline.export import write_csv, write_trace
from dualpipe_ext.pipeline.plan import KINDS, normalise_kind
from dualpipe_ext.pipeline.simulate import Durations, Simulation


def command(
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Schedule: {', '.join(KINDS)}, or all. Repeat it to compare. [default: dualpipe]",
            show_default=False,
        ),
    ] = None,
    ranks: Annotated[int, typer.Option(help="Pipeline ranks.")] = 8,
    chunks: Annotated[int, typer.Option(help="Chunks (micro-batches) per step.")] = 20,
    out: Annotated[
        Path | None, typer.Option(help="Draw all schedules into this .svg, .png or .pdf.")
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(help="Write one schedule as torch.distributed.pipelining's action CSV."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write a trace for chrome://tracing or ui.perfetto.dev.")
    ] = None,
    f: Annotated[
        float, typer.Option(help="Time of a forward of 1/ranks of the model on one chunk.")
    ] = 1.0,
    b: Annotated[
        float | None, typer.Option(help="Time of its full backward. [default: I + W, or 2 F]")
    ] = None,
    i: Annotated[
        float | None, typer.Option(help="Time of its backward for the input. [default: B - W]")
    ] = None,
    w: Annotated[
        float | None, typer.Option(help="Time of its backward for weights. [default: B - I]")
    ] = None,
    fb: Annotated[
        float | None,
        typer.Option(help="Time of an overlapped pair. [default: F + B, nothing hidden]"),
    ] = None,
    comm: Annotated[
        float, typer.Option(help="Time until a result has reached the next rank.")
    ] = 0.0,
) -> None:
    """Compare pipeline schedules without a GPU: time, bubble, memory; draw and export them."""
    every = "all" in (name.lower() for name in kind or ())
    kinds = KINDS if every else tuple(dict.fromkeys(map(normalise_kind, kind or ["dualpipe"])))
    if csv is not None and len(kinds) != 1:
        raise ValueError(f"expected one --kind with --csv, got {len(kinds)}")
    if out is not None:
        check_picture(out)
    files = [path for path in (out, csv, trace) if path is not None]
    for path in files:
        check_target(path)
    durations = Durations(F=f, B=b, I=i, W=w, FB=fb, comm=comm)  # type: ignore[arg-type]
    scores, simulations = _try_all(kinds, durations, ranks, chunks, keep=bool(files))
    problems = [row.problem for row in scores if row.problem]
    if problems and (not every or len(problems) == len(scores)):
        raise ValueError(problems[0])
    console = Console(soft_wrap=True, highlight=False)
    _print_table(console, scores, durations, ranks, chunks)
    _write_files(console, simulations, out=out, csv=csv, trace=trace)


def _try_all(
    kinds: Sequence[str], durations: Durations, ranks: int, chunks: int, *, keep: bool
) -> tuple[list[Score], list[Simulation]]:
    """Every kind's score, and the simulations, which are large, if they are to be kept."""
    scores: list[Score] = []
    simulations: list[Simulation] = []
    for name in kinds:
        row, simulation = try_kind(name, num_ranks=ranks, num_chunks=chunks, durations=durations)
        scores.append(row)
        if keep and simulation is not None:
            simulations.append(simulation)
    return scores, simulations


def _print_table(
    console: Console, scores: list[Score], durations: Durations, ranks: int, chunks: int
) -> None:
    table = Table(title=f"{ranks} ranks, {chunks} chunks", title_justify="left")
    table.add_column("schedule")
    for heading in ("time", "bubble", "bubble %", "activations", "parameters"):
        table.add_column(heading, justify="right")
    shortest = min(row.makespan for row in scores if not row.problem)
    for row in scores:
        if row.problem:
            table.add_row(row.kind, *["-"] * 5, style="dim")
            continue
        table.add_row(
            row.kind,
            f"{row.makespan:.6g}",
            f"{row.bubble:.6g}",
            f"{row.bubble_ratio:.1%}",
            f"{row.peak_activations:.6g}",
            f"{row.parameter_copies:.6g}x",
            style="bold" if row.makespan == shortest and len(scores) > 1 else None,
        )
    console.print(table)
    times = ", ".join(
        f"{name} {value:.6g}"
        for name, value in (
            ("F", durations.F),
            ("B", durations.B),
            ("I", durations.I),
            ("W", durations.W),
            ("F&B", durations.FB),
            ("comm", durations.comm),
        )
    )
    console.print(f"Times for 1/{ranks} of the model and one chunk: {times}.")
    console.print(
        "Activations: most that a rank holds, 1 = one chunk through "
        f"1/{ranks} of the model. Parameters: 1x = 1/{ranks} of the model."
    )
    for row in scores:
        if row.problem:
            console.print(f"{row.kind}: {row.problem}")


def _write_files(
    console: Console,
    simulations: list[Simulation],
    *,
    out: Path | None,
    csv: Path | None,
    trace: Path | None,
) -> None:
    if out is not None:
        from dualpipe_ext.pipeline.draw import draw  # here, because matplotlib is slow to load

        draw(simulations, out)
        console.print(f"Wrote {out}")
    if trace is not None:
        write_trace(simulations, trace)
        console.print(f"Wrote {trace}")
    if csv is not None:
        plan = simulations[0].plan
        write_csv(plan, csv)
        console.print(f"Wrote {csv}")
        if plan.has_copies:
            console.print(
                f"torch.distributed.pipelining can parse it but not execute it: {plan.kind} has "
                f"{len(plan.pipes)} pipes, torch's runtime knows one."
            )
