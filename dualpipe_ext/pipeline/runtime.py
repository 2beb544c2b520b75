"""The runtime: executes any plan, on the CPU (gloo) or on GPUs (copy engines or NCCL).

What belongs here: :class:`Pipeline` and its two named forms, the checks of what users pass, and
what outlives a step. P ranks in the group, numbered 0..P-1 by ``rank_mapping``; chunks are the
micro-batches of a step.

Why it cannot deadlock. Every ordered pair of ranks that exchange messages has a channel of its own
(``p2p.py``), and sender and receiver derive the same order of messages from the plan
(``messages.py``). Sends never wait: a rank waits only for a message that its next action needs.
When it does, it has posted the receives of all earlier messages of that channel, so the channel
moves on whatever else is pending, and the message arrives once its sender has run the action that
produces it. The sender waits in turn only for what its own actions need. So a circle of waiting
ranks would be a circle of actions that need each other's results in plan order, and a plan that has
none (``check_plan``) runs to its end.

With NCCL there is more to wait for: a posted send or receive occupies the device until the peer
takes its part, and whatever synchronises the device (the first launch of a kernel, freeing memory)
waits for all of them. Therefore nothing is received ahead of the action that needs it. A rank held
up so waits for messages that it needs now, and for the receivers of messages it has sent. Suppose
rank r waits for rank s to receive. If s waits for r in turn, it is for a later message of the same
channel, and then it has posted the earlier one too; if it waits for the rank beyond, so does the
argument, and a chain of ranks ends. Copy engines occupy the device less (docs/internals.md, stage
to stage): a receive while its rank has nothing else to do, a send only while the ring at its
receiver is full of what was sent before, and sums of stage copies a thread or two until both ranks
have computed a stage's gradients.

Why it cannot hang. Every wait of the host ends after ``timeout_s`` with an error that names the
ranks and the message. On CUDA the host runs ahead of the device and waits for its peers only at the
first message of a stage boundary, before the gradients of stage copies are summed, at the end of
the step, and, of ``peers``, where pairs take the order that their times ask for, once or a few
times in a run. In between, every wait of the device ends after ``timeout_s`` too where copy engines
send, and the host raises at its next call; with NCCL its watchdog ends the process if a peer stalls
for longer than ``timeout_s`` and a minute.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualpipe_ext.agreement import Agreement
from dualpipe_ext.errors import DualPipeError
from dualpipe_ext.pipeline import microbatch, mirror
from dualpipe_ext.pipeline.connections import DEFAULT_RING_BYTES, ConnectionOptions, connect
from dualpipe_ext.pipeline.exchange import Exchange, TensorSpec
from dualpipe_ext.pipeline.executor import Batch, StepExecutor
from dualpipe_ext.pipeline.overlap import Launcher
from dualpipe_ext.pipeline.plan import Plan, build_plan
from dualpipe_ext.pipeline.stage import Criterion, LocalStage
from dualpipe_ext.pipeline.timing import StepRecord, Stopwatch
from dualpipe_ext.pipeline.weight_grad import WeightGradStore
from dualpipe_ext.sms import SMPartition

PlanFactory = Callable[..., Plan]

_CLOSED = "close()"


class Pipeline(nn.Module):
    """One rank's part of a pipeline.

    Creating one is collective over ``group``, and so is every step.

    Args:
        kind: a schedule's name (see ``build_plan``), or a function ``(*, num_ranks, num_chunks)``
            that returns a plan; its stages and pipes must not depend on ``num_chunks``.
        stages: the modules of this rank's virtual stages, ascending: one for ``1f1b`` and
            ``zb1p``, else two. See :class:`Phase` for what a stage can offer to be overlapped.
        group: the pipeline's process group; by default the world.
        batch_dim: dimension along which inputs and labels are cut into chunks.
        rank_mapping: ``rank_mapping[i]`` is the pipeline rank of group rank i; by default i.
        zero_bubble: compute deferred weight gradients where the plan has its W. Without it, every
            backward is a full one, with the same gradients.
        sync_mirrored_grads: at the end of a training step, sum the gradients of the copies that
            DualPipe has of every stage. Gradients from before the step are left out of that sum,
            so accumulating over steps works.
        dynamic_shapes: stage outputs may differ in number, shape or dtype from chunk to chunk.
            Differences that come from the inputs' own shapes are noticed without it.
        boundary: shapes and dtypes at every stage boundary, if they are the same at all of them;
            spares the headers that announce them.
        transport: how tensors travel from stage to stage, and gradients between stage copies:
            "copy_engine" (into the memory of the peer, which takes no SM; GPUs of one host, joined
            by NVLink), "collective" (NCCL, or gloo on the CPU), or "auto" for the first of these
            that all ranks can use.
        ring_bytes: with "copy_engine", memory on the device for messages on their way, for every
            rank that sends to this one. Larger messages travel too, in pieces that wait for each
            other. Sends rarely wait if it holds four messages.
        timeout_s: longest wait for another rank, in seconds.
        record: keep the times of each step in ``last_step``.
        on_launch: called with the name of every phase before it is launched.
        weight_grads: keeps deferred weight gradients.
        partition: is told when steps begin and end, and what runs in pairs.
        peers: the ranks that run the same stages in step with this one and communicate within
            them: an expert-parallel group. They then launch pairs in the same order, which all of
            them take from the times of the slowest. All of them make the same pipelines in the
            same order, run the same pairs, capture the same ones in CUDA graphs, and change the
            partition at the same place.

    Attributes:
        stages: the modules.
        rank: this rank in the pipeline.
        num_ranks: ranks in the pipeline.
        transport: "copy_engine" or "collective".
        boundary: see above; may be changed between steps, on all ranks alike.
        last_step: times of the last step, if ``record``.
    """

    def __init__(
        self,
        kind: str | PlanFactory,
        stages: nn.Module | Sequence[nn.Module],
        group: dist.ProcessGroup | None = None,
        *,
        batch_dim: int = 0,
        rank_mapping: Sequence[int] | None = None,
        zero_bubble: bool = True,
        sync_mirrored_grads: bool = True,
        dynamic_shapes: bool = False,
        boundary: Sequence[TensorSpec] | None = None,
        transport: str = "auto",
        ring_bytes: int = DEFAULT_RING_BYTES,
        timeout_s: float = 600.0,
        record: bool = False,
        on_launch: Callable[[str], None] | None = None,
        weight_grads: WeightGradStore | None = None,
        partition: SMPartition | None = None,
        peers: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check_options(kind, batch_dim)
        options = ConnectionOptions(transport, ring_bytes, timeout_s)
        group = group or _world()
        self.num_ranks = group.size()
        self.rank = _pipeline_rank(group, rank_mapping)
        self.stages = _as_module_list(stages)
        self.batch_dim = batch_dim
        self.boundary = None if boundary is None else tuple(boundary)
        self.last_step: StepRecord | None = None
        self._options = (zero_bubble, dynamic_shapes, record)
        self._store = WeightGradStore() if weight_grads is None else weight_grads
        self._device = _device_of(self.stages)
        self._broken: str | None = None
        self._factory: PlanFactory = partial(build_plan, kind) if isinstance(kind, str) else kind
        self._plans: dict[int, Plan] = {}
        # Any number of chunks will do to learn the stages; this one all schedules can run.
        layout = self._plan(2 * self.num_ranks)
        self._sync = sync_mirrored_grads and layout.has_copies
        ids = layout.stages_of(self.rank)
        if len(ids) != len(self.stages):
            raise ValueError(
                f"expected {len(ids)} stage{'s' * (len(ids) > 1)} per rank for {layout.kind}, "
                f"got {len(self.stages)}"
            )
        alone = peers is None or peers.size() == 1
        agree = list if alone else Agreement(peers, timeout_s).largest
        self._launcher = Launcher(self._device, on_launch, partition, agree)
        self._local = {
            stage: LocalStage(module, self._launcher, self._store)
            for stage, module in zip(ids, self.stages, strict=True)
        }
        self._connect(layout, group, options)

    def _connect(self, layout: Plan, group: dist.ProcessGroup, options: ConnectionOptions) -> None:
        """Agree with the other ranks that this is one pipeline, and open the channels."""
        mine = {
            "token": uuid.uuid4().hex,
            "kind": layout.kind,
            "rank": self.rank,
            "sync_mirrored_grads": self._sync,
            "device": self._device.type,
            "transport": options.transport,
            "ring_bytes": options.ring_bytes,
            "copies": [
                (layout.model_stage(stage), mirror.fingerprint(local.module))
                for stage, local in self._local.items()
                if self._sync
            ],
        }
        everyone: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(everyone, mine, group=group)
        _check_agreement(everyone)
        pipeline_ranks = [info["rank"] for info in everyone]
        self._connections = connect(
            layout,
            group,
            pipeline_ranks,
            token=min(everyone, key=lambda info: info["rank"])["token"],
            device=self._device,
            options=options,
            sync=self._sync,
        )
        self.transport = self._connections.transport

    def step(
        self,
        *inputs: Tensor | None,
        num_chunks: int,
        criterion: Criterion | None = None,
        labels: Sequence[Tensor | None] = (),
        return_outputs: bool = False,
    ) -> tuple[Tensor | None, Any]:
        """Run one training step, or one inference step under ``torch.no_grad()``.

        Gradients are accumulated into ``.grad``. Losses are not averaged over chunks: the gradient
        is that of their sum.

        Args:
            *inputs: of the model, where a pipe begins: rank 0 and, for DualPipe, the last rank,
                each with its half of the batch. Ignored on other ranks.
            num_chunks: number of chunks, for DualPipe of both directions together.
            criterion: ``criterion(*outputs, *labels)`` gives a scalar loss. Needed in training
                where a pipe ends: the last rank for ``1f1b`` and ``zb1p``, rank 0 for ``zbv`` and
                DualPipeV, both ends for DualPipe.
            labels: tensors for the criterion, where a pipe ends. For DualPipe those of the inputs
                that the *other* end gave.
            return_outputs: also return the model's outputs.

        Returns:
            ``(loss, outputs)``. The losses of the chunks, [chunks of the pipe], where a pipe ends
            and there is a criterion, else None. The outputs, concatenated over the chunks, where a
            pipe ends and they are asked for (a tuple if there are several), else None.

        Raises:
            ValueError: arguments do not fit; nothing has been sent, and the pipeline can go on.
            CommTimeoutError: a rank was waited for too long.
            DualPipeError: a rank was lost or runs another step, or an earlier step failed. After
                any error inside a step the pipeline is broken and must be built anew.
        """
        self._check_usable()
        plan = self._plan(num_chunks)
        training = torch.is_grad_enabled()
        sync = training and self._sync
        batch = self._batch(plan, inputs, criterion, labels, return_outputs, training)
        try:
            with self._launcher.step():
                with mirror.grads_set_aside(self.parameters()) if sync else nullcontext():
                    self._run(plan, batch, training, sync)
                if any(batch.needs_grad):
                    grads = [batch.input_grads[chunk] for chunk in sorted(batch.input_grads)]
                    microbatch.backward_inputs(inputs, grads, self.batch_dim)
                self._launcher.settle()
        except BaseException as error:
            self._broken = f"{type(error).__name__}: {error}"
            self._launcher.forget_left()
            self._store.clear()
            raise
        losses = [batch.losses[chunk] for chunk in sorted(batch.losses)]
        outputs = [batch.outputs[chunk] for chunk in sorted(batch.outputs)]
        return (
            torch.stack(losses) if losses else None,
            microbatch.merge(outputs, self.batch_dim) if outputs else None,
        )

    def close(self) -> None:
        """Give up the channels; no step can follow. Waits for other ranks for seconds at most."""
        abort = self._broken not in (None, _CLOSED)
        self._broken = self._broken or _CLOSED
        self._connections.close(abort=abort)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Not available: one rank alone has no result."""
        raise ValueError("expected a call of step(), got a call of the pipeline itself")

    def _check_usable(self) -> None:
        if self._broken == _CLOSED:
            raise DualPipeError("expected an open pipeline, got one after close(); build it anew")
        if self._broken is not None:
            raise DualPipeError(
                f"expected a pipeline whose steps succeeded, got one that failed with "
                f"{self._broken}; build it anew"
            )

    def _plan(self, num_chunks: int) -> Plan:
        if not isinstance(num_chunks, int):
            raise ValueError(f"expected num_chunks to be a positive integer, got {num_chunks!r}")
        if num_chunks not in self._plans:
            plan = self._factory(num_ranks=self.num_ranks, num_chunks=num_chunks)
            if not isinstance(plan, Plan):
                raise ValueError(f"expected kind to make a Plan, got {type(plan).__name__}")
            self._plans[num_chunks] = plan
        return self._plans[num_chunks]

    def _batch(
        self,
        plan: Plan,
        inputs: Sequence[Any],
        criterion: Criterion | None,
        labels: Sequence[Any],
        return_outputs: bool,
        training: bool,
    ) -> Batch:
        """Check what the user passed, and cut it into chunks."""
        begins = any(plan.is_first(stage) for stage in self._local)
        ends = any(plan.is_last(stage) for stage in self._local)
        per_pipe = plan.chunks_of_pipe(0)
        if ends and training and criterion is None:
            raise ValueError(
                f"expected a criterion on rank {self.rank}, where a pipe ends, got none; "
                f"for inference, call step() under torch.no_grad()"
            )
        if begins and not any(isinstance(x, Tensor) for x in inputs):
            raise ValueError(f"expected inputs on rank {self.rank}, where a pipe begins, got none")
        batch = Batch([], [], criterion if ends else None, [], return_outputs)
        if begins:
            batch.inputs = microbatch.split("inputs", inputs, per_pipe, self.batch_dim)
            batch.needs_grad = [
                training and isinstance(x, Tensor) and x.requires_grad for x in inputs
            ]
        if ends and criterion is not None:
            batch.labels = microbatch.split("labels", labels, per_pipe, self.batch_dim)
        return batch

    def _run(self, plan: Plan, batch: Batch, training: bool, sync: bool) -> None:
        zero_bubble, dynamic_shapes, record = self._options
        exchange = Exchange(
            plan,
            self.rank,
            self._connections.outgoing,
            self._connections.incoming,
            device=self._device,
            forward_only=not training,
            varying=dynamic_shapes,
            declared=self.boundary,
        )
        if microbatch.uneven(batch.inputs):
            for stage in self._local:
                if plan.is_first(stage):
                    exchange.mark_varying(stage)
        stopwatch = Stopwatch(self._device) if record else None
        sums = self._grad_sums(plan) if sync else None
        StepExecutor(
            plan,
            self.rank,
            self._local,
            exchange,
            batch,
            training=training,
            zero_bubble=zero_bubble,
            stopwatch=stopwatch,
            on_grads=None if sums is None else partial(self._have_grads, sums),
        ).run()
        self._launcher.catch_up()
        assert not len(self._store)
        if sums is not None:
            if self.transport == "collective":
                # Nothing else is to be on its way over NCCL: see exchange.py.
                exchange.finish()
            sums.run()
        exchange.finish()
        if stopwatch is not None:
            self.last_step = stopwatch.record()

    def _grad_sums(self, plan: Plan) -> mirror.GradSums:
        order = mirror.order_of_sums(plan, self.rank)
        modules = {stage: self._local[stage].module for stage in order}
        assert self._connections.mirror is not None
        return mirror.GradSums(modules, self._connections.mirror, self._device)

    def _have_grads(self, sums: mirror.GradSums, stage: int) -> None:
        self._launcher.catch_up()
        sums.ready(stage)


class DualPipe(Pipeline):
    """DeepSeek's bidirectional pipeline; see :class:`Pipeline` for the options.

    Args:
        stages: of rank r in a pipeline of P: model stages r and P-1-r.
        group: an even number of ranks.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        super().__init__("dualpipe", stages, group, **options)


class DualPipeV(Pipeline):
    """DualPipe cut in half: one V-shaped pipe; see :class:`Pipeline` for the options.

    Args:
        stages: of rank r in a pipeline of P: model stages r and 2P-1-r.
        group: any number of ranks.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        super().__init__("dualpipev", stages, group, **options)


def _world() -> dist.ProcessGroup:
    if not dist.is_initialized():
        raise ValueError(
            "expected an initialised torch.distributed, got none; call init_process_group"
        )
    return dist.group.WORLD


def _pipeline_rank(group: dist.ProcessGroup, rank_mapping: Sequence[int] | None) -> int:
    size = group.size()
    mapping = list(range(size)) if rank_mapping is None else list(rank_mapping)
    if sorted(mapping) != list(range(size)):
        raise ValueError(
            f"expected rank_mapping to be a permutation of 0..{size - 1}, got {mapping}"
        )
    return mapping[group.rank()]


def _as_module_list(stages: Any) -> nn.ModuleList:
    """One module is one stage, whatever it is made of, but for a ModuleList."""
    if isinstance(stages, nn.Module) and not isinstance(stages, nn.ModuleList):
        return nn.ModuleList([stages])
    if not isinstance(stages, (list, tuple, nn.ModuleList)):
        raise ValueError(
            f"expected stages as a module or a sequence of modules, got {type(stages).__name__}"
        )
    wrong = [type(stage).__name__ for stage in stages if not isinstance(stage, nn.Module)]
    if wrong:
        raise ValueError(f"expected every stage to be an nn.Module, got {wrong[0]}")
    return nn.ModuleList(stages)


def _check_options(kind: object, batch_dim: object) -> None:
    if not isinstance(kind, str) and not callable(kind):
        raise ValueError(
            f"expected kind as a schedule's name or a function, got {type(kind).__name__}"
        )
    if not isinstance(batch_dim, int) or batch_dim < 0:
        raise ValueError(f"expected batch_dim of 0 or more, got {batch_dim!r}")


def _device_of(stages: nn.ModuleList) -> torch.device:
    """Where the stages are; without parameters, where the process computes."""
    tensors = (*stages.parameters(), *stages.buffers())
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(
            f"expected all stages of a rank on one device, got {sorted(map(str, devices))}"
        )
    if devices:
        return devices.pop()
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _check_agreement(everyone: list[dict[str, Any]]) -> None:
    """All ranks must have built the same pipeline, and copies of a stage must be copies."""
    for what in ("kind", "sync_mirrored_grads", "device", "transport", "ring_bytes"):
        values = {info["rank"]: info[what] for info in everyone}
        if len(set(values.values())) > 1:
            raise ValueError(f"expected the same {what} on every rank, got {values}")
    seen: dict[int, tuple[int, str]] = {}
    for info in everyone:
        for model_stage, parameters in info["copies"]:
            rank, known = seen.setdefault(model_stage, (info["rank"], parameters))
            if known != parameters:
                raise ValueError(
                    f"expected two copies of model stage {model_stage} with the same parameters "
                    f"(names, shapes, dtypes), got different ones on pipeline ranks {rank} and "
                    f"{info['rank']}; rank r of P takes model stages r and P-1-r"
                )
