"""A stage as the runtime sees it: any nn.Module, made into phases that end in the loss.

What belongs here: turning a module into the phases of a :class:`ChunkGraph`, and the three ways
to run a pair (interleaved phases, DeepSeek's own ``overlapped_forward_backward`` hook, or one after
the other).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dualpipe_ext.pipeline.overlap import ChunkGraph, Launcher, Phase, run_pair
from dualpipe_ext.pipeline.weight_grad import WeightGradStore

Criterion = Callable[..., Tensor]


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    """A module's outputs as a tuple; ``ValueError`` if they are neither a tensor nor a sequence."""
    if isinstance(outputs, Tensor):
        return (outputs,)
    if isinstance(outputs, (tuple, list)):
        return tuple(outputs)
    raise ValueError(
        f"expected a stage to return a tensor or a tuple of tensors, got {type(outputs).__name__}"
    )


class LocalStage:
    """A module that this rank runs as one virtual stage.

    A module with a method ``phases`` runs phase by phase, and its loss is one more phase; any other
    module is a single phase, loss included.
    """

    def __init__(self, module: nn.Module, launcher: Launcher, store: WeightGradStore) -> None:
        self.module = module
        self._launcher = launcher
        self._store = store
        self.offers_phases = callable(getattr(module, "phases", None))
        self.hook = getattr(type(module), "overlapped_forward_backward", None)

    def begin(
        self,
        inputs: Sequence[Any],
        needs_grad: Sequence[bool],
        *,
        key: Any,
        criterion: Criterion | None = None,
        labels: Sequence[Any] = (),
    ) -> ChunkGraph:
        """A chunk ready for its forward. With a criterion, its first output will be the loss."""

        def with_loss(*outputs: Any) -> tuple[Any, ...]:
            if criterion is None:
                return outputs
            return (_checked_loss(criterion(*outputs, *labels)), *outputs)

        if self.offers_phases:
            phases = list(self.module.phases())
            if not phases or not all(isinstance(phase, Phase) for phase in phases):
                raise ValueError(f"expected phases() to return one Phase or more, got {phases}")
            if criterion is not None:
                phases.append(Phase("criterion", "compute", with_loss))
        else:
            module = self.module
            phases = [Phase("stage", "compute", lambda *x: with_loss(*as_tuple(module(*x))))]
        return ChunkGraph(
            phases,
            inputs,
            needs_grad,
            launcher=self._launcher,
            store=self._store,
            key=key,
            stubs=not self.offers_phases and self.hook is not None,
            stage=self,
        )


def _checked_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"expected the criterion to return a scalar tensor, got {shape}")
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError(
            "expected the criterion's loss to require a gradient, got one that does not"
        )
    return loss


def overlap(
    forward_stage: LocalStage,
    forward: ChunkGraph,
    backward_stage: LocalStage,
    backward: ChunkGraph,
    *,
    criterion: Criterion | None,
    labels: Sequence[Any],
    backward_has_loss: bool,
) -> None:
    """Run the forward of one chunk and the backward of another the best way the stages offer.

    Args:
        criterion: of the forward, with its ``labels``, if the forward ends its pipe.
        backward_has_loss: whether the backward starts from a loss.
    """
    if forward_stage.offers_phases and backward_stage.offers_phases:
        run_pair(forward, backward)
        return
    one_type = type(forward_stage.module) is type(backward_stage.module)
    if one_type and forward_stage.hook is not None and not forward_stage.offers_phases:
        roots, grads = backward.take_roots()
        loss = roots[0] if backward_has_loss else None
        with forward.launcher.paired():
            outputs, new_loss = forward_stage.hook(
                forward_stage.module,
                list(forward.inputs),
                criterion,
                list(labels),
                backward_stage.module,
                loss,
                [] if backward_has_loss else roots,
                [] if backward_has_loss else grads,
            )
        outputs = as_tuple(outputs)
        forward.leave(outputs if criterion is None else (_checked_loss(new_loss), *outputs))
        return
    forward.forward()
    backward.backward(defer=False)
