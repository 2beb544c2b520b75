"""A step's batch, cut into chunks, and its results, put together again.

What belongs here: splitting inputs and labels along the batch dimension, and collecting losses,
outputs and input gradients per chunk. A rank holds a batch only for the pipe that begins there and
results only for the pipe that ends there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def split(what: str, values: Sequence[Any], num_chunks: int, dim: int) -> list[list[Any]]:
    """Cut every tensor into ``num_chunks`` parts along ``dim``, the first ones longer if need be.

    Args:
        what: ``inputs`` or ``labels``, for errors.
        values: tensors, or None for an argument that is None in every chunk.

    Returns:
        Per chunk, one part of each value.

    Raises:
        ValueError: a value is no tensor, or has fewer than ``num_chunks`` entries along ``dim``.
    """
    if isinstance(values, Tensor):
        raise ValueError(f"expected {what} to be a tuple or list of tensors, got a tensor")
    for value in values:
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"expected {what} to be tensors or None, got {type(value).__name__}")
        if value.dim() <= dim or value.shape[dim] < num_chunks:
            raise ValueError(
                f"expected {what} with at least {num_chunks} entries along dimension {dim}, one "
                f"for each chunk, got shape {list(value.shape)}"
            )
    parts = [
        [None] * num_chunks if value is None else value.detach().tensor_split(num_chunks, dim)
        for value in values
    ]
    return [[part[chunk] for part in parts] for chunk in range(num_chunks)]


def uneven(chunks: Sequence[Sequence[Any]]) -> bool:
    """Whether some chunk differs from the first in shape."""
    shapes = {tuple(None if x is None else x.shape for x in chunk) for chunk in chunks}
    return len(shapes) > 1


def merge(chunks: Sequence[Sequence[Any]], dim: int) -> Any:
    """Concatenate each output over the chunks along ``dim``; scalars are stacked.

    Returns:
        The one output, or a tuple of all.
    """
    merged = tuple(
        torch.stack(parts) if parts[0].dim() == 0 else torch.cat(parts, dim)
        for parts in zip(*chunks, strict=True)
    )
    return merged[0] if len(merged) == 1 else merged


def backward_inputs(
    inputs: Sequence[Any], chunk_grads: Sequence[Sequence[Tensor | None]], dim: int
) -> None:
    """Give the step's inputs that require a gradient the one their chunks got.

    Once for the whole step, so that inputs computed by the caller's own graph work too.
    """
    for index, value in enumerate(inputs):
        if not (isinstance(value, Tensor) and value.requires_grad):
            continue
        parts = value.tensor_split(len(chunk_grads), dim)
        grads = [
            torch.zeros_like(part) if grads[index] is None else grads[index]
            for part, grads in zip(parts, chunk_grads, strict=True)
        ]
        torch.autograd.backward((value,), (torch.cat(grads, dim),))
