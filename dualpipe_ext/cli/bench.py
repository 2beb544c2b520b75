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


def _ranks(
    ranks: int | None,
    virtual_ranks: int | None,
    device: str,
    *,
    small: str = "ep --device cpu --tokens 64 --hidden 256 --experts 16",
) -> tuple[int, bool]:
    """How many ranks, and whether they are virtual; ``small`` is what a CPU can run."""
    import os

    import torch

    from dualpipe_ext.bench.ranks import under_torchrun

    if device not in _TRANSPORTS:
        raise ValueError(f"expected --device of {', '.join(_TRANSPORTS)}, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"expected a GPU, got none; to try it out on the CPU: dualpipe bench {small}"
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
    rows = []
    for case in CASES:
        rows.append(measure(case, rounds=rounds, balance=balance))
        # At once: what has been measured is not lost with a later case.
        append(target, _command(context), rows[-1:])
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        print_rows(rows)
        typer.echo(f"Wrote {target}")


@app.command()
def memory(
    context: typer.Context,
    ranks: Annotated[
        int | None,
        typer.Option(
            help="Processes. [default: one per GPU; on a CPU 1]",
            rich_help_panel=_RANKS,
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cuda, or cpu to try it out.", rich_help_panel=_RANKS)
    ] = "cuda",
    layers: Annotated[int, typer.Option(help="Layers.", rich_help_panel=_SIZE)] = 2,
    tokens: Annotated[
        int, typer.Option(help="Tokens per rank and micro-batch.", rich_help_panel=_SIZE)
    ] = 4096,
    seq_len: Annotated[
        int | None,
        typer.Option(
            help="Tokens per sequence. [default: all]", rich_help_panel=_SIZE, show_default=False
        ),
    ] = None,
    in_flight: Annotated[
        int, typer.Option(help="Micro-batches kept at a time.", rich_help_panel=_SIZE)
    ] = 4,
    hidden: Annotated[int, typer.Option(help="Width.", rich_help_panel=_SIZE)] = 7168,
    experts: Annotated[
        int, typer.Option(help="Experts over all ranks.", rich_help_panel=_SIZE)
    ] = 64,
    expert_hidden: Annotated[
        int, typer.Option(help="Inner width of an expert.", rich_help_panel=_SIZE)
    ] = 2048,
    top_k: Annotated[int, typer.Option(help="Experts per token.", rich_help_panel=_SIZE)] = 8,
    dtype: Annotated[
        str, typer.Option(help="bfloat16, float32 or float64.", rich_help_panel=_SIZE)
    ] = "bfloat16",
    transport: Annotated[
        str, typer.Option(help="How tokens reach their experts.", rich_help_panel=_RANKS)
    ] = "auto",
    rounds: Annotated[int, typer.Option(help="Steps per level.", rich_help_panel=_WHAT)] = _ROUNDS,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Append rows to this CSV file. "
            "[default: benchmarks/results/memory.csv in the repository, else ./memory.csv]",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, no table.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Measure what each memory level saves and costs, against plain autograd (level 0)."""
    from dualpipe_ext.bench import memory as bench
    from dualpipe_ext.bench.ranks import start
    from dualpipe_ext.bench.record import append, results_file
    from dualpipe_ext.models import ModelConfig
    from dualpipe_ext.training.config import DTYPES

    num_ranks = _processes(ranks, device)
    if dtype not in DTYPES:
        raise ValueError(f"expected --dtype of {', '.join(DTYPES)}, got {dtype!r}")
    options = bench.MemoryOptions(
        model=ModelConfig(
            hidden=hidden,
            num_layers=layers,
            num_heads=max(1, hidden // 128),
            num_experts=experts,
            top_k=top_k,
            num_groups=1,
            top_groups=1,
            expert_hidden=expert_hidden,
            shared_hidden=expert_hidden,
        ),
        tokens=tokens,
        seq_len=tokens if seq_len is None else seq_len,
        in_flight=in_flight,
        dtype=DTYPES[dtype],
        transport=transport,
        rounds=rounds,
    ).checked(num_ranks)
    target = results_file("memory") if output is None else output
    check_target(target)
    rows = start(bench.run, num_ranks, options, virtual=False, device_type=device)
    if rows is None:  # under torchrun, not the first rank
        return
    append(target, _command(context), rows)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        bench.print_rows(rows)
        typer.echo(f"Wrote {target}")


def _processes(ranks: int | None, device: str) -> int:
    """How many ranks, each a process: by default all GPUs, and one on a CPU."""
    if device == "cpu" and ranks is None:
        ranks = 1
    if device == "cuda" and ranks is None:
        import torch

        ranks = max(1, torch.cuda.device_count())
    return _ranks(ranks, None, device, small="memory --device cpu --hidden 256 --tokens 64")[0]


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
