"""Weight gradients that can wait: the W of a zero-bubble schedule.

What belongs here: the store that keeps deferred weight gradients, and the layers that can defer
theirs. Such a layer computes the gradient of its input at once; the gradient of its weight is put
into the store while :meth:`WeightGradStore.deferring` is active and computed at once otherwise.
Biases and all other parameters get their gradients at once.

Shapes: x [..., K], weight [N, K] for ``linear``; x [M, K], weight [G, K, N] for ``grouped_linear``
(see ``dualpipe_ext.kernels.grouped_gemm``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dualpipe_ext.kernels.grouped_gemm import grouped_mm, grouped_mm_weight_grad

# Closures of the running input-only backward, or None. A module global and nothing thread-local:
# for CUDA, autograd runs the backward on a thread of its own while the caller waits.
_deferred: list[Callable[[], None]] | None = None


class WeightGradStore:
    """Deferred weight gradients, kept under the key of the backward that deferred them."""

    def __init__(self) -> None:
        self._closures: dict[Hashable, list[Callable[[], None]]] = {}

    def __len__(self) -> int:
        """Number of keys whose weight gradients have not run."""
        return len(self._closures)

    @contextmanager
    def deferring(self, key: Hashable) -> Iterator[None]:
        """While active, every backward in this process defers its weight gradients to ``key``."""
        global _deferred
        assert _deferred is None, "deferring() does not nest"
        _deferred = self._closures.setdefault(key, [])
        try:
            yield
        finally:
            _deferred = None

    def run(self, key: Hashable) -> None:
        """Compute the weight gradients deferred under ``key``, in the order they were deferred.

        Each is accumulated into its parameter's ``.grad`` by autograd itself, and the parameter's
        hooks run as they do in a backward. (Hooks that run after accumulation also ran in the
        backward that deferred, with nothing new: autograd visits every parameter it passes.)
        """
        for closure in self._closures.pop(key, ()):
            closure()

    def clear(self) -> None:
        """Forget everything deferred."""
        self._closures.clear()


def take_or_defer(weight: Tensor, compute: Callable[[], Tensor]) -> Tensor | None:
    """The gradient for autograd to take now, or None if it was deferred.

    A weight that is itself computed (not a leaf) is not deferred: autograd frees the graph that
    leads to it in this very backward.
    """
    if _deferred is None or not weight.is_leaf:
        return compute()

    def accumulate() -> None:
        with torch.no_grad():
            grad = compute()
        torch.autograd.backward((weight,), (grad,))

    _deferred.append(accumulate)
    return None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast would compute in, which leaves float64 alone as autocast does."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.input_dtype = x.dtype
        # Saved tensors come back as copies under activation checkpointing; the gradient belongs to
        # the parameter itself.
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        owner = ctx.weight
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.to(grad.dtype)).to(ctx.input_dtype)
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:

            def compute() -> Tensor:
                return (rows.t() @ x.reshape(-1, x.shape[-1])).to(owner.dtype)

            grad_weight = take_or_defer(owner, compute)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor,
        dtype: torch.dtype,
        max_sms: int | None,
    ) -> Tensor:
        ctx.input_dtype, ctx.weight, ctx.max_sms = x.dtype, weight, max_sms
        x = x.to(dtype)
        ctx.save_for_backward(x, weight, offsets)
        return grouped_mm(x, weight.to(dtype), offsets, max_sms=max_sms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets = ctx.saved_tensors
        owner, max_sms = ctx.weight, ctx.max_sms
        grad = grad.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            turned = weight.to(grad.dtype).transpose(1, 2)
            grad_x = grouped_mm(grad, turned, offsets, max_sms=max_sms).to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:

            def compute() -> Tensor:
                return grouped_mm_weight_grad(x, grad, offsets, max_sms=max_sms).to(owner.dtype)

            grad_weight = take_or_defer(owner, compute)
        return grad_x, grad_weight, None, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` whose weight gradient can be deferred.

    Args:
        x: [..., K].
        weight: [N, K], dtype of ``x`` (any, under autocast).
        bias: [N] or None.

    Returns:
        [..., N], bit for bit what ``torch.nn.functional.linear`` gives.
    """
    return _Linear.apply(x, weight, bias, compute_dtype(x))


def grouped_linear(
    x: Tensor, weight: Tensor, offsets: Tensor, *, max_sms: int | None = None
) -> Tensor:
    """A linear layer per group of rows, whose weight gradient can be deferred.

    Args:
        x: [M, K], rows sorted by group.
        weight: [G, K, N], dtype of ``x`` (any, under autocast).
        offsets: int32 [G], the END row of each group; rows past the last one give zeros and get no
            gradient.
        max_sms: SMs for the products, to leave the others to communication; see
            ``dualpipe_ext.kernels.grouped_gemm``. None for all.

    Returns:
        [M, N].

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    return _GroupedLinear.apply(x, weight, offsets, compute_dtype(x), max_sms)


class DeferrableLinear(nn.Linear):
    """``nn.Linear`` through :func:`linear`; made by :func:`defer_weight_grads`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def defer_weight_grads(module: nn.Module) -> nn.Module:
    """Let every plain ``nn.Linear`` inside ``module`` defer its weight gradient, in place.

    Parameters, ``state_dict`` keys, hooks and results stay as they are. Subclasses of
    ``nn.Linear`` are left alone: their forward is their own.

    Returns:
        ``module``.
    """
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = DeferrableLinear
    return module
