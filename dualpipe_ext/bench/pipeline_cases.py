"""What ``dualpipe bench pipeline`` measures: options, floating-point work, and the rows.

T tokens of a micro-batch, L positions of a sequence, H hidden, E experts, K top-k, I inner width.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from dualpipe_ext.bench.link import SLOW_LINKS
from dualpipe_ext.models import ModelConfig
from dualpipe_ext.pipeline.connections import TRANSPORTS
from dualpipe_ext.pipeline.plan import KINDS, build_plan
from dualpipe_ext.sms import DEFAULT_MEANS, MEANS

OK, FAILED, ERROR, UNAVAILABLE = "ok", "FAILED", "error", "unavailable"
PARTS = ("pair", "steps")
# BF16 with dense matrices. Source: NVIDIA H100 and H200 data sheets (SXM), without sparsity.
PEAK_TFLOPS = 989.0


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """What to measure, at which size.

    Attributes:
        parts: of :data:`PARTS`.
        model: of the layers; ``num_layers`` of them make the stage of the pair.
        tokens: T, per rank.
        seq_len: L; divides ``tokens``.
        dtype: of the model.
        transports: the pair is measured with each.
        sms: communication SMs, for transports that take some.
        pack_sms: SMs that pack and unpack what copy engines move; the pair is measured with each.
            Empty: as many as the transport takes by itself.
        sm_means: how compute beside them is told, of :data:`dualpipe_ext.sms.MEANS`; the pair is
            measured with each.
        throttle: measure the pair also with communication as long as compute.
        slow_link: what is repeated for that where copy engines drive the link, of
            :data:`~dualpipe_ext.bench.link.SLOW_LINKS`.
        graphs: measure all forms of the pair as CUDA graphs.
        schedules: of the steps.
        ep: expert-parallel ranks of the steps; the others are pipeline ranks.
        step_experts: experts of a layer in the steps, whose ranks hold more of each layer.
        step_layers: layers per rank in the steps.
        step_transport: of the steps' tokens.
        stage_transport: how the steps' tensors travel from stage to stage, as in ``Pipeline``.
        num_chunks: micro-batches of a step.
        rounds, calls: numbers per measurement, and calls in a row behind one (pairs only).
        peak_tflops: what MFU is a share of, per GPU.
        picture: where to draw the streams of an overlapped pair; one file per row.
    """

    parts: tuple[str, ...]
    model: ModelConfig
    tokens: int
    seq_len: int
    dtype: torch.dtype
    transports: tuple[str, ...]
    sms: tuple[int, ...]
    throttle: bool
    schedules: tuple[str, ...]
    ep: int
    step_experts: int
    step_layers: int
    step_transport: str
    num_chunks: int
    rounds: int
    calls: int
    sm_means: tuple[str, ...] = (DEFAULT_MEANS,)
    pack_sms: tuple[int, ...] = ()
    slow_link: str = SLOW_LINKS[0]
    graphs: bool = False
    stage_transport: str = "auto"
    peak_tflops: float = PEAK_TFLOPS
    picture: Path | None = None

    @property
    def step_model(self) -> ModelConfig:
        """The model of a step but for its ``num_layers``, which follows from the ranks."""
        return self.model.with_overrides(num_experts=self.step_experts)

    def checked(self, num_ranks: int) -> PipelineOptions:
        """Itself, if this many ranks can run it; else ``ValueError``."""
        for name in ("tokens", "seq_len", "ep", "step_layers", "num_chunks", "rounds", "calls"):
            if (value := getattr(self, name)) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"expected --{flag} of at least 1, got {value}")
        if self.tokens % self.seq_len:
            raise ValueError(
                f"expected --seq-len to divide --tokens {self.tokens}, got {self.seq_len}"
            )
        if not self.peak_tflops > 0:
            raise ValueError(f"expected --peak-tflops above 0, got {self.peak_tflops:g}")
        if self.pack_sms and min(self.pack_sms) < 1:
            raise ValueError(f"expected --pack-sms of at least 1, got {min(self.pack_sms)}")
        for part in self.parts or ("nothing",):
            if part not in PARTS:
                raise ValueError(f"expected --parts of {', '.join(PARTS)}, got {part!r}")
        for means in self.sm_means or ("nothing",):
            if means not in MEANS:
                raise ValueError(f"expected --sm-means of {', '.join(MEANS)}, got {means!r}")
        if self.slow_link not in SLOW_LINKS:
            raise ValueError(
                f"expected --slow-link of {', '.join(SLOW_LINKS)}, got {self.slow_link!r}"
            )
        if "pair" in self.parts and self.model.num_experts % num_ranks:
            raise ValueError(
                f"expected --experts to be a multiple of {num_ranks} ranks, "
                f"got {self.model.num_experts}"
            )
        if "steps" in self.parts:
            self._check_steps(num_ranks)
        return self

    def _check_steps(self, num_ranks: int) -> None:
        if self.stage_transport not in TRANSPORTS:
            raise ValueError(
                f"expected --stage-transport of {', '.join(TRANSPORTS)}, "
                f"got {self.stage_transport!r}"
            )
        if num_ranks % self.ep:
            raise ValueError(f"expected --ep to divide {num_ranks} ranks, got {self.ep}")
        if self.step_experts % self.ep:
            raise ValueError(
                f"expected --step-experts to be a multiple of --ep {self.ep}, "
                f"got {self.step_experts}"
            )
        self.step_model  # noqa: B018 - raises on sizes that do not fit together
        for kind in self.schedules or ("nothing",):
            if kind not in KINDS:
                raise ValueError(f"expected --schedules of {', '.join(KINDS)}, got {kind!r}")
            ranks = num_ranks // self.ep
            depth = len(build_plan(kind, num_ranks=ranks, num_chunks=self.num_chunks).pipes[0])
            if self.step_layers * ranks % depth:
                raise ValueError(
                    f"expected --step-layers to be even for {kind}, whose ranks have two stages, "
                    f"got {self.step_layers}"
                )


def usual_schedules(num_ranks: int, num_chunks: int) -> tuple[str, ...]:
    """The schedules that are compared, without those that this many pipeline ranks cannot run.

    >>> usual_schedules(1, 4)
    ('1f1b', 'zb1p', 'dualpipev')
    """
    found = []
    for kind in ("1f1b", "zb1p", "dualpipe", "dualpipev"):
        with contextlib.suppress(ValueError):
            build_plan(kind, num_ranks=num_ranks, num_chunks=num_chunks)
            found.append(kind)
    return tuple(found)


def step_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations of one layer's forward and backward, per token.

    Products only, two operations per multiply-add; a backward is two forwards. Forward per token:
    8 H^2 for the four projections of attention, 2 L H for causal scores and their product with
    values (half of the full 4 L H), 2 H E for the router, 6 H I per expert, K routed and the shared
    one. What a memory level computes again is not counted: MFU is of the model's work, as in
    Chowdhery et al., PaLM, 2022, appendix B.
    """
    h = config.hidden
    attention = 8 * h * h + 2 * seq_len * h
    experts = 6 * h * (config.top_k * config.expert_hidden + config.shared_hidden)
    return 3.0 * (attention + 2 * h * config.num_experts + experts)


@dataclass(slots=True, kw_only=True)
class PipelineRow:
    """All columns of ``pipeline.csv``, in order. Times are milliseconds of the slowest rank,
    percentiles are over rounds; None is an empty cell: not measured."""

    part: str
    """"pair" or "step"."""
    device: str
    pp: int
    ep: int
    layers: int
    """Of the stage of a pair; of a rank in a step."""
    tokens: int
    seq_len: int
    hidden: int
    experts: int
    top_k: int
    expert_hidden: int
    memory_level: int
    dtype: str
    rounds: int
    transport: str
    num_sms: int | None = None
    """SMs that communicate; with copy engines those asked to pack and unpack, if any were."""
    sm_means: str = "none"
    """How compute beside communication is told of the SMs that are taken."""
    compute_sms: int | None = None
    """SMs that it is told to take; None if it is not told."""
    status: str = OK
    reason: str = ""
    # Pairs.
    graphs: bool | None = None
    """Whether all forms ran as CUDA graphs."""
    repeats: float | None = None
    """How often each dispatch and combine is made; 1 is the link as it is."""
    slow_link: str | None = None
    """What is repeated: "calls", or copies to the "peer" or to the "host"; None: nothing."""
    compute_ms: float | None = None
    """Forward and backward with communication taken out."""
    comm_ms: float | None = None
    """The pair's communication, without compute."""
    serial_ms_p20: float | None = None
    """The forward, then the backward, on one stream."""
    serial_ms_p50: float | None = None
    serial_ms_p80: float | None = None
    pair_ms_p20: float | None = None
    """Both overlapped."""
    pair_ms_p50: float | None = None
    pair_ms_p80: float | None = None
    speed_up: float | None = None
    """Serial over pair."""
    pair_over_longer: float | None = None
    """Pair over the longer of compute and communication: 1 is the limit."""
    hidden_share: float | None = None
    """Of the communication, while something computes; the rank with the least. From a profile."""
    busy_over_span: float | None = None
    """Busy time of compute and of communication in overlapped pairs, over their span; the rank with
    the least. From a profile; 1.84 in DeepSeek's. Each runs longer beside the other than alone,
    hence more than ``speed_up``."""
    compute_slow_down: float | None = None
    """Time of compute beside communication over its time alone; the rank with the most."""
    waiting_ms: float | None = None
    """Kernels that only wait for other ranks, in a pair; part of its communication."""
    comm_ctas: int | None = None
    # Steps.
    schedule: str | None = None
    num_chunks: int | None = None
    stage_transport: str | None = None
    """How tensors travel from stage to stage: what was used; "auto" if it did not come to that.
    None where nothing travels, on one pipeline rank."""
    step_ms_p20: float | None = None
    step_ms_p50: float | None = None
    step_ms_p80: float | None = None
    tokens_per_s: float | None = None
    """Of all ranks."""
    mfu: float | None = None
    bubble: float | None = None
    """Measured: the share of a step's span in which ranks do not compute, their mean."""
    predicted_bubble: float | None = None
    span_ms: float | None = None
    """From the beginning of a step to the end of its last action."""
    predicted_span_ms: float | None = None
    """By the simulator, from the medians of the actions' measured times below."""
    f_ms: float | None = None
    b_ms: float | None = None
    i_ms: float | None = None
    w_ms: float | None = None
    fb_ms: float | None = None
    """An overlapped pair."""
    send_ms: float | None = None
    """A micro-batch's activations to the next rank, alone, by the process group whatever
    ``stage_transport`` is."""

    def set_times(self, name: str, values: dict[str, float]) -> None:
        """Store p20, p50 and p80 of ``serial_ms``, ``pair_ms`` or ``step_ms``."""
        for percentile, value in values.items():
            setattr(self, f"{name}_{percentile}", round(value, 4))

    def to_dict(self) -> dict[str, Any]:
        """Plain data by column."""
        return asdict(self)


def columns() -> list[str]:
    """The columns of a row, in order."""
    return [field.name for field in fields(PipelineRow)]


def new_row(options: PipelineOptions, model: ModelConfig, **values: Any) -> PipelineRow:
    """A row with what the options say."""
    return PipelineRow(
        **{
            "tokens": options.tokens,
            "seq_len": options.seq_len,
            "hidden": model.hidden,
            "experts": model.num_experts,
            "top_k": model.top_k,
            "expert_hidden": model.expert_hidden,
            "memory_level": model.memory_level,
            "dtype": str(options.dtype).removeprefix("torch."),
            "rounds": options.rounds,
            **values,
        }
    )
