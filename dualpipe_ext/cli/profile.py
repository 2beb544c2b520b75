"""``dualpipe profile``: how much communication a profiler trace hides, and where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dualpipe_ext.files import check_picture, check_target, replacing
from dualpipe_ext.profiling.report import OverlapReport, analyze
from dualpipe_ext.profiling.trace import COMM_PATTERNS, WAIT_PATTERNS, Trace, read_trace


def command(
    trace: Annotated[
        Path, typer.Argument(help="Trace exported by torch.profiler (.json or .json.gz).")
    ],
    comm: Annotated[
        list[str] | None,
        typer.Option(
            help="Regular expression for the names of communication kernels; repeat it for "
            "several. [default: DeepSeek's, DeepEP's, NCCL's, NVSHMEM's and our own]",
            show_default=False,
        ),
    ] = None,
    waiting: Annotated[
        list[str] | None,
        typer.Option(
            help="The same for communication kernels that only wait for other ranks. "
            f"[default: {' '.join(WAIT_PATTERNS)}]",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        int | None, typer.Option(help="GPU to look at. [default: the first in the trace]")
    ] = None,
    num_gaps: Annotated[
        int, typer.Option("--gaps", help="How many of the longest gaps to list.")
    ] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Draw both kinds of work into this .svg, .png or .pdf.")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write all figures into this file.")
    ] = None,
) -> None:
    """Report how much of the communication in a profiler trace is hidden behind compute.

    Hidden is communication intersected with compute, over communication, as intervals in time.
    """
    if num_gaps < 0:
        raise ValueError(f"expected --gaps of at least 0, got {num_gaps}")
    if out is not None:
        check_picture(out)
    for path in (out, as_json):
        if path is not None:
            check_target(path)
    found = read_trace(
        trace, comm=comm or COMM_PATTERNS, waiting=waiting or WAIT_PATTERNS, device=device
    )
    report = analyze(found)
    console = Console(soft_wrap=True, highlight=False)
    _print_figures(console, report)
    _print_phases(console, report)
    _print_gaps(console, report, num_gaps)
    _write(console, found, report, out=out, as_json=as_json)


def _write(
    console: Console, found: Trace, report: OverlapReport, *, out: Path | None, as_json: Path | None
) -> None:
    if as_json is not None:
        with replacing(as_json) as file:
            file.write((json.dumps(report.to_dict(), indent=1) + "\n").encode())
        console.print(f"Wrote {as_json}")
    if out is not None:
        from dualpipe_ext.profiling.picture import draw_overlap  # matplotlib is slow to load

        draw_overlap(found, report, out)
        console.print(f"Wrote {out}")


def _print_figures(console: Console, report: OverlapReport) -> None:
    table = Table(show_header=False)
    share = report.waiting_us / report.communication_us if report.communication_us else 0.0
    of_sms = f" of {report.num_sms}" if report.num_sms else ""
    for name, value in (
        ("span", _ms(report.span_us)),
        ("compute busy", _ms(report.compute_us)),
        ("communication busy", _ms(report.communication_us)),
        ("  moving data", _ms(report.transfer_us)),
        ("  waiting for ranks", f"{_ms(report.waiting_us)} ({share:.1%})"),
        ("communication hidden", f"{report.hidden:.1%}"),
        ("serial over overlapped", f"{report.speed_up:.2f}x"),
        ("SMs communicating", f"{report.comm_ctas}{of_sms}"),
    ):
        table.add_row(name, value)
    console.print(table)


def _print_phases(console: Console, report: OverlapReport) -> None:
    if not report.phases:
        return
    table = Table(title="per phase", title_justify="left")
    table.add_column("phase")
    for heading in ("compute", "communication", "hidden"):
        table.add_column(heading, justify="right")
    for phase in report.phases:
        hidden = f"{phase.hidden:.1%}" if phase.communication_us else "-"
        table.add_row(phase.name, _ms(phase.compute_us), _ms(phase.communication_us), hidden)
    console.print(table)


def _print_gaps(console: Console, report: OverlapReport, count: int) -> None:
    if not report.gaps or not count:
        return
    table = Table(title="longest stretches without compute", title_justify="left")
    for heading in ("at", "for", "communicating"):
        table.add_column(heading, justify="right")
    table.add_column("phase held up")
    for gap in report.gaps[:count]:
        table.add_row(
            _ms(gap.start_us), _ms(gap.duration_us), _ms(gap.communicating_us), gap.phase or "-"
        )
    console.print(table)


def _ms(microseconds: float) -> str:
    return f"{microseconds / 1e3:.3g} ms" if microseconds < 1e5 else f"{microseconds / 1e3:.1f} ms"
