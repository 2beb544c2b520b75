"""One rank's part of a training run: the stages it holds, and one optimizer step.

B sequences per step, L tokens per sequence, NL layers, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

# Its import leaves the frames of whoever is first in a cycle (``torch.fx.wrap``). That would be the
# optimizer, and with it a Trainer that is being made, which then outlived its last reference.
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from dualpipe_ext.ep import Buffer
from dualpipe_ext.models import LanguageModelStage, initialize, split_layers
from dualpipe_ext.pipeline import Pipeline
from dualpipe_ext.pipeline.weight_grad import defer_weight_grads
from dualpipe_ext.sms import AUTO, SMPartition, SMTuner, set_partition
from dualpipe_ext.training.average import TrainingAverage
from dualpipe_ext.training.config import DTYPES, TrainConfig
from dualpipe_ext.training.data import ByteBatches
from dualpipe_ext.training.experts import ExpertBalancer, LocalLayer
from dualpipe_ext.training.optimizer import MasterAdamW, learning_rate
from dualpipe_ext.training.tuning import join, make_tuner


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
        moved_bytes: expert weights and optimizer state that have switched their place in this step,
            in this rank's expert-parallel group.
        moves_wait_s: wall-clock time that this rank waited for them.
        rebalance: 1 if a new placement was planned after this step and experts will move, -1 if it
            was not worth it, 0 if none was planned.
        saved_s: estimate of what the new placement saves until the next one, in seconds.
        cost_s: estimate of what moving there takes, in seconds, were nothing of it hidden.
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
    moves_wait_s: float
    rebalance: int
    saved_s: float
    cost_s: float


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
        self.partition = SMPartition(config.comm_sms, means=config.sm_means, device=device)
        self.tuner: SMTuner | None = None
        self._may_tune = True
        self.buffer = self._make_buffer()
        join(self.partition, self.buffer)
        self.stages = self._make_stages()
        self.balancer = ExpertBalancer(
            config, self._moe_layers(), group=self._ep_group, device=device
        )
        self._initialize()
        self._parameters = dict(self._named_parameters())
        self.optimizer = MasterAdamW(self._parameters, weight_decay=config.weight_decay)
        self.balancer.prepare_moves(self.optimizer)
        self.pipeline = Pipeline(
            config.schedule,
            self.stages,
            self._pp_group,
            transport=config.stage_transport,
            timeout_s=config.timeout_s,
            record=True,
            partition=self.partition,
            peers=self._ep_group,
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
            num_sms=None if config.comm_sms == AUTO else config.comm_sms,
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
            set_partition(stage, self.partition)
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
        self.start_tuning()
        started = time.perf_counter()
        config = self.config
        loss = self._forward_backward(self.steps_done)
        waited = time.perf_counter()
        self.balancer.wait_for_moves()
        waited = time.perf_counter() - waited
        with self._average_following_moves():
            moved = self.balancer.finish_moves()
        self._reduce_dense_gradients()
        loss, bubble = self._exchange_statistics(loss)
        lr = learning_rate(
            self.steps_done, peak=config.lr, warmup=config.warmup, steps=config.steps
        )
        grad_norm = self._gradient_norm()
        # As torch.nn.utils.clip_grad_norm_: never scales up.
        scale = (config.clip / (grad_norm + 1e-6)).clamp(max=1.0)
        self.optimizer.step(lr, grad_scale=scale)
        self.steps_done += 1
        verdict = None
        if config.rebalance_every and self.steps_done % config.rebalance_every == 0:
            verdict = self.balancer.plan()
        self.balancer.weigh_replicas()
        self.balancer.start_moves()
        report = StepReport(
            step=self.steps_done,
            loss=loss,
            seconds=time.perf_counter() - started,
            tokens=config.batch * config.seq_len,
            bubble=bubble,
            balance=self.balancer.balance(),
            grad_norm=float(grad_norm),
            lr=lr,
            moved_bytes=moved,
            moves_wait_s=waited,
            rebalance=0 if verdict is None else 1 if verdict.pays else -1,
            saved_s=0.0 if verdict is None else verdict.saved_s,
            cost_s=0.0 if verdict is None else verdict.cost_s,
        )
        if self.tuner is not None:
            # The statistics have waited for forward and backward, whose time is what differs.
            self.tuner.observe(report.seconds)
        return report

    def start_tuning(self) -> None:
        """Before the first step, which does it too: then it is known how many are to come."""
        if self._may_tune:
            self._may_tune = False
            to_come = self.config.steps - self.steps_done
            how = (self.partition, self.buffer, self.config.transport)
            self.tuner = make_tuner(*how, steps=to_come, device=self.device)

    def _average_following_moves(self) -> AbstractContextManager[None]:
        if self.average is None or not self.balancer.switching:
            return nullcontext()  # following them waits for the average
        return self.average.following(self.balancer)

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

    def _reduce_dense_gradients(self) -> None:
        """Sum all gradients but the experts' over the data-parallel ranks."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for name, parameter in self._parameters.items():
            if parameter.grad is not None and not self._is_expert(name):
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for grads in by_dtype.values():
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat, group=self._ep_group)
            for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(part.view_as(grad))

    def _exchange_statistics(self, loss: Tensor) -> tuple[float, float]:
        """Sum losses and loads over all ranks; returns the loss and the share of idle time.

        The host waits for the device once, for all of it.
        """
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
        on_host = message.cpu()
        self.balancer.observe(
            *(m[2 + num_ranks :].round().long().view_as(counts) for m in (message, on_host))
        )
        loss_sum, busy_s, *spans = on_host[: 2 + num_ranks].tolist()
        # The step takes as long as its slowest rank.
        return loss_sum, 1.0 - busy_s / (num_ranks * max(spans))

    def _gradient_norm(self) -> Tensor:
        """Norm of the model's gradient: copies and replicas of a parameter count once."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            squares = parameter.grad.double().square()
            if not self._is_expert(name):
                total += squares.sum() / self.config.ep
                continue
            layer = int(name.split(".")[2])
            total += (squares.flatten(1).sum(dim=1) / self.balancer.replicas[layer]).sum()
        dist.all_reduce(total)
        return (total / len(self.plan.pipes)).sqrt()

    def close(self) -> None:
        """Give up the connections to the other ranks of the pipeline, what is on its way, and the
        average. Communication memory goes with the last reference to the trainer."""
        self.balancer.close()
        self.pipeline.close()
        if self.average is not None:
            self.average.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything of this rank that the next steps depend on."""
        return {
            "steps_done": self.steps_done,
            "stages": [stage.state_dict() for stage in self.stages],
            "optimizer": self.optimizer.state_dict(),
            "experts": self.balancer.state_dict(),
            "ema": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned on the same rank of an equal run."""
        self.balancer.load_state_dict(state["experts"])
        for stage, saved in zip(self.stages, state["stages"], strict=True):
            stage.load_state_dict(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["ema"])
        self.steps_done = state["steps_done"]
        self.balancer.start_moves()
