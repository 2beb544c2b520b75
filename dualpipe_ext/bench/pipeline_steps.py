"""Whole steps under each schedule: the same model, micro-batches and work per GPU.

What belongs here: building a schedule's part of the model on each rank, the check that all
schedules compute the same loss and gradients, timed steps, and what the simulator makes of the
times that their actions took.

P pipeline ranks, R expert-parallel ranks, m micro-batches of T tokens. A model of P x
``step_layers`` layers without embedding and head, so that stages are equal, is cut into as many
stages as the schedule has; a micro-batch goes through all of it. So a rank does the work of
``step_layers`` layers on m micro-batches under every schedule; DualPipe holds twice the parameters
for it. There is no optimizer; gradients are let go of before a step. Attributes of a step's
actions, and its bubble, are those of ``StepRecord``; the mirrored gradients that DualPipe sums at
the end count in the step's time, not in its span.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from dualpipe_ext.bench import timing
from dualpipe_ext.bench.pipeline_cases import (
    PipelineOptions,
    PipelineRow,
    new_row,
    step_flops_per_token,
)
from dualpipe_ext.bench.ranks import MEETING_TIMEOUT_S, Ranks
from dualpipe_ext.bench.record import percentiles
from dualpipe_ext.bench.stage import middle_stage
from dualpipe_ext.ep import Buffer
from dualpipe_ext.models import ModelConfig, split_layers
from dualpipe_ext.pipeline.plan import Plan, build_plan, parts
from dualpipe_ext.pipeline.runtime import Pipeline
from dualpipe_ext.pipeline.simulate import Durations, simulate
from dualpipe_ext.pipeline.timing import StepRecord

_WARM_UP = 2
# Far above what another order of rounding does to sums over a model, far below a missing chunk.
_LARGEST_ERROR = 0.02


class Mesh:
    """Where this rank is among P x R; rank = pipeline rank * R + expert-parallel rank."""

    def __init__(self, ranks: Ranks, ep: int) -> None:
        self.pp, self.ep = ranks.num_ranks // ep, ep
        mesh = init_device_mesh(ranks.device.type, (self.pp, self.ep), mesh_dim_names=("pp", "ep"))
        self.pp_group, self.ep_group = mesh.get_group("pp"), mesh.get_group("ep")
        self.pp_rank, self.ep_rank = mesh.get_local_rank("pp"), mesh.get_local_rank("ep")


def model_of(options: PipelineOptions, pp: int) -> ModelConfig:
    """The whole model on this many pipeline ranks."""
    return options.step_model.with_overrides(num_layers=pp * options.step_layers)


def step_buffer(options: PipelineOptions, mesh: Mesh) -> Buffer:
    """The expert-parallel buffer of the steps."""
    model = options.step_model
    return Buffer(
        mesh.ep_group,
        hidden=model.hidden,
        num_experts=model.num_experts,
        top_k=model.top_k,
        max_tokens=options.tokens,
        dtype=options.dtype,
        transport=options.step_transport,
        num_sms=options.sms[0],
        num_slabs=0,
    )


class StepBench:
    """One schedule; made and used by all ranks together."""

    def __init__(
        self, ranks: Ranks, options: PipelineOptions, mesh: Mesh, buffer: Buffer, kind: str
    ) -> None:
        self._ranks, self._options, self._mesh = ranks, options, mesh
        self._transport = buffer.transport
        self.plan = build_plan(kind, num_ranks=mesh.pp, num_chunks=options.num_chunks)
        self._model = model_of(options, mesh.pp)
        cuts = split_layers(self._model.num_layers, len(self.plan.pipes[0]))
        self._stages = [
            middle_stage(
                self._model,
                cuts[self.plan.model_stage(virtual)],
                buffer=buffer,
                dtype=options.dtype,
                device=ranks.device,
            )
            for virtual in self.plan.stages_of(mesh.pp_rank)
        ]
        self._pipeline = Pipeline(
            kind,
            self._stages,
            mesh.pp_group,
            transport=options.stage_transport,
            record=True,
            timeout_s=MEETING_TIMEOUT_S,
            peers=mesh.ep_group,
        )
        self._inputs, self._labels = self._batch(0), self._batch(1)

    def _batch(self, seed: int) -> Tensor | None:
        """Inputs (seed 0) or labels (1) of the micro-batches that begin or end at this rank.

        The n-th of the step has the same values whatever the schedule.
        """
        plan, pp_rank = self.plan, self._mesh.pp_rank
        per_pipe = self._options.num_chunks // len(plan.pipes)
        edges = [pipe[0] if seed == 0 else pipe[-1] for pipe in plan.pipes]
        mine = [number for number, stage in enumerate(edges) if plan.stage_rank[stage] == pp_rank]
        if not mine:
            return None
        (pipe,) = mine
        chunks = range(pipe * per_pipe, (pipe + 1) * per_pipe)
        return torch.cat([self._draw(2 * chunk + seed) for chunk in chunks])

    def _draw(self, number: int) -> Tensor:
        options, device = self._options, self._ranks.device
        generator = torch.Generator(device).manual_seed(number * self._mesh.ep + self._mesh.ep_rank)
        shape = (options.tokens // options.seq_len, options.seq_len, self._model.hidden)
        values = torch.empty(shape, device=device, dtype=options.dtype)
        return values.normal_(generator=generator)

    def step(self) -> Tensor | None:
        """One step; the losses of the micro-batches where they end."""
        for stage in self._stages:
            stage.zero_grad()
        loss, _ = self._pipeline.step(
            self._inputs,
            num_chunks=self._options.num_chunks,
            criterion=_squared_error,
            labels=(self._labels,),
        )
        return loss

    def close(self) -> None:
        """Give up the pipeline's channels."""
        self._pipeline.close()

    def fingerprint(self) -> tuple[float, float]:
        """Of a step: the sum of all losses, and of all squared gradients of the model."""
        loss = self.step()
        squares = sum(
            float(parameter.grad.norm(dtype=torch.float32)) ** 2
            for stage in self._stages
            for parameter in stage.parameters()
        )
        # Both copies of a stage have the sum of both.
        copies = len(self.plan.pipes)
        mine = (0.0 if loss is None else float(loss.double().sum()), squares / copies)
        everyone = self._ranks.gather_object(mine)
        return sum(loss for loss, _ in everyone), sum(squares for _, squares in everyone)

    def measure(self, send_s: float) -> PipelineRow:
        """Time steps, and compare them with the simulator's.

        Args:
            send_s: what a micro-batch's activations take to the next rank.
        """
        options, ranks, mesh = self._options, self._ranks, self._mesh
        times, spans, bubbles = [], [], []
        seconds: dict[str, list[float]] = defaultdict(list)
        for _ in range(_WARM_UP):
            self.step()
        with timing.no_garbage_collection():
            for _ in range(options.rounds):
                times.append(1e-3 * timing.measure(self.step, 1, ranks))
                records = self._records()
                spans.append(max(record.span_s for record in records))
                bubbles.append(mean([record.bubble(spans[-1]) for record in records]))
                add_action_times(seconds, self.plan, records)
        times = ranks.maxima(times)
        medians = {name: median(values) for name, values in seconds.items()}
        simulation = simulate(self.plan, durations(self.plan, medians, comm=send_s))
        tokens = options.tokens * options.num_chunks * mesh.ep
        row = new_row(
            options,
            self._model,
            part="step",
            device=ranks.device.type,
            pp=mesh.pp,
            ep=mesh.ep,
            layers=options.step_layers,
            transport=self._transport,
            schedule=self.plan.kind,
            num_chunks=options.num_chunks,
            stage_transport=None if mesh.pp == 1 else self._pipeline.transport,
        )
        row.set_times("step_ms", percentiles(times))
        flops = tokens * step_flops_per_token(self._model, options.seq_len)
        flops *= self._model.num_layers
        step_s = 1e-3 * row.step_ms_p50
        row.tokens_per_s = round(tokens / step_s, 1)
        row.mfu = float(f"{flops / step_s / ranks.num_ranks / (1e12 * options.peak_tflops):.4g}")
        row.span_ms, row.bubble = round(1e3 * median(spans), 4), round(median(bubbles), 4)
        row.predicted_span_ms = round(1e3 * simulation.makespan, 4)
        row.predicted_bubble = round(simulation.bubble_ratio, 4)
        row.send_ms = round(1e3 * send_s, 4)
        for name, value in medians.items():
            setattr(row, f"{name.lower()}_ms", round(1e3 * value, 4))
        return row

    def _records(self) -> list[StepRecord]:
        """Of one rank per pipeline rank, the slowest of its expert-parallel ranks."""
        everyone = self._ranks.gather_object((self._mesh.pp_rank, self._pipeline.last_step))
        slowest: dict[int, StepRecord] = {}
        for pp_rank, record in everyone:
            if pp_rank not in slowest or record.span_s > slowest[pp_rank].span_s:
                slowest[pp_rank] = record
        return [slowest[pp_rank] for pp_rank in range(self._mesh.pp)]


def _squared_error(output: Tensor, label: Tensor) -> Tensor:
    return nn.functional.mse_loss(output.float(), label.float())


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def wrong_fingerprint(found: tuple[float, float], expected: tuple[float, float]) -> str | None:
    """What is wrong with a step's losses or gradients, if something is."""
    for what, value, right in zip(("losses", "squared gradients"), found, expected, strict=True):
        if not abs(value - right) <= _LARGEST_ERROR * abs(right):
            return f"expected {what} that sum to {right:.6g}, got {value:.6g}"
    return None


def add_action_times(
    seconds: dict[str, list[float]], plan: Plan, records: Sequence[StepRecord]
) -> None:
    """Add how long the actions of a step took, under F, B, I, W and FB (an overlapped pair)."""
    for steps, record in zip(plan.actions, records, strict=True):
        for step, times in zip(steps, record.actions, strict=True):
            done = parts(step)
            name = "FB" if len(done) == 2 else str(done[0].op)
            seconds[name].append(times.end_s - times.start_s)


def durations(plan: Plan, medians: dict[str, float], *, comm: float) -> Durations:
    """What the simulator takes, from the times of actions on one stage.

    A stage that is one of two of its rank is half a share. DualPipeV on 4 ranks, forwards of 3 ms:

    >>> plan = build_plan("dualpipev", num_ranks=4, num_chunks=8)
    >>> durations(plan, {"F": 3.0, "B": 6.0, "FB": 7.5}, comm=0.25).FB
    15.0
    """
    share = plan.num_ranks / len(plan.pipes[0])
    return Durations(comm=comm, **{name: value / share for name, value in medians.items()})


def send_seconds(ranks: Ranks, options: PipelineOptions, mesh: Mesh) -> float:
    """What a micro-batch's activations take to the next pipeline rank, all sending at once."""
    if mesh.pp == 1:
        return 0.0
    shape = (options.tokens, options.model.hidden)
    mine, theirs = (torch.zeros(shape, dtype=options.dtype, device=ranks.device) for _ in "ab")
    to, of = (dist.get_global_rank(mesh.pp_group, (mesh.pp_rank + d) % mesh.pp) for d in (1, -1))

    def send() -> None:
        for work in dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, mine, to, group=mesh.pp_group),
                dist.P2POp(dist.irecv, theirs, of, group=mesh.pp_group),
            ]
        ):
            work.wait()

    found = timing.interleaved({"send": send}, ranks, rounds=options.rounds, num_calls=5)
    return 1e-6 * median(found["send"])
