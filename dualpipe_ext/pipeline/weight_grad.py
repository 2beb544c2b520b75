"""Weight gradients that can wait: the W of a zero-bubble schedule.

What belongs here: the store that keeps deferred weight gradients, and the layers that can defer
theirs. Such a layer computes the gradient of its input at once; the gradient of its weight is put
into the store while :meth:`WeightGradStore.deferring` is active and computed at once otherwise.
Biases and all other parameters get their gradients at once.

In backwards that are known to be for ``.grad``, which are those of :class:`WeightGradStore`, a
gradient is added to what is there by the kernel that computes it, where it can: with the bits of
``.grad += gradient``, which for the experts of a layer is as much work as all of their weight
gradients' products (docs/LOG.md, "Overlapped pairs"). A weight that is used twice in one backward
gets one addition after the other; autograd would sum up both gradients first.

The gradient of the weight is all that the input is kept for, so these layers can keep it in another
form (``dualpipe_ext.memory.kept``), which they restore when they compute that gradient: in the
backward, or in its W.

Shapes: x [..., K], weight [N, K] for ``linear``; x [M, K], weight [G, K, N] for ``grouped_linear``
(see ``dualpipe_ext.kernels.grouped_gemm``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dualpipe_ext.kernels.grouped_gemm import added, grouped_mm, grouped_mm_weight_grad

if TYPE_CHECKING:
    from dualpipe_ext.memory import Kept

# Closures of the running input-only backward, or None; and whether the running backward is one that
# adds to ``.grad``. Module globals and nothing thread-local: for CUDA, autograd runs the backward
# on a thread of its own while the caller waits.
_deferred: list[_Closure | None] | None = None
_accumulating = 0  # users who have said so

# SMs for a product: a number, None for all, or what is asked whenever a product is launched, since
# the backward of a layer may have other things beside it than its forward.
MaxSms = int | Callable[[], int | None] | None

# The gradient of a weight from the layer's input, added in place to the second argument if that is
# not None.
ComputeGrad = Callable[[Any, Tensor | None], Tensor]


class _Closure(NamedTuple):
    weight: Hashable
    run: Callable[[], None]


class WeightGradStore:
    """Deferred weight gradients, kept under the key of the backward that deferred them.

    Attributes:
        in_parts: whether the gradients of a key can run one by one, in any order.
    """

    in_parts = True

    def __init__(self) -> None:
        self._closures: dict[Hashable, list[_Closure | None]] = {}

    def __len__(self) -> int:
        """Number of keys whose weight gradients have not run."""
        return len(self._closures)

    @contextmanager
    def deferring(self, key: Hashable) -> Iterator[None]:
        """While active, backwards in this process defer their weight gradients to ``key``.

        Not those of weights with hooks on their gradient, which autograd would call with None.
        """
        global _deferred
        assert _deferred is None, "deferring() does not nest"
        _deferred = self._closures.setdefault(key, [])
        try:
            yield
        finally:
            _deferred = None
            if not self._closures[key]:
                del self._closures[key]

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While active, backwards add weight gradients to ``.grad`` themselves, at once.

        Only where autograd would do so, and not for weights with hooks (but hooks in front of a
        weight's ``AccumulateGrad`` node are not seen, and are called with None). All uses of a
        weight in a backward are to be on one stream: autograd's order between streams is gone.
        """
        global _accumulating
        assert _deferred is None, "at_once() does not go into deferring()"
        _accumulating += 1
        try:
            yield
        finally:
            _accumulating -= 1

    def parts(self, key: Hashable) -> list[int]:
        """Numbers, in the order of deferring, of the gradients under ``key`` that have not run."""
        closures = self._closures.get(key, ())
        return [part for part, closure in enumerate(closures) if closure is not None]

    def weight_of(self, key: Hashable, part: int) -> Hashable:
        """Which weight one of :meth:`parts` is for. Gradients of one weight are to run in the order
        in which they were deferred: another order of additions gives other bits."""
        closure = self._closures[key][part]
        assert closure is not None
        return closure.weight

    def run(self, key: Hashable, part: int | None = None) -> None:
        """Compute the weight gradients deferred under ``key``, in the order they were deferred.

        Args:
            key: of the backward that deferred them.
            part: one of :meth:`parts`, to run that one alone.

        Each is accumulated into its parameter's ``.grad``: by autograd itself if the parameter has
        hooks that run after accumulation, and they run as they do in a backward. (They also ran in
        the backward that deferred, with nothing new: autograd visits every parameter it passes.)
        """
        left = self.parts(key)
        closures = self._closures.pop(key, [])
        for number in left if part is None else (part,):
            closure, closures[number] = closures[number], None
            closure.run()
        if part is not None and left != [part]:
            self._closures[key] = closures

    def clear(self) -> None:
        """Forget everything deferred."""
        self._closures.clear()


def take_or_defer(
    weight: Tensor, compute: ComputeGrad, kept: KeptInput, saved: Sequence[Tensor]
) -> Tensor | None:
    """The gradient for autograd to take now, or None if it was deferred or added already.

    A weight that is itself computed (not a leaf) is not deferred: autograd frees the graph that
    leads to it in this very backward. Nor is anything where a compiler traces, for which these
    modes would be other graphs.

    Args:
        compute: the gradient from the layer's input, which is restored when it is needed.
        kept: how the input was kept.
        saved: what ``kept.take()`` gave, back from autograd.
    """
    if not weight.is_leaf or torch.compiler.is_compiling():
        return compute(kept.restore(saved), None)
    if _deferred is not None and not weight._backward_hooks:
        restore = kept.waiting(saved)
        _deferred.append(_Closure(id(weight), lambda: _accumulate(weight, compute, restore())))
        return None
    x = kept.restore(saved)
    if _accumulating and not _is_watched(weight) and _autograd_would_add(weight):
        _accumulate(weight, compute, x)
        return None
    return compute(x, None)


def _accumulate(weight: Tensor, compute: ComputeGrad, x: Any) -> None:
    """Add a leaf's gradient to its ``.grad``, by autograd if anyone would notice otherwise."""
    if not weight.requires_grad:
        return  # frozen meanwhile
    with torch.no_grad():
        if not _is_watched(weight):
            weight.grad = compute(x, weight.grad)
            return
        grad = compute(x, None)
    torch.autograd.backward((weight,), (grad,))


def _is_watched(weight: Tensor) -> bool:
    """Whether a gradient has to go by autograd: for hooks, and tensors that add in their way."""
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return True
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_contiguous()
    # Since torch 2.10 a gradient may have a dtype of its own.
    plain = plain and getattr(weight, "grad_dtype", weight.dtype) == weight.dtype
    total = weight.grad
    if total is not None:
        plain = plain and type(total) is Tensor and total.is_contiguous()
        plain = plain and total.dtype == weight.dtype
    return not plain


def _autograd_would_add(weight: Tensor) -> bool:
    """Whether the running backward adds to the ``.grad`` of this leaf: one for given inputs, or
    for gradients as values, does not."""
    if not weight.requires_grad:  # any more
        return False
    node = torch.autograd.graph.get_gradient_edge(weight).node
    try:
        # No public name for it; torch's own hooks of modules ask the same.
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # its gradient is given to the caller
        return False


class KeptInput:
    """What a node of the graph saves of a layer's input, and the way back to it."""

    __slots__ = ("_nbytes", "_restore", "_tensors")

    def __init__(
        self, tensors: Sequence[Tensor], restore: Callable[..., Any], *, nbytes: int
    ) -> None:
        """
        Args:
            tensors: what is to be saved.
            restore: ``restore(*tensors)`` gives the input as the weight gradient needs it; it
                refers to no tensor itself.
            nbytes: size of what that gives.
        """
        self._tensors, self._restore, self._nbytes = tuple(tensors), restore, nbytes

    def take(self) -> tuple[Tensor, ...]:
        """What is to be saved, which this forgets: the node outlives what it saved."""
        tensors, self._tensors = self._tensors, ()
        return tensors

    def restore(self, saved: Sequence[Tensor]) -> Any:
        return self._restore(*saved)

    def waiting(self, saved: Sequence[Tensor]) -> Callable[[], Any]:
        """:meth:`restore` for later. What waits is the input itself if that takes less memory."""
        # The largest, not the sum: parameters among them are there anyway.
        if max(tensor.nbytes for tensor in saved) <= self._nbytes:
            return partial(self.restore, saved)
        x = self.restore(saved)
        return lambda: x


def _kept_input(x: Tensor, kept: Kept | None) -> KeptInput:
    """``x`` is what the layer multiplies; without ``kept`` it is kept as it is."""
    if kept is None:
        return KeptInput((x,), _as_it_is, nbytes=x.nbytes)
    restore, dtype = kept.restore, x.dtype  # not kept or x, which would live on in the node
    return KeptInput(kept.tensors, lambda *saved: restore(*saved).to(dtype), nbytes=x.nbytes)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def limit_now(max_sms: MaxSms) -> int | None:
    """SMs for a product that is launched now."""
    return max_sms() if callable(max_sms) else max_sms


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast would compute in, which leaves float64 alone as autocast does."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        kept: Kept | None,
    ) -> Tensor:
        ctx.input_dtype = x.dtype
        # Saved tensors come back as copies under activation checkpointing; the gradient belongs to
        # the parameter itself.
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        x = x.to(dtype)
        ctx.kept = _kept_input(x, kept)
        ctx.save_for_backward(weight, *ctx.kept.take())
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        owner, kept = ctx.weight, ctx.kept
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.to(grad.dtype)).to(ctx.input_dtype)
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:

            def compute(x: Tensor, total: Tensor | None) -> Tensor:
                return added((rows.t() @ x.reshape(-1, x.shape[-1])).to(owner.dtype), total)

            grad_weight = take_or_defer(owner, compute, kept, saved)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor,
        dtype: torch.dtype,
        kept: Kept | None,
        max_sms: MaxSms,
    ) -> Tensor:
        ctx.input_dtype, ctx.weight, ctx.max_sms = x.dtype, weight, max_sms
        x = x.to(dtype)
        ctx.kept = _kept_input(x, kept)
        ctx.save_for_backward(weight, offsets, *ctx.kept.take())
        return grouped_mm(x, weight.to(dtype), offsets, max_sms=limit_now(max_sms))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, offsets, *saved = ctx.saved_tensors
        owner, kept, max_sms = ctx.weight, ctx.kept, ctx.max_sms
        grad = grad.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            turned = weight.to(grad.dtype).transpose(1, 2)
            limit = limit_now(max_sms)
            grad_x = grouped_mm(grad, turned, offsets, max_sms=limit).to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:

            def compute(x: Tensor, total: Tensor | None) -> Tensor:
                how = {"total": total, "max_sms": limit_now(max_sms)}
                return grouped_mm_weight_grad(x, grad, offsets, **how).to(owner.dtype)

            grad_weight = take_or_defer(owner, compute, kept, saved)
        return grad_x, grad_weight, None, None, None, None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """``torch.nn.functional.linear`` whose weight gradient can be deferred.

    Args:
        x: [..., K].
        weight: [N, K], dtype of ``x`` (any, under autocast or with ``dtype``).
        bias: [N] or None.
        dtype: to compute in and to return, whatever the operands' and autocast's.
        kept: keep ``x`` like this for the weight gradient; what it restores has as many values in
            rows of K. By default ``x`` is kept, in the dtype it is computed in.

    Returns:
        [..., N], bit for bit what ``torch.nn.functional.linear`` gives.
    """
    return _Linear.apply(x, weight, bias, dtype or compute_dtype(x), kept)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    kept: Kept | None = None,
    max_sms: MaxSms = None,
) -> Tensor:
    """A linear layer per group of rows, whose weight gradient can be deferred.

    Args:
        x: [M, K], rows sorted by group.
        weight: [G, K, N], dtype of ``x`` (any, under autocast).
        offsets: int32 [G], the END row of each group; rows past the last one give zeros and get no
            gradient.
        kept: keep ``x`` like this for the weight gradient; by default as it is.
        max_sms: SMs for the products, to leave the others to communication; see
            ``dualpipe_ext.kernels.grouped_gemm``. None for all; a function is asked at every
            product, those of the backward included.

    Returns:
        [M, N].

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    return _GroupedLinear.apply(x, weight, offsets, compute_dtype(x), kept, max_sms)


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
