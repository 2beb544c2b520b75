"""Other ways to keep a tensor for the backward: in FP8, or as what it can be computed from again.

What belongs here: :class:`Kept`, what stands in for a tensor until a backward needs it, the two
ways to make one, and :func:`saved_as`, which has autograd save it instead of the tensor. The linear
layers of ``dualpipe_ext.pipeline.weight_grad`` take a :class:`Kept` of their input too: they need
the input for the weight gradient only, and restore it when they compute that, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dualpipe_ext.ep.fp8 import Quantized, dequantize, quantize


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of a tensor, and the way back to it.

    Attributes:
        tensors: what is kept, without gradients.
        restore: ``restore(*tensors)`` gives the tensor, or what is left of its precision. It refers
            to no tensor itself, so that it may outlive them.
    """

    tensors: tuple[Tensor, ...]
    restore: Callable[..., Tensor]


def in_fp8(x: Tensor) -> Kept:
    """Keep ``x`` in FP8 with a scale per 128 values: 33/64 of the bytes of bfloat16.

    The format is ``dualpipe_ext.ep.fp8``'s. A value v of a block whose largest magnitude is m comes
    back within ``2**-4 * |v| + 2**-10 * m / 448``, beside float32 rounding: half a unit in the last
    place of E4M3 among normal numbers, and among subnormal ones. Larger than those of what it goes
    into, such errors are independent, so that of a sum over many tokens they are a few per cent
    (measure it: :func:`dualpipe_ext.memory.gradient_errors`).

    Args:
        x: [..., H], any floating dtype; H a multiple of 128.

    Raises:
        ValueError: H is not a multiple of 128.
    """
    x = x.detach()
    dtype = x.dtype

    def restore(values: Tensor, scales: Tensor) -> Tensor:
        return dequantize(Quantized(values, scales), dtype)

    with torch.no_grad():
        return Kept(tuple(quantize(x)), restore)


def recomputed(fn: Callable[..., Tensor], *inputs: Tensor | Kept | None) -> Kept:
    """Keep the inputs of ``fn`` instead of its result, and call it again when that is needed.

    The same function on the same bits gives the same bits, so this changes no gradient, unless an
    input is itself kept in another way.

    Args:
        fn: ``fn(*inputs)``, without randomness; it must refer to no tensor but its arguments.
            Called without gradients and outside autocast.
        inputs: tensors; tensors that are themselves kept; None, passed on as it is.
    """
    parts = [None if x is None else x if isinstance(x, Kept) else _as_it_is(x) for x in inputs]
    restores = [(0, None) if p is None else (len(p.tensors), p.restore) for p in parts]

    def restore(*tensors: Tensor) -> Tensor:
        rest = list(tensors)
        arguments: list[Tensor | None] = []
        for count, part in restores:
            arguments.append(None if part is None else part(*rest[:count]))
            del rest[:count]
        device_type = tensors[0].device.type
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            return fn(*arguments)

    return Kept(tuple(t for p in parts if p is not None for t in p.tensors), restore)


@contextmanager
def saved_as(x: Tensor, kept: Kept | None) -> Iterator[None]:
    """Have operations inside the block save ``kept`` where they would save ``x``.

    For any operation of autograd, whosever it is. Each one restores a tensor of its own, for the
    time of its backward. Views of ``x`` that are not ``x`` whole are saved as they are; so is ``x``
    by operations outside the block, which would keep it alive all the same. There is no second
    derivative through what was restored. Of nested blocks the inner one counts, as with all of
    ``torch.autograd.graph.saved_tensors_hooks``.

    Args:
        x: what the operations take; it must not change inside the block.
        kept: how to keep it; None to have it saved as ever.
    """
    if kept is None:
        yield
        return
    identity = _identity(x)

    def pack(tensor: Tensor) -> Tensor | Kept:
        return kept if _identity(tensor) == identity else tensor

    def unpack(packed: Tensor | Kept) -> Tensor:
        return packed.restore(*packed.tensors) if isinstance(packed, Kept) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _as_it_is(x: Tensor) -> Kept:
    return Kept((x.detach(),), lambda tensor: tensor)


def _identity(x: Tensor) -> tuple[object, ...]:
    # Not x itself: the hooks live as long as the graph, and would keep it alive.
    return x.data_ptr(), x.dtype, x.shape, x.stride()
