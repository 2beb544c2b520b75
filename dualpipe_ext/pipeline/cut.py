"""Cuts in the autograd graph: where one backward ends and another, run later, takes up.

What belongs here: the two ends of a cut. :func:`receive` gives a tensor that starts a new graph and
leaves its gradient in a :class:`GradSlot`. :func:`gradient_root` gives what a backward of the old
graph can start from. Neither keeps the tensor's data alive: the storage lives only as long as an
operation saved it for its backward. (A leaf tensor, the usual way to cut, is kept whole by its
graph; replacing the ``.data`` of a sent output, the usual way to drop one, also takes it from
operations that saved it.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


class GradSlot:
    """Where the gradient of a cut tensor arrives; ``grad`` is None as long as there is none."""

    __slots__ = ("grad",)

    def __init__(self) -> None:
        self.grad: Tensor | None = None

    def add(self, grad: Tensor) -> None:
        """Accumulate: a stage may return one tensor as several outputs."""
        self.grad = grad if self.grad is None else self.grad + grad

    def take(self) -> Tensor | None:
        """The gradient, which the slot forgets."""
        grad, self.grad = self.grad, None
        return grad


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, data: Tensor, slot: GradSlot) -> Tensor:
        ctx.slot = slot
        return data.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.slot.add(grad)
        return None, None, None


def receive(data: Tensor, slot: GradSlot) -> Tensor:
    """``data`` as the start of a new graph, whose backward adds the gradient to ``slot``."""
    # Something must require a gradient for autograd to record the function at all.
    anchor = torch.empty(0, device=data.device, requires_grad=True)
    # Detached: autograd would otherwise run the old graph too, with zeros for its gradient.
    return _Receive.apply(anchor, data.detach(), slot)


class _Stub(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, data: Tensor) -> Tensor:
        return data.new_empty((1,) * data.dim()).expand(data.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def gradient_root(tensor: Tensor, *, as_tensor: bool = False) -> GradientEdge | Tensor:
    """What ``torch.autograd.backward`` can start from once ``tensor`` itself is gone.

    Args:
        tensor: requires a gradient.
        as_tensor: give a tensor of the same shape, with one element of storage, instead of a
            gradient edge; for code that expects tensors. A scalar is given as it is: that code may
            want to see the value of the loss.
    """
    if not as_tensor:
        return get_gradient_edge(tensor)
    return _Stub.apply(tensor) if tensor.dim() else tensor
