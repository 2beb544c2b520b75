"""One rank's part of a training run: the stages it holds, and one optimizer step.

B sequences per step, L tokens per sequence, NL layers, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from dualpipe_ext.ep import Buffer
from dualpipe_ext.models import LanguageModelStage, initialize, split_layers
from dualpipe_ext.pipeline import Pipeline
from dualpipe_ext.pipeline.weight_grad import defer_weight_grads
from dualpipe_ext.training.average import TrainingAverage
from dualpipe_ext.training.config import DTYPES, TrainConfig
from dualpipe_ext.training.data import ByteBatches
from dualpipe_ext.training.experts import ExpertBalancer, LocalLayer
from dualpipe_ext.training.optimizer import MasterAdamW, learning_rate


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did.

    Attributes:
        step: steps done, this one included.
        loss: mean cross-entropy over the step's tokens, in nats per token.
        seconds: wall-clock time of the step.
        tokens: tokens in the step, over all ranks.
        bubble: share of the ranks' time in the pipeline that was not spent computing, 0 to 1.
        balance: mean over layers of mean rank load / largest rank load, 0 to 1.
        grad_norm: norm of the whole gradient before clipping.
        lr: learning rate of the step.
        moved_bytes: expert weights and optimizer state that a rebalancing moved, in this rank's
            expert-parallel group.
    """

    step: int
    loss: float
    seconds: float
    tokens: int
    bubble: float
    balance: float
    grad_norm: float
    lr: float
    moved_bytes: int


class Trainer:
    """Holds this rank's stages and optimizer, and takes steps together with the other ranks.

    Ranks are laid out pipeline-major: rank = pp_rank * ep + ep_rank, so that an expert-parallel
    group is a run of neighbouring ranks and, on GPUs, stays inside a host.

    Args:
        config: the run; ``pp * ep`` must be the number of ranks of the default process group.
        text: training text.
        device: this rank's device.
    """

    def __init__(self, config: TrainConfig, text: bytes, *, device: torch.device) -> None:
        if dist.get_world_size() != config.pp * config.ep:
            raise ValueError(
                f"expected pp x ep = {config.pp} x {config.ep} ranks, got {dist.get_world_size()}"
            )
        self.config, self.device = config, device
        self.steps_done = 0
        self.plan = config.plan()
        mesh = init_device_mesh(device.type, (config.pp, config.ep), mesh_dim_names=("pp", "ep"))
        self._pp_group, self._ep_group = mesh.get_group("pp"), mesh.get_group("ep")
        self._pp_rank, self._ep_rank = mesh.get_local_rank("pp"), mesh.get_local_rank("ep")
        self.buffer = self._make_buffer()
        self.stages = self._make_stages()
        self.balancer = ExpertBalancer(
            config, self._moe_layers(), group=self._ep_group, device=device
        )
        self._initialize()
        self._parameters = dict(self._named_parameters())
        self.optimizer = MasterAdamW(self._parameters, weight_decay=config.weight_decay)
        self.pipeline = Pipeline(
            config.schedule,
            self.stages,
            self._pp_group,
            timeout_s=config.timeout_s,
            record=True,
        )
        self.average: TrainingAverage | None = None
        if config.ema is not None:
            self.average = TrainingAverage(
                config,
                self.pipeline.stages,
                self.optimizer,
                self._moe_layers(),
                group=self._ep_group,
            )
        self._batches = ByteBatches(
            text, batch=config.batch, seq_len=config.seq_len, seed=config.seed
        )

    def _make_buffer(self) -> Buffer:
        config = self.config
        return Buffer(
            self._ep_group,
            hidden=config.model.hidden,
            num_experts=config.num_slots,
            top_k=config.model.top_k,
            max_tokens=config.micro_batch * config.seq_len,
            dtype=DTYPES[config.dtype],
            transport=config.transport,
            num_slabs=0,
            timeout_s=config.timeout_s,
        )

    def _make_stages(self) -> list[LanguageModelStage]:
        layers = split_layers(self.config.model.num_layers, len(self.plan.pipes[0]))
        dtype = DTYPES[self.config.dtype]
        stages = []
        for virtual in self.plan.stages_of(self._pp_rank):
            stage = LanguageModelStage(
                self.config.model,
                layers[self.plan.model_stage(virtual)],
                buffer=self.buffer,
                replica_offset=self._ep_rank,
            ).to(self.device, dtype)
            for layer in stage.layers.values():
                # Routing is decided in float32 at least, so its weight and bias are kept in it.
                layer.router.to(torch.promote_types(dtype, torch.float32))
            stages.append(defer_weight_grads(stage))
        return stages

    def _moe_layers(self) -> list[LocalLayer]:
        return [
            LocalLayer(int(index), f"{position}.layers.{index}", layer)
            for position, stage in enumerate(self.stages)
            for index, layer in stage.layers.items()
        ]

    def _initialize(self) -> None:
        for stage in self.stages:
            initialize(
                stage,
                self.config.model,
                seed=self.config.seed,
                local_experts=self.balancer.local_experts(),
            )

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for position, stage in enumerate(self.stages):
            yield from stage.named_parameters(prefix=str(position))

    def step(self) -> StepReport:
        """Take one optimizer step; every rank returns the same loss, bubble and balance."""
        started = time.perf_counter()
        config = self.config
        loss = self._forward_backward(self.steps_done)
        self._reduce_gradients()
        loss, bubble = self._exchange_statistics(loss)
        lr = learning_rate(
            self.steps_done, peak=config.lr, warmup=config.warmup, steps=config.steps
        )
        grad_norm = self._gradient_norm()
        # As torch.nn.utils.clip_grad_norm_: never scales up.
        scale = (config.clip / (grad_norm + 1e-6)).clamp(max=1.0)
        self.optimizer.step(lr, grad_scale=scale)
        self.steps_done += 1
        moved = 0
        if config.rebalance_every and self.steps_done % config.rebalance_every == 0:
            with nullcontext() if self.average is None else self.average.following(self.balancer):
                moved = self.balancer.rebalance(self.optimizer)
        return StepReport(
            step=self.steps_done,
            loss=float(loss),
            seconds=time.perf_counter() - started,
            tokens=config.batch * config.seq_len,
            bubble=bubble,
            balance=self.balancer.balance(),
            grad_norm=float(grad_norm),
            lr=lr,
            moved_bytes=moved,
        )

    def _forward_backward(self, step: int) -> Tensor:
        """Run the pipeline; returns this rank's share of the mean loss, to be summed."""
        inputs, labels = self._batches.at(step)
        config, plan, rank = self.config, self.plan, self._pp_rank
        # Sequences of one chunk lie together, and inside it those of one expert-parallel rank, so
        # that the same sequences make up a step however many ranks share it.
        shape = (config.num_chunks, config.ep, config.micro_batch, config.seq_len)
        mine = [t.view(shape)[:, self._ep_rank].to(self.device) for t in (inputs, labels)]
        per_pipe = config.num_chunks // len(plan.pipes)
        feeds, targets = [], []
        for index, pipe in enumerate(plan.pipes):
            chunks = slice(index * per_pipe, (index + 1) * per_pipe)
            if plan.stage_rank[pipe[0]] == rank:
                feeds.append(mine[0][chunks].flatten(0, 1))
            if plan.stage_rank[pipe[-1]] == rank:
                targets.append(mine[1][chunks].flatten(0, 1))
        losses, _ = self.pipeline.step(
            *feeds, num_chunks=config.num_chunks, criterion=self._criterion, labels=targets
        )
        wide = torch.promote_types(DTYPES[config.dtype], torch.float32)
        return torch.zeros((), dtype=wide, device=self.device) if losses is None else losses.sum()

    def _criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        # Divided here so that plain sums over chunks and ranks give the mean over the whole step.
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = nn.functional.cross_entropy(wide.flatten(0, 1), labels.flatten())
        return loss / (self.config.num_chunks * self.config.ep)

    def _is_expert(self, name: str) -> bool:
        position, _, rest = name.partition(".")
        return self.stages[int(position)].is_expert(rest)

    def _reduce_gradients(self) -> None:
        """Sum dense gradients over the data-parallel ranks, expert gradients over the replicas."""
        self.balancer.reduce_replica_gradients()
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for name, parameter in self._parameters.items():
            if parameter.grad is not None and not self._is_expert(name):
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for grads in by_dtype.values():
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat, group=self._ep_group)
            for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(part.view_as(grad))

    def _exchange_statistics(self, loss: Tensor) -> tuple[Tensor, float]:
        """Sum losses and loads over all ranks; returns the loss and the share of idle time."""
        times = self.pipeline.last_step
        assert times is not None
        counts = self.balancer.take_counts()
        num_ranks = dist.get_world_size()
        # Summed, a vector with one entry set per rank is a gather; float64 carries counts exactly:
        # so one message serves all.
        spans = [0.0] * num_ranks
        spans[dist.get_rank()] = times.span_s
        head = torch.tensor([times.busy_s, *spans], dtype=torch.float64).to(self.device)
        message = torch.cat([loss.detach().double().view(1), head, counts.flatten().double()])
        dist.all_reduce(message)
        self.balancer.observe(message[2 + num_ranks :].round().long().view_as(counts))
        busy_s, *spans = message[1 : 2 + num_ranks].tolist()
        # The step takes as long as its slowest rank.
        return message[0], 1.0 - busy_s / (num_ranks * max(spans))

    def _gradient_norm(self) -> Tensor:
        """Norm of the model's gradient: copies and replicas of a parameter count once."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        logcnt, phy2log = self.balancer.placement.logcnt, self.balancer.placement.phy2log
        slots = self.config.num_slots // self.config.ep
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            squares = parameter.grad.double().square()
            if not self._is_expert(name):
                total += squares.sum() / self.config.ep
                continue
            layer = int(name.split(".")[2])
            mine = phy2log[layer, self._ep_rank * slots : (self._ep_rank + 1) * slots]
            total += (squares.flatten(1).sum(dim=1) / logcnt[layer, mine]).sum()
        dist.all_reduce(total)
        return (total / len(self.plan.pipes)).sqrt()

    def close(self) -> None:
        """Give up the connections to the other ranks of the pipeline, and end the average."""
        self.pipeline.close()
        if self.average is not None:
            self.average.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything of this rank that the next steps depend on."""
        return {
            "steps_done": self.steps_done,
            "stages": [stage.state_dict() for stage in self.stages],
            "optimizer": self.optimizer.state_dict(),
            "phy2log": self.balancer.placement.phy2log,
            "monitor": self.balancer.monitor.state_dict(),
            "ema": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned on the same rank of an equal run."""
        self.balancer.load(state["phy2log"], state["monitor"])
        for stage, saved in zip(self.stages, state["stages"], strict=True):
            stage.load_state_dict(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["ema"])
        self.steps_done = state["steps_done"]
