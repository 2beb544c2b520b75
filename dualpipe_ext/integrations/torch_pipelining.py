"""``torch.distributed.pipelining``'s schedules on this project's runtime: one import changes.

>>> from torch.distributed.pipelining import PipelineStage
>>> from dualpipe_ext.integrations.torch_pipelining import ScheduleDualPipeV

What belongs here: ``Schedule1F1B``, ``ScheduleZBVZeroBubble`` and ``ScheduleDualPipeV`` with the
constructors, ``step`` and ``eval`` of torch's. Stages stay torch's ``PipelineStage``; one whose
module offers ``phases()`` gets forward and backward overlapped. What torch offers besides and this
does not is refused: keyword arguments of the model, chunk and merge specifications, ``dw_builder``,
and modules that reduce their gradients themselves (DDP, FSDP), since they would do so for every
micro-batch. In the V-shaped schedules every plain ``nn.Linear`` of a stage defers its weight
gradient (:func:`~dualpipe_ext.pipeline.weight_grad.defer_weight_grads`); other modules compute
theirs with the input gradient.

Other plans of one pipe run in torch's own runtime, see ``dualpipe schedule --csv``; DualPipe, which
has two, in :class:`dualpipe_ext.DualPipe`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel

from dualpipe_ext.pipeline.plan import build_plan
from dualpipe_ext.pipeline.runtime import Pipeline
from dualpipe_ext.pipeline.weight_grad import defer_weight_grads

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
        loss_fn: ``loss_fn(output, target, **loss_kwargs)`` gives a number, ``output`` being a tuple
            if the last stage returns several; None: steps only run forward.
        args_chunk_spec: must be None, as must the other two.
        kwargs_chunk_spec: see above.
        output_merge_spec: see above.
        scale_grads: gradients are those of the mean over micro-batches, not of the sum.
        backward_requires_autograd: must be true.
        defer_pp_recv: has no meaning here.
        options: of :class:`~dualpipe_ext.pipeline.Pipeline`: ``transport``, ``peers``,
            ``partition``, ``timeout_s`` and others, but for ``rank_mapping``.

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
        if "rank_mapping" in options:
            raise ValueError("expected no rank_mapping: stages say where they are")
        stages = sorted(stages, key=lambda stage: stage.stage_index)
        _check_places(self.kind, stages, n_microbatches)
        _check_modules(stages)
        self._ends = any(stage.is_last for stage in stages)
        self._begins = any(stage.is_first for stage in stages)
        self._n_microbatches = n_microbatches
        self._loss_fn = loss_fn
        self._scale = 1 / n_microbatches if scale_grads else 1.0
        modules = [stage.submod for stage in stages]
        if self.kind != "1f1b":
            for module in modules:
                defer_weight_grads(module)
        self.pipeline = Pipeline(self.kind, modules, stages[0].group, **options)
        """What runs the steps."""

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
        return self._run(
            self._loss_fn is not None,
            args,
            target=target,
            losses=losses,
            return_outputs=return_outputs,
            loss_kwargs=loss_kwargs,
            **kwargs,
        )

    def eval(self, *args: Tensor, **how: Any) -> Any:
        """:meth:`step`, with its arguments, without backward; losses where there is a target."""
        return self._run(False, args, **how)

    def _run(
        self,
        backward: bool,
        args: Sequence[Tensor],
        *,
        target: Tensor | None = None,
        losses: list[Tensor] | None = None,
        return_outputs: bool = True,
        loss_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if kwargs:
            raise ValueError(
                f"expected the model's arguments by position, got {', '.join(sorted(kwargs))}"
            )
        has_target = target is not None
        criterion = None
        if self._loss_fn is not None and (backward or has_target):
            criterion = _criterion(self._loss_fn, loss_kwargs or {}, has_target, self._scale)
        if losses is not None and self._ends:
            losses.clear()
        with torch.set_grad_enabled(backward):
            found, outputs = self.pipeline.step(
                *(args if self._begins else ()),
                num_chunks=self._n_microbatches,
                criterion=criterion if self._ends else None,
                labels=(target,) if has_target and self._ends else (),
                return_outputs=return_outputs,
            )
        if losses is not None and found is not None:
            losses.extend(found.detach().unbind())
        return outputs


def _criterion(
    loss_fn: Callable[..., Tensor], loss_kwargs: dict[str, Any], has_target: bool, scale: float
) -> Callable[..., Tensor]:
    """``loss_fn`` as the runtime calls it: with the outputs one by one, and a scaled gradient."""

    def criterion(*given: Tensor) -> Tensor:
        outputs, target = (given[:-1], given[-1:]) if has_target else (given, ())
        output = outputs[0] if len(outputs) == 1 else outputs
        loss = loss_fn(output, *target, **loss_kwargs)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            loss = _ScaleGrad.apply(loss.reshape(()), scale)
        return loss  # anything else the runtime refuses

    return criterion


def _check_places(kind: str, stages: Sequence[PipelineStage], n_microbatches: int) -> None:
    """Stages lie where the plan has them, and it can run so many micro-batches."""
    if not stages:
        raise ValueError(f"expected stages for {kind}, got none")
    rank, ranks = stages[0].group_rank, stages[0].group_size
    try:
        plan = build_plan(kind, num_ranks=ranks, num_chunks=n_microbatches)
    except ValueError as error:  # in the name that the caller knows
        raise ValueError(str(error).replace("num_chunks", "n_microbatches")) from None
    places, found = list(plan.stages_of(rank)), [stage.stage_index for stage in stages]
    totals = sorted({stage.num_stages for stage in stages})
    if found != places or totals != [plan.num_stages]:
        raise ValueError(
            f"expected stages {places} of {plan.num_stages} on rank {rank} for {kind}, got {found} "
            f"of {', '.join(map(str, totals))}"
        )


def _check_modules(stages: Sequence[PipelineStage]) -> None:
    for stage in stages:
        if stage.dw_builder is not None:
            raise ValueError(
                f"expected stages without dw_builder, got one for stage {stage.stage_index}"
            )
        reduces = [type(m).__name__ for m in stage.submod.modules() if isinstance(m, _REDUCES)]
        if reduces:
            raise ValueError(
                "expected stages that leave gradients to the caller, who reduces them after "
                f"step(), got {reduces[0]}"
            )


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
