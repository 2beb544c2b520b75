"""The names and the behaviour of deepseek-ai/DualPipe: change the import, keep the script.

What belongs here: ``DualPipe``, ``DualPipeV``, ``set_p2p_tensor_shapes``, ``set_p2p_tensor_dtype``,
``WeightGradStore`` and ``run_backward`` as scripts written for that project use them. As there, the
shapes and the dtype of what crosses between ranks are declared once for the process, the store of
weight gradients is global, a stage may offer ``overlapped_forward_backward``, and the caller sums
the gradients of mirrored stages. Unlike there, CPU stages (gloo) work, modules that return views
are safe, and a peer that stalls raises ``CommTimeoutError``.

The interface was read from https://github.com/deepseek-ai/DualPipe; the implementation is
``dualpipe_ext.pipeline``.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualpipe_ext.pipeline.exchange import TensorSpec
from dualpipe_ext.pipeline.runtime import Pipeline
from dualpipe_ext.pipeline.weight_grad import WeightGradStore as _Store

_shapes: tuple[tuple[int, ...], ...] | None = None
_dtype: torch.dtype | None = None


def set_p2p_tensor_shapes(shapes: Sequence[Sequence[int]]) -> None:
    """Declare the shapes of a stage's outputs for one chunk, the same at every boundary."""
    global _shapes
    _shapes = tuple(tuple(shape) for shape in shapes)


def set_p2p_tensor_dtype(dtype: torch.dtype) -> None:
    """Declare the dtype of all stage outputs."""
    global _dtype
    _dtype = dtype


def run_backward(tensors: Sequence[Tensor], grad_tensors: Sequence[Tensor]) -> None:
    """Backpropagate ``grad_tensors`` from ``tensors`` into the leaves; nothing for no tensors."""
    if len(tensors):
        torch.autograd.backward(tuple(tensors), tuple(grad_tensors))


class WeightGradStore:
    """The process's store of deferred weight gradients.

    A module's backward calls :meth:`put` with a closure while :attr:`enabled` is true, and computes
    the weight gradient itself otherwise.
    """

    enabled: ClassVar[bool] = False
    cache: ClassVar[list[Callable[[], None]]] = []
    funcs_queue: ClassVar[queue.Queue[list[Callable[[], None]]]] = queue.Queue()

    @classmethod
    def put(cls, func: Callable[[], None]) -> None:
        """Defer ``func`` to the group that the next :meth:`flush` closes."""
        cls.cache.append(func)

    @classmethod
    def flush(cls) -> None:
        """Close the current group and queue it."""
        cls.funcs_queue.put(cls.cache)
        cls.cache = []

    @classmethod
    def pop(cls) -> None:
        """Run the oldest queued group."""
        assert not cls.funcs_queue.empty(), "no group was flushed"
        # Such closures multiply saved tensors that require gradients; recording that would chain
        # every .grad to the graphs of all steps before.
        with torch.no_grad():
            for func in cls.funcs_queue.get():
                func()

    @classmethod
    def clear(cls) -> None:
        """Forget everything deferred."""
        cls.cache = []
        cls.funcs_queue = queue.Queue()


class _GlobalStore(_Store):
    """Defers to this package's own layers and to :class:`WeightGradStore` alike."""

    # The other store runs first in, first out.
    in_parts = False

    @contextmanager
    def deferring(self, key: Hashable) -> Iterator[None]:
        WeightGradStore.enabled = True
        try:
            with super().deferring(key):
                yield
        finally:
            WeightGradStore.enabled = False
        WeightGradStore.flush()

    def run(self, key: Hashable, part: int | None = None) -> None:
        # First in, first out: the schedules run W in the order of the I.
        WeightGradStore.pop()
        super().run(key, part)

    def clear(self) -> None:
        WeightGradStore.clear()
        super().clear()


class _Scheduler(nn.Module):
    """What ``DualPipe`` and ``DualPipeV`` have in common: all but the schedule."""

    _kind: ClassVar[str]

    def __init__(
        self,
        modules: Sequence[nn.Module],
        batch_dim: int = 0,
        process_group: dist.ProcessGroup | None = None,
        rank_mapping: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.module = nn.ModuleList(modules)
        self.batch_dim = batch_dim
        self.group = process_group or dist.group.WORLD
        pipeline = Pipeline(
            self._kind,
            self.module,
            self.group,
            batch_dim=batch_dim,
            rank_mapping=rank_mapping,
            sync_mirrored_grads=False,
            weight_grads=_GlobalStore(),
        )
        # Not as a submodule: the keys of state_dict() are those of ``module`` alone.
        object.__setattr__(self, "pipeline", pipeline)
        self.num_ranks = pipeline.num_ranks
        self.rank = pipeline.rank
        self.is_first_rank = self.rank == 0
        self.is_last_rank = self.rank == self.num_ranks - 1

    def step(
        self,
        *inputs: Tensor | None,
        num_chunks: int = 0,
        criterion: Callable[..., Tensor] | None = None,
        labels: Sequence[Tensor | None] = (),
        return_outputs: bool = False,
    ) -> tuple[Tensor | None, Any]:
        """Run a training step, or an inference step under ``torch.no_grad()``.

        See :meth:`dualpipe_ext.pipeline.Pipeline.step`. Gradients of mirrored stages are left for
        the caller to sum.

        Raises:
            ValueError: shapes or dtype have not been declared, or the arguments do not fit.
        """
        if _shapes is None or _dtype is None:
            raise ValueError(
                "expected set_p2p_tensor_shapes and set_p2p_tensor_dtype to be called before a "
                "step, got a step first"
            )
        WeightGradStore.clear()
        self.pipeline.boundary = tuple(TensorSpec(shape, _dtype, True) for shape in _shapes)
        return self.pipeline.step(
            *inputs,
            num_chunks=num_chunks,
            criterion=criterion,
            labels=labels,
            return_outputs=return_outputs,
        )


class DualPipe(_Scheduler):
    """The bidirectional schedule.

    Args:
        modules: of rank r in a pipeline of P: model stages r and P-1-r.
        batch_dim: dimension along which inputs and labels are cut into chunks.
        process_group: of an even number of ranks; by default the world.
        rank_mapping: ``rank_mapping[i]`` is the pipeline rank of group rank i.
    """

    _kind = "dualpipe"


class DualPipeV(_Scheduler):
    """The V-shaped schedule.

    Args:
        modules: of rank r in a pipeline of P: model stages r and 2P-1-r.
        batch_dim: dimension along which inputs and labels are cut into chunks.
        process_group: by default the world.
        rank_mapping: ``rank_mapping[i]`` is the pipeline rank of group rank i.
    """

    _kind = "dualpipev"
