"""``dualpipe train``: a MoE language model under DualPipe, on whatever this machine has."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from dualpipe_ext import env
from dualpipe_ext.cli.arguments import given_or, takes

if TYPE_CHECKING:
    from dualpipe_ext.models import ModelConfig
    from dualpipe_ext.training import RunOptions, TrainConfig

_MODEL, _RUN, _PARALLEL = "Model", "Run", "Parallelism"


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """What the command line says."""

    steps: Annotated[int, typer.Option(help="Optimizer steps.", rich_help_panel=_RUN)] = 300
    data: Annotated[
        Path | None,
        typer.Option(
            help="Training text; by default the standard library's source.", rich_help_panel=_RUN
        ),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; by default runs/<time>.", rich_help_panel=_RUN),
    ] = None
    resume: Annotated[
        Path | None,
        typer.Option(help="Checkpoint, or a run's folder, to go on from.", rich_help_panel=_RUN),
    ] = None
    save_every: Annotated[
        int, typer.Option(help="Steps between checkpoints; 0: the end only.", rich_help_panel=_RUN)
    ] = 0
    compare_unbalanced: Annotated[
        bool,
        typer.Option(
            help="Then take some steps without replicas and re-placement; show both step times.",
            rich_help_panel=_RUN,
        ),
    ] = False
    seed: Annotated[int, typer.Option(help="Seed of everything.", rich_help_panel=_RUN)] = 0
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=_RUN)] = 3e-3
    batch: Annotated[
        int | None,
        typer.Option(
            help="Sequences per step over all ranks; by default 2 per rank and micro-batch, on "
            "GPUs 32, or 64 where tokens travel.",
            rich_help_panel=_RUN,
        ),
    ] = None
    seq_len: Annotated[
        int | None,
        typer.Option(
            help="Tokens per sequence; by default 128, on GPUs 1024.", rich_help_panel=_RUN
        ),
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float64; by default bfloat16 on GPUs.", rich_help_panel=_RUN
        ),
    ] = None
    memory_level: Annotated[
        int,
        typer.Option(
            help="Activations kept for the backward: 0 all, 1 recompute norms and SwiGLU and keep "
            "no outputs of experts, 2 also rows of experts in FP8, 3 also SwiGLU's inputs in FP8.",
            rich_help_panel=_RUN,
        ),
    ] = 1
    ema: Annotated[
        float | None,
        typer.Option(
            help="Decay of an average of the parameters on the CPU, as 0.999.",
            rich_help_panel=_RUN,
        ),
    ] = None
    ema_dtype: Annotated[
        str, typer.Option(help="Of that average: float32 or bfloat16.", rich_help_panel=_RUN)
    ] = "float32"
    schedule: Annotated[
        str,
        typer.Option(help="dualpipe, dualpipev, 1f1b, zb1p or zbv.", rich_help_panel=_PARALLEL),
    ] = "dualpipev"
    pp: Annotated[int | None, typer.Option(help="Pipeline ranks.", rich_help_panel=_PARALLEL)] = (
        None
    )
    ep: Annotated[
        int | None, typer.Option(help="Expert-parallel ranks.", rich_help_panel=_PARALLEL)
    ] = None
    chunks: Annotated[
        int | None, typer.Option(help="Micro-batches per step.", rich_help_panel=_PARALLEL)
    ] = None
    transport: Annotated[
        str, typer.Option(help="How tokens reach their experts.", rich_help_panel=_PARALLEL)
    ] = "auto"
    stage_transport: Annotated[
        str,
        typer.Option(
            help="How tensors travel from stage to stage: auto, copy_engine or collective.",
            rich_help_panel=_PARALLEL,
        ),
    ] = "auto"
    comm_sms: Annotated[
        str,
        typer.Option(
            help="SMs that carry tokens; 0: the copy engines; auto: found on the first steps.",
            rich_help_panel=_PARALLEL,
        ),
    ] = "auto"
    sm_means: Annotated[
        str | None,
        typer.Option(
            help="How compute beside them is told: none, persistent, yielding, carve_out or "
            "green_context.",
            rich_help_panel=_PARALLEL,
        ),
    ] = None
    redundant_experts: Annotated[
        int | None,
        typer.Option(
            help="Slots for replicas of loaded experts; by default 2 per expert-parallel rank.",
            rich_help_panel=_PARALLEL,
        ),
    ] = None
    rebalance_every: Annotated[
        int,
        typer.Option(
            help="Steps after which a new placement of the experts is planned, and taken if that "
            "pays; 0: never.",
            rich_help_panel=_PARALLEL,
        ),
    ] = 50
    uneven_replicas: Annotated[
        bool,
        typer.Option(
            "--uneven-replicas/--even-replicas",
            help="Share an expert's tokens out over its replicas by the loads of the step before.",
            rich_help_panel=_PARALLEL,
        ),
    ] = True
    spare_mib: Annotated[
        int,
        typer.Option(
            help="Memory for experts on their way, in MiB; at least one layer goes at a time.",
            rich_help_panel=_PARALLEL,
        ),
    ] = 256
    timeout_s: Annotated[
        float,
        typer.Option(help="Longest wait for another rank, in seconds.", rich_help_panel=_PARALLEL),
    ] = 120.0
    model: Annotated[
        str | None,
        typer.Option(
            help="Preset, tiny or small; by default small on GPUs.", rich_help_panel=_MODEL
        ),
    ] = None
    hidden: Annotated[int | None, typer.Option(help="Width.", rich_help_panel=_MODEL)] = None
    layers: Annotated[int | None, typer.Option(help="Layers.", rich_help_panel=_MODEL)] = None
    experts: Annotated[
        int | None, typer.Option(help="Routed experts per layer.", rich_help_panel=_MODEL)
    ] = None
    top_k: Annotated[
        int | None, typer.Option(help="Experts per token.", rich_help_panel=_MODEL)
    ] = None
    expert_hidden: Annotated[
        int | None, typer.Option(help="Inner width of an expert.", rich_help_panel=_MODEL)
    ] = None
    fp8_experts: Annotated[
        bool,
        typer.Option(
            "--fp8-experts",
            help="Multiply in FP8 in the experts; width and inner width are multiples of 128.",
            rich_help_panel=_MODEL,
        ),
    ] = False


@takes(Arguments)
def command(given: Arguments) -> None:
    """Train a Mixture-of-Experts language model under DualPipe with expert parallelism.

    On a machine without GPUs: 4 processes, 2 pipeline x 2 expert-parallel ranks. On GPUs: one
    process each, all of them. Under torchrun: the processes it started, on all its hosts.
    """
    # Here, not at the top: --help must not wait for torch.
    from dualpipe_ext.training import RunOptions
    from dualpipe_ext.training.compare import unbalanced

    config = _config(given)
    if given.compare_unbalanced:
        unbalanced(config)  # raises here rather than at the end of the run
    _check_data(given.data, config.seq_len)
    resume = None if given.resume is None else _checked_checkpoint(given.resume, config)
    options = RunOptions(
        out=_checked_out(given.out, resume),
        data=given.data,
        resume=resume,
        save_every=given.save_every,
        compare_unbalanced=given.compare_unbalanced,
    )
    # The last check, so that whatever is wrong leaves nothing behind.
    if os.environ.get("RANK", "0") == "0":
        _make_folder(options.out)
    _start(config, options)


def _config(given: Arguments) -> TrainConfig:
    """What is to be trained. What was not given depends on the machine."""
    from dualpipe_ext.sms import DEFAULT_MEANS
    from dualpipe_ext.training import TrainConfig

    on_gpus, num_ranks = _machine()
    pp, ep = _grid(given.pp, given.ep, on_gpus=on_gpus, num_ranks=num_ranks)
    chunks = given_or(given.chunks, max(4, 2 * pp))
    transport = given.transport
    return TrainConfig(
        model=_model(given, on_gpus=on_gpus),
        schedule=given.schedule.lower(),
        pp=pp,
        ep=ep,
        num_chunks=chunks,
        batch=given_or(given.batch, _sequences(ep, on_gpus=on_gpus) * chunks * ep),
        seq_len=given_or(given.seq_len, 1024 if on_gpus else 128),
        steps=given.steps,
        lr=given.lr,
        warmup=min(20, given.steps // 4),
        redundant_experts=given_or(given.redundant_experts, 2 * ep),
        rebalance_every=given.rebalance_every,
        uneven_replicas=given.uneven_replicas,
        spare_bytes=given.spare_mib << 20,
        transport=env.read("DUALPIPE_TRANSPORT") if transport == "auto" else transport,
        stage_transport=given.stage_transport,
        comm_sms=_comm_sms(given.comm_sms, on_gpus=on_gpus),
        sm_means=given_or(given.sm_means, DEFAULT_MEANS),
        dtype=given_or(given.dtype, "bfloat16" if on_gpus else "float32"),
        ema=given.ema,
        ema_dtype=given.ema_dtype,
        seed=given.seed,
        timeout_s=given.timeout_s,
    )


def _sequences(ep: int, *, on_gpus: bool) -> int:
    """Of a rank's micro-batch."""
    if not on_gpus:
        return 2
    # Compute must take longer than launching it, or there is nothing to hide behind: with 32 a GPU
    # waits for the host, with 64 it does not (docs/LOG.md, "Where a small model's step goes").
    return 64 if ep > 1 else 32


def _model(given: Arguments, *, on_gpus: bool) -> ModelConfig:
    from dualpipe_ext.models import PRESETS

    preset = given_or(given.model, "small" if on_gpus else "tiny")
    if preset not in PRESETS:
        raise ValueError(f"expected --model of {', '.join(PRESETS)}, got {preset!r}")
    return PRESETS[preset].with_overrides(
        hidden=given.hidden,
        num_layers=given.layers,
        num_experts=given.experts,
        top_k=given.top_k,
        expert_hidden=given.expert_hidden,
        fp8_experts=given.fp8_experts,
        memory_level=given.memory_level,
    )


def _comm_sms(text: str, *, on_gpus: bool) -> int | str:
    """What ``--comm-sms`` says."""
    if text == "auto":
        return text
    if not text.isdecimal():
        raise ValueError(f"expected --comm-sms of auto or a number of at least 0, got {text!r}")
    if not on_gpus:
        raise ValueError(f"expected --comm-sms auto without GPUs, which have the SMs, got {text}")
    return int(text)


def _check_data(data: Path | None, seq_len: int) -> None:
    from dualpipe_ext.training.data import check_length, load_text

    if data is not None and not data.is_file():
        raise ValueError(f"expected a readable text file for --data, got {data}")
    if data is None:
        size = len(load_text(None))
    else:
        with data.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
    check_length(size, seq_len)


def _checked_checkpoint(path: Path, config: TrainConfig) -> Path:
    """The checkpoint that ``path`` names, once it is known that this run can go on from it."""
    from dualpipe_ext.training import checkpoint

    found = checkpoint.find(path)
    done = checkpoint.check_layout(found, config.layout())
    if done >= config.steps:
        raise ValueError(f"expected --steps beyond the checkpoint's {done}, got {config.steps}")
    for rank in _ranks_of_this_process(config.pp * config.ep):
        checkpoint.check_file(found, rank)
    return found


def _checked_out(out: Path | None, resume: Path | None) -> Path:
    """The run's folder, which holds no other run than the one that goes on."""
    from dualpipe_ext.training.progress import read_metrics

    # A resumed run goes on in its own folder: RUN/checkpoints/step-N.
    own = resume.parent.parent if resume else Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    out = own if out is None else out
    metrics = out / "metrics.csv"
    if metrics.exists() and (resume is None or out.resolve() != own.resolve()):
        raise ValueError(f"expected --out without a run in it (or --resume {out}), got {out}")
    if metrics.is_file():
        read_metrics(metrics)  # raises here rather than in the ranks
    return out


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"expected a folder that can be made for --out, got {out}: {error.strerror}"
        ) from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise ValueError(f"expected a folder that can be written to for --out, got {out}")


def _machine() -> tuple[bool, int | None]:
    """Whether there are GPUs, and the number of ranks if the machine or torchrun decides it."""
    import torch

    on_gpus = torch.cuda.is_available()
    if _under_torchrun():
        return on_gpus, int(os.environ["WORLD_SIZE"])
    return on_gpus, torch.cuda.device_count() if on_gpus else None


def _under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _ranks_of_this_process(num_ranks: int) -> range:
    """Under torchrun its own; else all those that it will start."""
    if _under_torchrun():
        return range(int(os.environ["RANK"]), int(os.environ["RANK"]) + 1)
    return range(num_ranks)


def _grid(
    pp: int | None, ep: int | None, *, on_gpus: bool, num_ranks: int | None
) -> tuple[int, int]:
    """Fill in what the user left open of pipeline x expert-parallel ranks."""
    if num_ranks is None:
        return 2 if pp is None else pp, 2 if ep is None else ep
    for name, value in (("--pp", pp), ("--ep", ep)):
        if value is not None and (value < 1 or num_ranks % value):
            raise ValueError(f"expected {name} to divide {num_ranks} ranks, got {value}")
    if pp is None:
        # Experts first: NVLink carries them, and DualPipeV overlaps on one pipeline rank too.
        if ep is not None:
            pp = num_ranks // ep
        else:
            pp = 2 if num_ranks >= 4 and num_ranks % 2 == 0 else 1
    ep = num_ranks // pp if ep is None else ep
    if pp * ep != num_ranks:
        raise ValueError(f"expected --pp x --ep = {num_ranks} ranks, got {pp} x {ep}")
    return pp, ep


def _start(config: TrainConfig, options: RunOptions) -> None:
    import torch.distributed as dist

    from dualpipe_ext import launch
    from dualpipe_ext.training import run

    if _under_torchrun():
        launch.init_from_env(timeout_s=config.timeout_s)
        # The default folder is named after the time, which the ranks need not read alike.
        out = [options.out]
        dist.broadcast_object_list(out)
        run(config, replace(options, out=out[0]))
        return
    # Job schedulers stop a run with SIGTERM: end as cleanly as on Ctrl-C, temporary files included.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        launch.run_ranks(run, config.pp * config.ep, config, options, timeout_s=config.timeout_s)
    finally:
        # The progress bar hides the cursor, and its process may have been stopped.
        Console().show_cursor()
