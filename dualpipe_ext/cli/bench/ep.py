"""``dualpipe bench ep``: its options, files and exit code.

What is measured is in ``dualpipe_ext.bench``, in the files that begin with ``ep_``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualpipe_ext.cli.arguments import given_or, takes
from dualpipe_ext.cli.bench.options import (
    DEFAULT_VIRTUAL_RANKS,
    JSON,
    OUTPUT,
    RANKS,
    ROUNDS,
    SIZE,
    WHAT,
    command_line,
    output_option,
    read_numbers,
    read_ranks,
    read_words,
)
from dualpipe_ext.files import check_picture, check_target

if TYPE_CHECKING:
    from dualpipe_ext.bench.ep_result import EpRow

_SMS, _QUICK_SMS = "8,16,24,64", "8,24"
_QUICK_ROUNDS = 2
_CALLS, _QUICK_CALLS = 30, 10
_TRANSPORTS = {"cuda": "nvlink,copy_engine,nccl", "cpu": "collective,gloo"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """What the command line says."""

    ranks: Annotated[
        int | None,
        typer.Option(
            help="Processes. [default: one per GPU; on a CPU 2]",
            rich_help_panel=RANKS,
            show_default=False,
        ),
    ] = None
    virtual_ranks: Annotated[
        int | None,
        typer.Option(
            help=f"Ranks on one GPU instead. [default: {DEFAULT_VIRTUAL_RANKS} if there is one]",
            rich_help_panel=RANKS,
            show_default=False,
        ),
    ] = None
    device: Annotated[
        str, typer.Option(help="cuda, or cpu to try it out.", rich_help_panel=RANKS)
    ] = "cuda"
    tokens: Annotated[int, typer.Option(help="Tokens per rank.", rich_help_panel=SIZE)] = 4096
    hidden: Annotated[int, typer.Option(help="Values per token.", rich_help_panel=SIZE)] = 7168
    experts: Annotated[int, typer.Option(help="Experts over all ranks.", rich_help_panel=SIZE)] = (
        256
    )
    top_k: Annotated[int, typer.Option(help="Experts per token.", rich_help_panel=SIZE)] = 8
    transports: Annotated[
        str | None,
        typer.Option(
            help="Of nvlink, copy_engine, low_latency, collective, nccl, gloo. "
            f"[default: {_TRANSPORTS['cuda']}; on a CPU {_TRANSPORTS['cpu']}]",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ] = None
    sms: Annotated[
        str | None,
        typer.Option(
            help=f"SM counts for kernels and a plain push. [default: {_SMS}; quick: {_QUICK_SMS}]",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ] = None
    what: Annotated[
        str | None,
        typer.Option(
            help="Cases, or beginnings of their names, as dispatch-fp8. [default: all]",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ] = None
    gemm: Annotated[bool, typer.Option(help="Also beside a GEMM.", rich_help_panel=WHAT)] = True
    rounds: Annotated[
        int | None,
        typer.Option(
            help=f"Numbers per case. [default: {ROUNDS}; quick: {_QUICK_ROUNDS}]",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ] = None
    calls: Annotated[
        int | None,
        typer.Option(
            help=f"Calls in a row behind a number. [default: {_CALLS}; quick: {_QUICK_CALLS}]",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ] = None
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer of everything.", rich_help_panel=WHAT)
    ] = False
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw into this .svg, .png or .pdf.", rich_help_panel=OUTPUT),
    ] = None
    output: Annotated[Path | None, output_option("ep")] = None
    as_json: Annotated[bool, JSON] = False


@takes(Arguments)
def command(context: typer.Context, given: Arguments) -> None:
    """Time expert-parallel dispatch and combine, checked first, against NCCL and what links give.

    What links give: a plain push of the same rows with as many SMs, and plain copies. A time is
    that of whole calls as a user makes them: many in a row between two CUDA events, the
    median of several rounds, of the slowest rank. Exit code 1: a result was wrong, or nothing could
    be measured. Under torchrun: its processes, on all its hosts.
    """
    if given.picture is not None:
        check_target(given.picture)
        check_picture(given.picture)
    # Here, not at the top: --help must not wait for torch.
    from dualpipe_ext.bench import ep_run
    from dualpipe_ext.bench.ep_cases import EpOptions, select_cases
    from dualpipe_ext.bench.ranks import start

    small = "ep --device cpu --tokens 64 --hidden 256 --experts 16"
    size, virtual = read_ranks(given.ranks, given.virtual_ranks, given.device, small=small)
    options = EpOptions(
        tokens=given.tokens,
        hidden=given.hidden,
        experts=given.experts,
        top_k=given.top_k,
        transports=_transports(given_or(given.transports, _TRANSPORTS[given.device])),
        sms=read_numbers("--sms", given.sms or (_QUICK_SMS if given.quick else _SMS)),
        rounds=given_or(given.rounds, _QUICK_ROUNDS if given.quick else ROUNDS),
        calls=given_or(given.calls, _QUICK_CALLS if given.quick else _CALLS),
        cases=select_cases(None if given.what is None else read_words(given.what)),
        gemm=given.gemm,
    ).checked(size)
    target = _target(given.output)
    rows = start(ep_run.run, size, options, virtual=virtual, device_type=given.device)
    if rows is not None:
        _report(rows, target, given.picture, command_line(context), as_json=given.as_json)


def _transports(text: str) -> tuple[str, ...]:
    from dualpipe_ext.bench.ep_variants import TRANSPORTS

    words = read_words(text)
    for word in words or (text,):
        if word not in TRANSPORTS:
            raise ValueError(f"expected --transports of {', '.join(TRANSPORTS)}, got {word!r}")
    return words


def _target(output: Path | None) -> Path:
    """Where rows go, once it is known that they can."""
    from dualpipe_ext.bench.ep_result import columns
    from dualpipe_ext.bench.record import check_columns, results_file

    path = results_file("ep") if output is None else output
    check_columns(path, columns())
    return path


def _report(
    rows: list[EpRow], target: Path, picture: Path | None, command: str, *, as_json: bool
) -> None:
    """Print, record and draw; exit code 1 if a result was wrong or there is none."""
    from dualpipe_ext.bench.ep_result import ERROR, FAILED, OK
    from dualpipe_ext.bench.record import append, circumstances

    facts = circumstances()
    append(target, command, [row.to_dict() for row in rows])
    written = [target]
    if picture is not None:
        from dualpipe_ext.bench.ep_picture import draw

        draw(rows, picture, str(facts["gpu"]))
        written.append(picture)
    if as_json:
        document = {**facts, "command": command, "rows": [row.to_dict() for row in rows]}
        typer.echo(json.dumps(document, indent=1))
    else:
        from dualpipe_ext.bench.ep_table import print_table

        print_table(rows, str(facts["gpu"]))
        for path in written:
            typer.echo(f"Wrote {path}")
    statuses = {row.status for row in rows}
    if statuses & {FAILED, ERROR} or OK not in statuses:
        raise typer.Exit(1)
