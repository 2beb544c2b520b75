"""``dualpipe bench``: measure this package on this machine, against what there is without it.

What belongs here: the options of each benchmark, and where its figures go. What is measured, and
how, is in ``dualpipe_ext.bench``.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualpipe_ext.files import check_picture, check_target

if TYPE_CHECKING:
    from dualpipe_ext.bench.ep_result import EpRow

app = typer.Typer(rich_markup_mode=None, add_completion=False)

_SIZE, _RANKS, _WHAT, _OUTPUT = "Size", "Ranks", "What to measure", "Output"
_SMS, _QUICK_SMS = "8,16,24,64", "8,24"
_ROUNDS, _QUICK_ROUNDS = 5, 2
_CALLS, _QUICK_CALLS = 30, 10
_TRANSPORTS = {"cuda": "nvlink,copy_engine,nccl", "cpu": "collective,gloo"}
# Of one GPU, where there are no others.
_DEFAULT_VIRTUAL_RANKS = 2


@app.callback(invoke_without_command=True)
def benchmarks(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def ep(
    context: typer.Context,
    ranks: Annotated[
        int | None,
        typer.Option(
            help="Processes. [default: one per GPU; on a CPU 2]",
            rich_help_panel=_RANKS,
            show_default=False,
        ),
    ] = None,
    virtual_ranks: Annotated[
        int | None,
        typer.Option(
            help=f"Ranks on one GPU instead. [default: {_DEFAULT_VIRTUAL_RANKS} if there is one]",
            rich_help_panel=_RANKS,
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cuda, or cpu to try it out.", rich_help_panel=_RANKS)
    ] = "cuda",
    tokens: Annotated[int, typer.Option(help="Tokens per rank.", rich_help_panel=_SIZE)] = 4096,
    hidden: Annotated[int, typer.Option(help="Values per token.", rich_help_panel=_SIZE)] = 7168,
    experts: Annotated[
        int, typer.Option(help="Experts over all ranks.", rich_help_panel=_SIZE)
    ] = 256,
    top_k: Annotated[int, typer.Option(help="Experts per token.", rich_help_panel=_SIZE)] = 8,
    transports: Annotated[
        str | None,
        typer.Option(
            help="Of nvlink, copy_engine, collective, nccl, gloo. "
            f"[default: {_TRANSPORTS['cuda']}; on a CPU {_TRANSPORTS['cpu']}]",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    sms: Annotated[
        str | None,
        typer.Option(
            help=f"SM counts for nvlink. [default: {_SMS}; quick: {_QUICK_SMS}]",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    what: Annotated[
        str | None,
        typer.Option(
            help="Cases, or beginnings of their names, as dispatch-fp8. [default: all]",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    gemm: Annotated[bool, typer.Option(help="Also beside a GEMM.", rich_help_panel=_WHAT)] = True,
    rounds: Annotated[
        int | None,
        typer.Option(
            help=f"Numbers per case. [default: {_ROUNDS}; quick: {_QUICK_ROUNDS}]",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    calls: Annotated[
        int | None,
        typer.Option(
            help=f"Calls in a row behind a number. [default: {_CALLS}; quick: {_QUICK_CALLS}]",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer of everything.", rich_help_panel=_WHAT)
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw into this .svg, .png or .pdf.", rich_help_panel=_OUTPUT),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Append rows to this CSV file. "
            "[default: benchmarks/results/ep.csv in the repository, else ./ep.csv]",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, no table.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Time expert-parallel dispatch and combine, checked first, against NCCL and plain copies.

    A time is that of whole calls as a user makes them: many in a row between two CUDA events, the
    median of several rounds, of the slowest rank. Exit code 1: a result was wrong, or nothing could
    be measured. Under torchrun: its processes, on all its hosts.
    """
    if picture is not None:
        check_target(picture)
        check_picture(picture)
    # Here, not at the top: --help must not wait for torch.
    from dualpipe_ext.bench import ep_run
    from dualpipe_ext.bench.ep_cases import EpOptions, select_cases
    from dualpipe_ext.bench.ranks import start

    num_ranks, virtual = _ranks(ranks, virtual_ranks, device)
    options = EpOptions(
        tokens=tokens,
        hidden=hidden,
        experts=experts,
        top_k=top_k,
        transports=_transports(_TRANSPORTS[device] if transports is None else transports),
        sms=_numbers("--sms", sms or (_QUICK_SMS if quick else _SMS)),
        rounds=rounds if rounds is not None else _QUICK_ROUNDS if quick else _ROUNDS,
        calls=calls if calls is not None else _QUICK_CALLS if quick else _CALLS,
        cases=select_cases(None if what is None else _words(what)),
        gemm=gemm,
    ).checked(num_ranks)
    target = _target(output)
    rows = start(ep_run.run, num_ranks, options, virtual=virtual, device_type=device)
    if rows is not None:
        _report(rows, target, picture, _command(context), as_json=as_json)


def _ranks(ranks: int | None, virtual_ranks: int | None, device: str) -> tuple[int, bool]:
    """How many ranks, and whether they are virtual."""
    import os

    import torch

    from dualpipe_ext.bench.ranks import under_torchrun

    if device not in _TRANSPORTS:
        raise ValueError(f"expected --device of {', '.join(_TRANSPORTS)}, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "expected a GPU, got none; to try it out on the CPU: dualpipe bench ep --device cpu "
            "--tokens 64 --hidden 256 --experts 16"
        )
    for name, value in (("--ranks", ranks), ("--virtual-ranks", virtual_ranks)):
        if value is not None and value < 1:
            raise ValueError(f"expected {name} of at least 1, got {value}")
    if ranks is not None and virtual_ranks is not None:
        raise ValueError("expected --ranks or --virtual-ranks, got both")
    if under_torchrun():
        started = int(os.environ["WORLD_SIZE"])
        if virtual_ranks is not None or ranks not in (None, started):
            raise ValueError(f"expected the {started} ranks that torchrun started, got others")
        return started, False
    if virtual_ranks is not None:
        return virtual_ranks, True
    if device == "cpu":
        return 2 if ranks is None else ranks, False
    num_gpus = torch.cuda.device_count()
    if ranks is None:
        return (num_gpus, False) if num_gpus > 1 else (_DEFAULT_VIRTUAL_RANKS, True)
    if ranks > num_gpus:
        raise ValueError(
            f"expected --ranks of at most {num_gpus} GPUs, got {ranks}; --virtual-ranks {ranks} "
            "runs them on one"
        )
    return ranks, False


@app.command()
def eplb(
    context: typer.Context,
    rounds: Annotated[int, typer.Option(help="Numbers per planner.")] = 20,
    balance: Annotated[bool, typer.Option(help="Also make the balanced plans.")] = True,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Append rows to this CSV file. "
            "[default: benchmarks/results/eplb.csv in the repository, else ./eplb.csv]",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, no table.")] = False,
) -> None:
    """Time the planner kernel against NumPy and plain loops; show the balance of its plans."""
    if rounds < 1:
        raise ValueError(f"expected --rounds of at least 1, got {rounds}")
    from dualpipe_ext.bench.eplb import CASES, measure, print_rows
    from dualpipe_ext.bench.record import append, results_file

    target = results_file("eplb") if output is None else output
    check_target(target)
    rows = [measure(case, rounds=rounds, balance=balance) for case in CASES]
    append(target, _command(context), rows)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        print_rows(rows)
        typer.echo(f"Wrote {target}")


@app.command()
def gemm(
    context: typer.Context,
    experts: Annotated[int, typer.Option(help="Experts.", rich_help_panel=_SIZE)] = 128,
    rows: Annotated[int, typer.Option(help="Rows per expert.", rich_help_panel=_SIZE)] = 256,
    hidden: Annotated[int, typer.Option(help="Values per row.", rich_help_panel=_SIZE)] = 7168,
    inner: Annotated[
        int, typer.Option(help="Inner width of an expert.", rich_help_panel=_SIZE)
    ] = 2048,
    sms: Annotated[
        str, typer.Option(help="Limits on the SMs; 0: all.", rich_help_panel=_WHAT)
    ] = "0,112",
    rounds: Annotated[
        int, typer.Option(help="Numbers per variant.", rich_help_panel=_WHAT)
    ] = _ROUNDS,
    calls: Annotated[
        int, typer.Option(help="Calls in a row behind a number.", rich_help_panel=_WHAT)
    ] = _QUICK_CALLS,
    device: Annotated[
        str, typer.Option(help="cuda, or cpu to try it out.", rich_help_panel=_WHAT)
    ] = "cuda",
    output: Annotated[
        Path | None,
        typer.Option(
            help="Append rows to this CSV file. "
            "[default: benchmarks/results/gemm.csv in the repository, else ./gemm.csv]",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, no table.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Time the experts' products in BF16 and FP8, with all SMs and fewer, checked first."""
    import torch

    from dualpipe_ext.bench.gemm import GemmOptions, print_rows, run
    from dualpipe_ext.bench.ranks import start
    from dualpipe_ext.bench.record import append, results_file

    if device not in _TRANSPORTS:
        raise ValueError(f"expected --device of {', '.join(_TRANSPORTS)}, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "expected a GPU, got none; to try it out on the CPU: dualpipe bench gemm --device cpu "
            "--experts 4 --rows 50 --hidden 256 --inner 128"
        )
    options = GemmOptions(
        experts=experts,
        rows=rows,
        hidden=hidden,
        inner=inner,
        sms=_numbers("--sms", sms),
        rounds=rounds,
        calls=calls,
    )
    target = results_file("gemm") if output is None else output
    check_target(target)
    found = start(run, 1, options, virtual=True, device_type=device)
    append(target, _command(context), found)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_rows(found)
        typer.echo(f"Wrote {target}")


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(word) for word in _words(text))
    except ValueError:
        numbers = ()
    if not numbers:
        raise ValueError(f"expected {name} as integers separated by commas, got {text!r}")
    return numbers


def _transports(text: str) -> tuple[str, ...]:
    from dualpipe_ext.bench.ep_variants import TRANSPORTS

    words = _words(text)
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


def _command(context: typer.Context) -> str:
    """What to type to measure the same again: the options that were given, but for outputs."""
    words = ["dualpipe", "bench", context.info_name or ""]
    for parameter in context.command.params:
        name = parameter.name
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or name in ("picture", "output"):
            continue
        value = context.params[name]
        if isinstance(value, bool):
            words.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            words += [parameter.opts[0], str(value)]
    return shlex.join(word for word in words if word != "--json")


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
