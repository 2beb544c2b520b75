"""``torch.distributed.pipelining``'s schedules on this project's runtime: one import changes.

>>> from torch.distributed.pipelining import PipelineStage
>>> from dualpipe_ext.integrations.torch_pipelining import ScheduleDualPipeV

What belongs here: ``Schedule1F1B``, ``ScheduleZBVZeroBubble`` and ``ScheduleDualPipeV`` with the
constructors, ``step`` and ``eval`` of torch's. Stages stay torch's ``PipelineStage``; one whose
module offers ``phases()`` gets forward and backward overlapped. What torch offers besides and this
does not is refused: keyword arguments of the model, chunk and merge specifications, and modules
that reduce their gradients themselves (DDP, FSDP), since they would do so for every micro-batch.

Any other plan, DualPipe's among them, runs in torch's own runtime instead: see
``dualpipe schedule --csv``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel

from dualpipe_ext.pipeline.runtime import Pipeline

_REDUCES = (DistributedDataParallel, FullyShardedDataParallel, FSDPModule)


class _ScaleGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


class _Schedule:
    """What the schedules have in common; arguments are torch's, and then ours.

    Args:
        stages: this rank's, in any order.
        n_microbatches: micro-batches of a step.
        loss_fn: ``loss_fn(output, target, **loss_kwargs)`` gives a scalar; None: steps only run
            forward.
        args_chunk_spec: must be None, as must the other two.
        kwargs_chunk_spec: see above.
        output_merge_spec: see above.
        scale_grads: gradients are those of the mean over micro-batches, not of the sum.
        backward_requires_autograd: must be true.
        defer_pp_recv: has no meaning here, where receives never wait for the host.
        options: of :class:`~dualpipe_ext.pipeline.Pipeline`: ``transport``, ``peers``,
            ``partition``, ``timeout_s`` and others.

    Raises:
        ValueError: stages that this schedule does not have on this rank, or one of the things that
            are refused (see the module).
    """

    kind: ClassVar[str]

    def __init__(
        self,
        stages: Sequence[PipelineStage],
        n_microbatches: int,
        loss_fn: Callable[..., Tensor] | None = None,
        args_chunk_spec: None = None,
        kwargs_chunk_spec: None = None,
        output_merge_spec: None = None,
        scale_grads: bool = True,
        backward_requires_autograd: bool = True,
        defer_pp_recv: bool = False,
        **options: Any,
    ) -> None:
        if not backward_requires_autograd:
            raise ValueError("expected backward_requires_autograd=True, got False")
        specs = {
            "args_chunk_spec": args_chunk_spec,
            "kwargs_chunk_spec": kwargs_chunk_spec,
            "output_merge_spec": output_merge_spec,
        }
        for name, spec in specs.items():
            if spec is not None:
                raise ValueError(f"expected {name}=None, which cuts along dimension 0, got {spec}")
        stages = sorted(stages, key=lambda stage: stage.stage_index)
        for stage in stages:
            if isinstance(stage.submod, _REDUCES):
                raise ValueError(
                    "expected stages that leave gradients to the caller, who reduces them after "
                    f"step(), got {type(stage.submod).__name__}"
                )
        self._check_places(stages)
        self._ends = any(stage.is_last for stage in stages)
        self._begins = any(stage.is_first for stage in stages)
        self._n_microbatches = n_microbatches
        self._loss_fn = loss_fn
        self._scale = 1 / n_microbatches if scale_grads else 1.0
        modules = [stage.submod for stage in stages]
        self.pipeline = Pipeline(self.kind, modules, stages[0].group, **options)
        """What runs the steps."""

    def _check_places(self, stages: Sequence[PipelineStage]) -> None:
        """Stages lie where the plan has them."""
        if not stages:
            raise ValueError(f"expected stages for {self.kind}, got none")
        rank, ranks = stages[0].group_rank, stages[0].group_size
        places = [rank] if self.kind == "1f1b" else [rank, 2 * ranks - 1 - rank]
        total = len(places) * ranks
        found = [stage.stage_index for stage in stages]
        totals = sorted({stage.num_stages for stage in stages})
        if found != places or totals != [total]:
            raise ValueError(
                f"expected stages {places} of {total} on rank {rank} for {self.kind}, got {found} "
                f"of {', '.join(map(str, totals))}"
            )

    def step(
        self,
        *args: Tensor,
        target: Tensor | None = None,
        losses: list[Tensor] | None = None,
        return_outputs: bool = True,
        loss_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run one batch through the pipeline; backward too, if there is a ``loss_fn``.

        Args:
            args: the model's inputs, where the first stage is; ignored elsewhere.
            target: of the loss, where the last stage is.
            losses: filled with the loss of each micro-batch, where the last stage is.
            return_outputs: whether to return the outputs.
            loss_kwargs: further arguments of ``loss_fn``.

        Returns:
            The outputs of the whole batch, where the last stage is and they are asked for.

        Raises:
            ValueError: keyword arguments for the model; inputs or targets that cannot be cut.
            RuntimeError: gradients are off and there is a ``loss_fn``: that is ``eval``.
            CommTimeoutError: a rank was waited for too long.
        """
        if self._loss_fn is not None and not torch.is_grad_enabled():
            raise RuntimeError("expected step() with gradients, got torch.no_grad(): call eval()")
        backward = self._loss_fn is not None
        return self._run(backward, args, target, losses, return_outputs, loss_kwargs, kwargs)

    def eval(
        self,
        *args: Tensor,
        target: Tensor | None = None,
        losses: list[Tensor] | None = None,
        return_outputs: bool = True,
        loss_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """:meth:`step` without backward; losses where there is a target."""
        return self._run(False, args, target, losses, return_outputs, loss_kwargs, kwargs)

    def _run(
        self,
        backward: bool,
        args: Sequence[Tensor],
        target: Tensor | None,
        losses: list[Tensor] | None,
        return_outputs: bool,
        loss_kwargs: dict[str, Any] | None,
        kwargs: dict[str, Any],
    ) -> Any:
        if kwargs:
            raise ValueError(
                f"expected the model's arguments by position, got {', '.join(sorted(kwargs))}"
            )
        criterion = self._criterion(loss_kwargs or {}) if backward or target is not None else None
        with torch.set_grad_enabled(backward):
            found, outputs = self.pipeline.step(
                *(args if self._begins else ()),
                num_chunks=self._n_microbatches,
                criterion=criterion if self._ends else None,
                labels=() if target is None or not self._ends else (target,),
                return_outputs=return_outputs,
            )
        if losses is not None and found is not None:
            losses[:] = found.detach().unbind()
        return outputs

    def _criterion(self, loss_kwargs: dict[str, Any]) -> Callable[..., Tensor] | None:
        loss_fn, scale = self._loss_fn, self._scale
        if loss_fn is None:
            return None

        def criterion(*outputs_and_target: Tensor) -> Tensor:
            return _ScaleGrad.apply(loss_fn(*outputs_and_target, **loss_kwargs), scale)

        return criterion


class Schedule1F1B(_Schedule):
    """One forward, one backward; one stage a rank, stage r on rank r."""

    kind = "1f1b"

    def __init__(self, stage: PipelineStage, *arguments: Any, **options: Any) -> None:
        super().__init__([stage], *arguments, **options)


class ScheduleZBVZeroBubble(_Schedule):
    """ZB-V; two stages a rank, r and 2R-1-r on rank r of R."""

    kind = "zbv"


class ScheduleDualPipeV(_Schedule):
    """DualPipeV; two stages a rank, r and 2R-1-r on rank r of R."""

    kind = "dualpipev"
