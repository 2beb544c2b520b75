"""What the commands of ``dualpipe bench`` share: how options are read, and where rows go."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import typer

from dualpipe_ext.files import check_target

if TYPE_CHECKING:
    from dualpipe_ext.models import ModelConfig

SIZE, RANKS, WHAT, OUTPUT = "Size", "Ranks", "What to measure", "Output"
ROUNDS = 5
DEVICES = ("cuda", "cpu")
# Of one GPU, where there are no others.
DEFAULT_VIRTUAL_RANKS = 2


def output_option(name: str) -> Any:
    """``--output``, by default ``results_file(name)``."""
    return typer.Option(
        help="Append rows to this CSV file. "
        f"[default: benchmarks/results/{name}.csv in the repository, else ./{name}.csv]",
        rich_help_panel=OUTPUT,
        show_default=False,
    )


JSON = typer.Option("--json", help="Print JSON, no table.", rich_help_panel=OUTPUT)


def check_device(device: str, *, small: str) -> None:
    """Refuse a device that is not here; ``small`` is what a CPU can run."""
    import torch

    if device not in DEVICES:
        raise ValueError(f"expected --device of {', '.join(DEVICES)}, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"expected a GPU, got none; to try it out on the CPU: dualpipe bench {small}"
        )


class LayerSizes(Protocol):
    """What a command line says of layers."""

    hidden: int
    layers: int
    experts: int
    top_k: int
    expert_hidden: int


def layers_of(given: LayerSizes) -> ModelConfig:
    """Layers of such sizes; a shared expert is as wide as the others, a head 128 wide."""
    from dualpipe_ext.models import ModelConfig

    return ModelConfig(
        hidden=given.hidden,
        num_layers=given.layers,
        num_heads=max(1, given.hidden // 128),
        num_experts=given.experts,
        top_k=given.top_k,
        num_groups=1,
        top_groups=1,
        expert_hidden=given.expert_hidden,
        shared_hidden=given.expert_hidden,
    )


def read_ranks(
    ranks: int | None, virtual_ranks: int | None, device: str, *, small: str
) -> tuple[int, bool]:
    """How many ranks, and whether they are virtual; ``small`` is what a CPU can run."""
    import os

    import torch

    from dualpipe_ext.bench.ranks import under_torchrun

    check_device(device, small=small)
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
        return (num_gpus, False) if num_gpus > 1 else (DEFAULT_VIRTUAL_RANKS, True)
    if ranks > num_gpus:
        raise ValueError(
            f"expected --ranks of at most {num_gpus} GPUs, got {ranks}; --virtual-ranks {ranks} "
            "runs them on one"
        )
    return ranks, False


def read_processes(ranks: int | None, device: str, *, small: str, on_cpu: int = 2) -> int:
    """How many ranks, each a process: by default one per GPU, and ``on_cpu`` on a CPU."""
    if device == "cpu" and ranks is None:
        ranks = on_cpu
    if device == "cuda" and ranks is None:
        import torch

        ranks = max(1, torch.cuda.device_count())
    return read_ranks(ranks, None, device, small=small)[0]


def read_words(text: str) -> tuple[str, ...]:
    """Words separated by commas, each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def read_numbers(name: str, text: str) -> tuple[int, ...]:
    """The integers that the option ``name`` lists."""
    try:
        numbers = tuple(int(word) for word in read_words(text))
    except ValueError:
        numbers = ()
    if not numbers:
        raise ValueError(f"expected {name} as integers separated by commas, got {text!r}")
    return numbers


def target_of(name: str, output: Path | None) -> Path:
    """The file that rows go to, which can be written as far as can be told."""
    from dualpipe_ext.bench.record import results_file

    target = results_file(name) if output is None else output
    check_target(target)
    return target


def command_line(context: typer.Context) -> str:
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


def report(
    rows: Iterable[dict[str, Any]],
    target: Path,
    context: typer.Context,
    print_rows: Callable[[list[dict[str, Any]]], None],
    *,
    as_json: bool,
) -> None:
    """Record every row as soon as it is there: a run cut off loses none. Then print them."""
    from dualpipe_ext.bench.record import append

    found = []
    for row in rows:
        append(target, command_line(context), [row])
        found.append(row)
    show(found, target, print_rows, as_json=as_json)


def show(
    rows: list[dict[str, Any]],
    target: Path,
    print_rows: Callable[[list[dict[str, Any]]], None],
    *,
    as_json: bool,
) -> None:
    """Print rows that have been recorded."""
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        print_rows(rows)
        typer.echo(f"Wrote {target}")
