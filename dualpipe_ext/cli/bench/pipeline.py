"""``dualpipe bench pipeline``: its options, file and exit code.

What is measured is in ``dualpipe_ext.bench``, in the files that begin with ``pipeline_``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualpipe_ext.cli.arguments import given_or, takes
from dualpipe_ext.cli.bench.options import (
    JSON,
    OUTPUT,
    RANKS,
    ROUNDS,
    SIZE,
    WHAT,
    command_line,
    layers_of,
    output_option,
    read_numbers,
    read_processes,
    read_words,
    show,
    target_of,
)
from dualpipe_ext.files import check_picture, check_target

if TYPE_CHECKING:
    from dualpipe_ext.bench.pipeline_cases import PipelineOptions, PipelineRow

_TRANSPORTS = {"cuda": "nvlink,copy_engine,collective", "cpu": "collective"}
_PEAK = 989.0
_SMALL = (
    "pipeline --device cpu --dtype float32 --tokens 64 --hidden 256 --expert-hidden 128 "
    "--experts 8 --step-experts 8 --layers 1"
)


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
    device: Annotated[
        str, typer.Option(help="cuda, or cpu to try it out.", rich_help_panel=RANKS)
    ] = "cuda"
    transports: Annotated[
        str | None,
        typer.Option(
            help="How the pair's tokens travel. [default: nvlink,copy_engine,collective; "
            "on a CPU collective]",
            rich_help_panel=RANKS,
            show_default=False,
        ),
    ] = None
    sms: Annotated[
        str, typer.Option(help="Communication SMs for nvlink.", rich_help_panel=RANKS)
    ] = "24,8"
    pack_sms: Annotated[
        str | None,
        typer.Option(
            help="SMs that pack and unpack for copy_engine, or several. [default: the transport's]",
            rich_help_panel=RANKS,
            show_default=False,
        ),
    ] = None
    sm_means: Annotated[
        str | None,
        typer.Option(
            help="How the pair's compute is told of these SMs: none, persistent, yielding, "
            "carve_out, "
            "green_context, or several, each measured. [default: that of dualpipe train]",
            rich_help_panel=RANKS,
            show_default=False,
        ),
    ] = None
    parts: Annotated[str, typer.Option(help="pair, steps or both.", rich_help_panel=WHAT)] = (
        "pair,steps"
    )
    throttle: Annotated[
        bool,
        typer.Option(
            help="Also repeat communication until it takes as long as compute.",
            rich_help_panel=WHAT,
        ),
    ] = True
    slow_link: Annotated[
        str,
        typer.Option(
            help="What copy_engine repeats for that: copies to the host, at the rate of a network "
            "adapter, or to the peer.",
            rich_help_panel=WHAT,
        ),
    ] = "host"
    graphs: Annotated[
        bool,
        typer.Option(
            "--graphs",
            help="Measure the pair in all its forms as CUDA graphs, with bounded routing.",
            rich_help_panel=WHAT,
        ),
    ] = False
    schedules: Annotated[
        str | None,
        typer.Option(
            help="Schedules of the steps. [default: 1f1b,zb1p,dualpipe,dualpipev, those that the "
            "ranks can run]",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ] = None
    tokens: Annotated[
        int, typer.Option(help="Tokens per rank and micro-batch.", rich_help_panel=SIZE)
    ] = 4096
    seq_len: Annotated[
        int | None,
        typer.Option(
            help="Tokens per sequence. [default: all]", rich_help_panel=SIZE, show_default=False
        ),
    ] = None
    hidden: Annotated[int, typer.Option(help="Width.", rich_help_panel=SIZE)] = 7168
    expert_hidden: Annotated[
        int, typer.Option(help="Inner width of an expert.", rich_help_panel=SIZE)
    ] = 2048
    top_k: Annotated[int, typer.Option(help="Experts per token.", rich_help_panel=SIZE)] = 8
    experts: Annotated[
        int, typer.Option(help="Pair: experts over all ranks.", rich_help_panel=SIZE)
    ] = 256
    layers: Annotated[int, typer.Option(help="Pair: layers.", rich_help_panel=SIZE)] = 4
    ep: Annotated[
        int,
        typer.Option(
            help="Steps: expert-parallel ranks; the others are pipeline ranks.",
            rich_help_panel=RANKS,
        ),
    ] = 1
    step_experts: Annotated[
        int, typer.Option(help="Steps: experts, over --ep ranks.", rich_help_panel=SIZE)
    ] = 32
    step_layers: Annotated[
        int, typer.Option(help="Steps: layers per rank.", rich_help_panel=SIZE)
    ] = 2
    step_transport: Annotated[
        str, typer.Option(help="Steps: how tokens travel.", rich_help_panel=RANKS)
    ] = "auto"
    stage_transport: Annotated[
        str,
        typer.Option(
            help="Steps: how tensors travel from stage to stage: auto, copy_engine or collective.",
            rich_help_panel=RANKS,
        ),
    ] = "auto"
    num_chunks: Annotated[
        int | None,
        typer.Option(
            help="Steps: micro-batches. [default: 4 per pipeline rank]",
            rich_help_panel=SIZE,
            show_default=False,
        ),
    ] = None
    memory_level: Annotated[
        int, typer.Option(help="Activations kept, 0 (all) to 3.", rich_help_panel=SIZE)
    ] = 1
    dtype: Annotated[
        str, typer.Option(help="bfloat16, float32 or float64.", rich_help_panel=SIZE)
    ] = "bfloat16"
    peak_tflops: Annotated[float, typer.Option(help="Of a GPU, for MFU.", rich_help_panel=WHAT)] = (
        _PEAK
    )
    rounds: Annotated[int, typer.Option(help="Numbers per figure.", rich_help_panel=WHAT)] = ROUNDS
    calls: Annotated[
        int, typer.Option(help="Pairs in a row behind a number.", rich_help_panel=WHAT)
    ] = 4
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Draw the two streams of a pair, a file per transport: NAME-nvlink-24.png, ...",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    output: Annotated[Path | None, output_option("pipeline")] = None
    as_json: Annotated[bool, JSON] = False


@takes(Arguments)
def command(context: typer.Context, given: Arguments) -> None:
    """Measure how much communication an overlapped pair hides, and steps under each schedule.

    Layers as wide as DeepSeek-V3's. A pair is the forward of one micro-batch beside the backward of
    another, with experts over all ranks; a step runs a pipeline over all ranks (or ranks / --ep).
    Results are checked before anything is timed. Exit code 1: one was wrong, or nothing could be
    measured. The default sizes fit two GPUs of 141 GB.
    """
    if given.picture is not None:
        if given.device != "cuda":
            raise ValueError(f"expected --device cuda for --picture, got {given.device}")
        check_target(given.picture)
        check_picture(given.picture)
    if given.graphs and given.device != "cuda":
        raise ValueError(f"expected --device cuda for --graphs, got {given.device}")
    from dualpipe_ext.bench import pipeline_run
    from dualpipe_ext.bench.pipeline_cases import ERROR, FAILED, OK
    from dualpipe_ext.bench.pipeline_pair import DETERMINISTIC_ENVIRONMENT
    from dualpipe_ext.bench.pipeline_table import print_rows
    from dualpipe_ext.bench.ranks import start

    num_processes = read_processes(given.ranks, given.device, small=_SMALL)
    options = _options(given, num_processes)
    target = _target(given.output)
    record = partial(_record, target, command_line(context))
    rows = start(
        pipeline_run.run,
        num_processes,
        options,
        record,
        virtual=False,
        device_type=given.device,
        environment=DETERMINISTIC_ENVIRONMENT,
    )
    if rows is None:  # under torchrun, not the first rank
        return
    show([row.to_dict() for row in rows], target, print_rows, as_json=given.as_json)
    statuses = {row.status for row in rows}
    if statuses & {FAILED, ERROR} or OK not in statuses:
        raise typer.Exit(1)


def _options(given: Arguments, num_processes: int) -> PipelineOptions:
    """What to measure, once it is known that so many ranks can."""
    from dualpipe_ext.bench.pipeline_cases import PipelineOptions, usual_schedules
    from dualpipe_ext.sms import DEFAULT_MEANS
    from dualpipe_ext.training.config import DTYPES

    if given.dtype not in DTYPES:
        raise ValueError(f"expected --dtype of {', '.join(DTYPES)}, got {given.dtype!r}")
    pp = max(1, num_processes // max(1, given.ep))
    num_chunks = given_or(given.num_chunks, 4 * pp)
    usual = usual_schedules(pp, num_chunks)
    return PipelineOptions(
        parts=read_words(given.parts),
        model=layers_of(given).with_overrides(memory_level=given.memory_level),
        tokens=given.tokens,
        seq_len=given_or(given.seq_len, given.tokens),
        dtype=DTYPES[given.dtype],
        transports=_transports(given_or(given.transports, _TRANSPORTS[given.device])),
        sms=read_numbers("--sms", given.sms),
        pack_sms=() if given.pack_sms is None else read_numbers("--pack-sms", given.pack_sms),
        sm_means=read_words(given_or(given.sm_means, DEFAULT_MEANS)),
        throttle=given.throttle,
        slow_link=given.slow_link,
        graphs=given.graphs,
        schedules=usual if given.schedules is None else read_words(given.schedules),
        ep=given.ep,
        step_experts=given.step_experts,
        step_layers=given.step_layers,
        step_transport=given.step_transport,
        stage_transport=given.stage_transport,
        num_chunks=num_chunks,
        rounds=given.rounds,
        calls=given.calls,
        peak_tflops=given.peak_tflops,
        picture=given.picture,
    ).checked(num_processes)


def _record(target: Path, command: str, row: PipelineRow) -> None:
    from dualpipe_ext.bench.record import append

    append(target, command, [row.to_dict()])


def _transports(text: str) -> tuple[str, ...]:
    from dualpipe_ext.ep.registry import transport_names

    words = read_words(text)
    names = transport_names()[1:]  # without "auto": a row says what was used
    for word in words or (text,):
        if word not in names:
            raise ValueError(f"expected --transports of {', '.join(names)}, got {word!r}")
    return words


def _target(output: Path | None) -> Path:
    """Where rows go, once it is known that they can."""
    from dualpipe_ext.bench.pipeline_cases import columns
    from dualpipe_ext.bench.record import check_columns

    target = target_of("pipeline", output)
    check_columns(target, columns())
    return target
