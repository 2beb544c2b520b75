"""Everything that defines a training run, checked before any process starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from dualpipe_ext.ep.registry import transport_names
from dualpipe_ext.eplb.migrator import DEFAULT_SPARE_BYTES
from dualpipe_ext.memory.ema import check_decay
from dualpipe_ext.models import ModelConfig, split_layers
from dualpipe_ext.pipeline import Plan, build_plan
from dualpipe_ext.pipeline.connections import TRANSPORTS
from dualpipe_ext.sms import AUTO, DEFAULT_MEANS
from dualpipe_ext.timeouts import MAX_TIMEOUT_S
from dualpipe_ext.training.tuning import check_sms

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
EMA_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """A run of ``pp`` x ``ep`` ranks.

    Attributes:
        model: sizes of the model.
        schedule: the pipeline schedule, one of :data:`dualpipe_ext.pipeline.KINDS`.
        pp: pipeline-parallel ranks.
        ep: expert-parallel ranks, which are data-parallel for everything but the experts.
        num_chunks: micro-batches per step.
        batch: sequences per step, over all ranks; a multiple of ``num_chunks * ep``.
        seq_len: tokens per sequence.
        steps: optimizer steps in the whole run (the learning-rate schedule's end).
        lr: peak learning rate, reached after ``warmup`` steps, then a cosine to a tenth of it.
        weight_decay: AdamW's, on matrices only.
        clip: largest norm of the whole gradient.
        bias_rate: update speed of the router's balancing bias.
        redundant_experts: slots beyond one per expert, filled with replicas of loaded experts.
        rebalance_every: steps between re-plannings of the experts' placement; 0 for never. Experts
            move if that pays (``costs.py``).
        uneven_replicas: whether replicas share their expert's tokens by the loads of the step
            before rather than evenly. Nothing moves for it.
        spare_bytes: memory on each rank for experts on their way to it. A rebalancing that needs
            more takes several steps; one layer always gets what it needs.
        transport: how tokens reach their experts; "auto" takes the fastest this machine has.
        stage_transport: how tensors travel from stage to stage: "copy_engine", "collective", or
            "auto" for the first of these that the pipeline ranks can use.
        comm_sms: SMs that carry tokens, 0 for the copy engines; "auto" for a number that is found
            on the first steps. Losses have the same bits with every number, but for ``sm_means``
            whose results depend on it (with those, give a number).
        sm_means: how compute beside communication is told, one of
            :data:`dualpipe_ext.sms.MEANS`.
        dtype: "float32", "bfloat16" (with float32 master weights) or "float64".
        ema: decay of the parameters' average on the CPU, above 0 and below 1; None for no average.
        ema_dtype: of the average, "float32" or "bfloat16" (half the memory, rounded at random).
        seed: of the initialisation and the order of the data, 0 to 2**32 - 1.
        timeout_s: longest wait for another rank, in seconds.
    """

    model: ModelConfig
    schedule: str = "dualpipev"
    pp: int = 2
    ep: int = 2
    num_chunks: int = 4
    batch: int = 16
    seq_len: int = 128
    steps: int = 200
    lr: float = 3e-3
    warmup: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0
    bias_rate: float = 1e-3
    redundant_experts: int = 0
    rebalance_every: int = 0
    uneven_replicas: bool = False
    spare_bytes: int = DEFAULT_SPARE_BYTES
    transport: str = "auto"
    stage_transport: str = "auto"
    comm_sms: int | str = AUTO
    sm_means: str = DEFAULT_MEANS
    dtype: str = "float32"
    ema: float | None = None
    ema_dtype: str = "float32"
    seed: int = 0
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        for name in ("pp", "ep", "num_chunks", "batch", "seq_len", "steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"expected a positive {name}, got {getattr(self, name)}")
        for name in ("lr", "clip", "timeout_s"):
            # The bound is the time-out's; the others stay far below it.
            if not 0 < getattr(self, name) <= MAX_TIMEOUT_S:
                raise ValueError(f"expected {name} above 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"expected a seed from 0 to 2**32 - 1, got {self.seed}")
        for name in (
            "warmup",
            "redundant_experts",
            "rebalance_every",
            "spare_bytes",
            "weight_decay",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"expected {name} of at least 0, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"expected a dtype of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.ema is not None:
            check_decay(self.ema)
        if self.ema_dtype not in EMA_DTYPES:
            raise ValueError(
                f"expected an ema_dtype of {', '.join(EMA_DTYPES)}, got {self.ema_dtype!r}"
            )
        if self.transport not in transport_names():
            raise ValueError(
                f"expected transport to be one of {', '.join(transport_names())}, "
                f"got {self.transport!r}"
            )
        if self.stage_transport not in TRANSPORTS:
            raise ValueError(
                f"expected stage_transport to be one of {', '.join(TRANSPORTS)}, "
                f"got {self.stage_transport!r}"
            )
        check_sms(self.comm_sms, self.sm_means, self.transport)
        if self.pp > self.model.num_layers:  # before a plan of that size is made
            raise ValueError(
                f"expected at least one layer per pipeline rank, got {self.model.num_layers} "
                f"layers for {self.pp} ranks"
            )
        plan = self.plan()
        split_layers(self.model.num_layers, len(plan.pipes[0]))
        if self.batch % (self.num_chunks * self.ep):
            raise ValueError(
                f"expected batch to be a multiple of chunks x expert-parallel ranks = "
                f"{self.num_chunks} x {self.ep}, got {self.batch}"
            )
        if self.num_slots % self.ep:
            raise ValueError(
                f"expected experts + redundant experts to be a multiple of {self.ep} "
                f"expert-parallel ranks, got {self.model.num_experts} + {self.redundant_experts}"
            )

    @property
    def num_slots(self) -> int:
        """Physical expert slots S over all expert-parallel ranks."""
        return self.model.num_experts + self.redundant_experts

    @property
    def micro_batch(self) -> int:
        """Sequences in one micro-batch on one rank."""
        return self.batch // (self.num_chunks * self.ep)

    @property
    def layers_of_ranks(self) -> list[list[int]]:
        """For each pipeline rank the layers it holds, ascending."""
        plan = self.plan()
        layers = split_layers(self.model.num_layers, len(plan.pipes[0]))
        return [
            sorted(i for stage in plan.stages_of(rank) for i in layers[plan.model_stage(stage)])
            for rank in range(self.pp)
        ]

    def plan(self) -> Plan:
        """The pipeline plan this run executes."""
        return build_plan(self.schedule, num_ranks=self.pp, num_chunks=self.num_chunks)

    def layout(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be resumed bit for bit."""
        # A run may be prolonged (which stretches its learning-rate schedule) or moved to another
        # transport or memory level; everything else decides what is in the checkpoint.
        free = {"steps", "warmup", "timeout_s", "rebalance_every", "uneven_replicas", "spare_bytes"}
        free |= {"transport", "stage_transport", "comm_sms", "sm_means"}
        layout = {k: v for k, v in asdict(self).items() if k not in free}
        del layout["model"]["memory_level"]
        return layout
