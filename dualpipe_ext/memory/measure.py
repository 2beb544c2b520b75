"""What a way of keeping activations saves, and what it costs in accuracy.

What belongs here: counting what autograd keeps, on any device, and comparing gradients between
memory levels. Time and the allocator's peak are in ``dualpipe_ext.bench.memory``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dualpipe_ext.memory.levels import check_memory_level, set_memory_level


def saved_bytes(forward: Callable[[], Any], *, without: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps alive for the backward of ``forward``, each storage once and whole.

    Args:
        forward: builds a graph; its result is dropped after the count.
        without: tensors that are there anyway, such as parameters and inputs.

    What blocks of ``saved_as`` inside ``forward`` replace is only counted where it is also saved by
    other means (as for the linear layers here): hooks see no tensors that inner hooks take.

    >>> x = torch.zeros(10, requires_grad=True)
    >>> saved_bytes(lambda: (x * 2.0).exp().sum(), without=[x])
    40
    """
    # Storages stay alive as long as they are counted, or an address could come back.
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    for tensor in without:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(storage.nbytes() for storage in storages.values())


def gradient_errors(
    model: nn.Module, loss: Callable[[], Tensor], *, level: int, reference: int = 0
) -> dict[str, float]:
    """How far the gradients of a memory level are from those of another, by parameter.

    Runs forward and backward once at each of the two levels; needs the memory of the larger. The
    model's gradients are lost, and it is left at ``level``.

    Args:
        model: follows the memory levels (see :func:`set_memory_level`).
        loss: makes a scalar from the model, the same every time it is called.
        level: that is judged.
        reference: that counts as exact.

    Returns:
        ``|g - g_reference| / |g_reference|`` (Frobenius norms, in float64) of every parameter that
        has a gradient; 0 where both are zero, infinite where only the reference is.

    Raises:
        ValueError: no such level, or the model follows none.
    """
    check_memory_level(level)
    exact = _gradients(model, loss, reference)
    # On the host, so that the second run has the memory of the first.
    exact = {name: grad.cpu() for name, grad in exact.items()}
    found = _gradients(model, loss, level)
    return {name: _relative(grad, exact[name].to(grad.device)) for name, grad in found.items()}


def _gradients(model: nn.Module, loss: Callable[[], Tensor], level: int) -> dict[str, Tensor]:
    set_memory_level(model, level)
    model.zero_grad(set_to_none=True)
    loss().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


def _relative(grad: Tensor, exact: Tensor) -> float:
    # Slice by slice: all experts in float64 could be too large.
    difference = norm = 0.0
    for found, wanted in zip(grad, exact, strict=True):
        wide = wanted.double()
        difference += float((found.double() - wide).square().sum())
        norm += float(wide.square().sum())
    if norm == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return math.sqrt(difference / norm)
