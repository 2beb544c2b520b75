"""What does each memory level save, in bytes, and cost, in time and accuracy?

Protocol: the layers of a pipeline stage as wide as DeepSeek-V3's, alone on each rank, with several
micro-batches in flight as a pipeline has them: a step is so many forwards, then as many backwards.
Level 0 is plain autograd over fused RMSNorm and SwiGLU: a stricter measure than plain operations,
which keep more. First the gradients of every level are compared with those of level 0, on the first
layer alone, since beyond it rounding decides a few routing choices. Then rounds, in each of which
every level takes a step, so that a drifting clock meets all of them alike.

- saved: what autograd keeps after the forward of a micro-batch, counted tensor by tensor.
- kept: what the allocator holds after the forwards beyond what it held before, per micro-batch.
- peak: the most that it held in a step beyond parameters, gradients and communication buffers. It
  includes what comes and goes: gradients of rows, and of weights before they are added up.
- step: time of a step per micro-batch, between two events (on a CPU, on the host's clock).

Kept and peak need a GPU. The largest of the ranks counts, for bytes and for each round's time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dualpipe_ext.bench.ranks import Ranks
from dualpipe_ext.bench.record import percentiles
from dualpipe_ext.bench.stage import middle_stage
from dualpipe_ext.bench.timing import no_garbage_collection
from dualpipe_ext.ep import Buffer
from dualpipe_ext.memory import MAX_LEVEL, gradient_errors, saved_bytes, set_memory_level
from dualpipe_ext.models import LanguageModelStage, ModelConfig
from dualpipe_ext.models.activations import kept_bytes_per_token

Row = dict[str, object]
_WARM_UP = 2
_MIB = 2**20
LEVELS = range(MAX_LEVEL + 1)
# Above what rounding (level 1) and FP8 do to a gradient, far below what a mistake does.
_LARGEST_ERROR = {1: 0.02, 2: 0.15, 3: 0.15}


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """Sizes, per rank where they can be.

    Attributes:
        model: of the layers; its ``num_layers`` are measured, its ``memory_level`` is not used.
        tokens: in a micro-batch.
        seq_len: tokens of a sequence; divides ``tokens``.
        in_flight: micro-batches whose activations are there at the same time.
        dtype: of the model.
        transport: of the expert-parallel buffer.
        rounds: steps of each level.
    """

    model: ModelConfig
    tokens: int
    seq_len: int
    in_flight: int
    dtype: torch.dtype
    transport: str
    rounds: int

    def checked(self, num_ranks: int) -> MemoryOptions:
        """Itself, if this many ranks can run it; else ``ValueError``."""
        for name in ("tokens", "seq_len", "in_flight", "rounds"):
            if (value := getattr(self, name)) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"expected --{flag} of at least 1, got {value}")
        if self.tokens % self.seq_len:
            raise ValueError(
                f"expected --seq-len to divide --tokens {self.tokens}, got {self.seq_len}"
            )
        if self.model.num_experts % num_ranks:
            raise ValueError(
                f"expected --experts to be a multiple of {num_ranks} ranks, "
                f"got {self.model.num_experts}"
            )
        self.model.with_overrides(memory_level=MAX_LEVEL)  # raises on widths unfit for FP8
        return self


def run(ranks: Ranks, options: MemoryOptions) -> list[Row]:
    """Check, then measure every level; called on every rank. A row per level, on all ranks.

    Raises:
        AssertionError: the gradients of a level are too far from those of level 0.
    """
    stage = _make_stage(ranks, options)
    inputs, grad = _draw(ranks, options)
    errors = {level: _errors(stage, inputs[0], grad, level, ranks) for level in LEVELS if level}
    for parameter in stage.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step = _Step(stage, inputs, grad)
    bytes_of: dict[int, list[float]] = {}
    for level in LEVELS:
        set_memory_level(stage, level)
        saved = saved_bytes(lambda: stage(inputs[0]), without=[*stage.parameters(), *inputs])
        bytes_of[level] = ranks.maxima([saved, *step.memory()])
    seconds = _time(stage, step, ranks, options.rounds)
    rows = [
        _row(level, options, ranks, bytes_of[level], errors, seconds[level]) for level in LEVELS
    ]
    return [_against(rows[0], row) for row in rows]


def _make_stage(ranks: Ranks, options: MemoryOptions) -> LanguageModelStage:
    config = options.model
    buffer = Buffer(
        hidden=config.hidden,
        num_experts=config.num_experts,
        top_k=config.top_k,
        max_tokens=options.tokens,
        dtype=options.dtype,
        transport=options.transport,
        num_slabs=0,
    )
    layers = range(config.num_layers)
    return middle_stage(config, layers, buffer=buffer, dtype=options.dtype, device=ranks.device)


def _draw(ranks: Ranks, options: MemoryOptions) -> tuple[list[Tensor], Tensor]:
    """Inputs that want a gradient, and the gradient of the outputs."""
    generator = torch.Generator(ranks.device).manual_seed(1 + ranks.rank)
    shape = (options.tokens // options.seq_len, options.seq_len, options.model.hidden)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, device=ranks.device, dtype=torch.float32).to(
            options.dtype
        )

    return [draw().requires_grad_() for _ in range(options.in_flight)], draw()


def _errors(
    stage: LanguageModelStage, x: Tensor, grad: Tensor, level: int, ranks: Ranks
) -> dict[str, float]:
    """Largest relative errors: of all parameters, and of the experts' first weight."""
    layer = next(iter(stage.layers.values()))

    def loss() -> Tensor:
        return (layer(x.detach()) * grad).sum()

    found = gradient_errors(layer, loss, level=level)
    largest, gate_up = ranks.maxima([max(found.values()), found["experts.gate_up"]])
    if not largest <= _LARGEST_ERROR[level]:
        name = max(found, key=found.__getitem__)
        raise AssertionError(
            f"expected gradients of level {level} within {_LARGEST_ERROR[level]} of level 0's, "
            f"got an error of {largest:.3g} (here, of {name})"
        )
    return {"gradient_error_max": largest, "gradient_error_gate_up": gate_up}


class _Step:
    """Forwards and then backwards of all micro-batches."""

    def __init__(self, stage: LanguageModelStage, inputs: list[Tensor], grad: Tensor) -> None:
        self._stage = stage
        self._inputs = inputs
        self._grad = grad

    def __call__(self, after_forwards: Callable[[], None] = lambda: None) -> None:
        outputs = [self._stage(x) for x in self._inputs]
        after_forwards()
        for x in self._inputs:
            outputs.pop(0).backward(self._grad)
            x.grad = None

    def memory(self) -> tuple[float, float]:
        """Bytes kept per micro-batch, and of the peak; nan without a GPU."""
        self()
        if self._grad.device.type != "cuda":
            return float("nan"), float("nan")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept: list[int] = []
        self(lambda: kept.append(torch.cuda.memory_allocated() - before))
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return kept[0] / len(self._inputs), float(peak)

    def seconds(self, ranks: Ranks) -> float:
        """Time per micro-batch at this rank, all ranks starting together."""
        count = len(self._inputs)
        if self._grad.device.type != "cuda":
            ranks.barrier()
            begin = time.perf_counter()
            self()
            return (time.perf_counter() - begin) / count
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        ranks.barrier()
        start.record()
        self()
        end.record()
        torch.cuda.synchronize()
        return 1e-3 * start.elapsed_time(end) / count


def _time(
    stage: LanguageModelStage, step: _Step, ranks: Ranks, rounds: int
) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {level: [] for level in LEVELS}
    for level in LEVELS:
        set_memory_level(stage, level)
        for _ in range(_WARM_UP):
            step()
    with no_garbage_collection():
        for _ in range(rounds):
            for level in LEVELS:
                set_memory_level(stage, level)
                found[level].append(step.seconds(ranks))
    return {level: ranks.maxima(values) for level, values in found.items()}


def _row(
    level: int,
    options: MemoryOptions,
    ranks: Ranks,
    measured: list[float],
    errors: dict[int, dict[str, float]],
    seconds: list[float],
) -> Row:
    model = options.model
    predicted = sum(
        kept_bytes_per_token(
            model.with_overrides(memory_level=level), itemsize=options.dtype.itemsize
        ).values()
    )
    saved, kept, peak = (_mib(value) for value in measured)
    none = {"gradient_error_max": 0.0, "gradient_error_gate_up": 0.0}
    return {
        "memory_level": level,
        "ranks": ranks.num_ranks,
        "layers": model.num_layers,
        "tokens": options.tokens,
        "in_flight": options.in_flight,
        "hidden": model.hidden,
        "experts": model.num_experts,
        "top_k": model.top_k,
        "expert_hidden": model.expert_hidden,
        "dtype": str(options.dtype).removeprefix("torch."),
        "rounds": options.rounds,
        "predicted_mib": _mib(predicted * options.tokens * model.num_layers),
        "saved_mib": saved,
        "kept_mib": kept,
        "peak_mib": peak,
        **{f"step_ms_{k}": round(1e3 * v, 3) for k, v in percentiles(seconds).items()},
        **{name: float(f"{value:.3g}") for name, value in errors.get(level, none).items()},
    }


def _against(plain: Row, row: Row) -> Row:
    """The row with its shares of what plain autograd takes."""

    def share(name: str) -> object:
        return "" if plain[name] == "" else round(row[name] / plain[name], 4)

    shares = {f"{name}_over_level_0": share(f"{name}_mib") for name in ("saved", "kept", "peak")}
    return {**row, **shares, "step_over_level_0": share("step_ms_p50")}


def _mib(value: float) -> float | str:
    return "" if value != value else round(value / _MIB, 3)


def print_rows(rows: list[Row]) -> None:
    """A line per level for the terminal, in 80 columns."""
    table = Table("level", box=None, title="Of a micro-batch; in brackets, of level 0")
    table.title_justify = "left"
    for column in ("saved MiB", "kept MiB", "peak MiB", "step ms", "largest error"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = [
            _cell(row[f"{name}_mib"], row[f"{name}_over_level_0"])
            for name in ("saved", "kept", "peak")
        ]
        cells.append(_cell(row["step_ms_p50"], row["step_over_level_0"]))
        table.add_row(str(row["memory_level"]), *cells, f"{row['gradient_error_max']:.3g}")
    Console().print(table)


def _cell(value: object, share: object) -> str:
    return "-" if value == "" else f"{value:.1f} ({share:.0%})"
