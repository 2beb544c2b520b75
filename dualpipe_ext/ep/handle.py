"""What a dispatch leaves behind: the rows a rank received, and the handle that leads back.

Shapes: T tokens of this rank, H hidden, E experts, R ranks, E/R experts per rank, K top-k,
N rows in token layout, M rows in expert layout.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dualpipe_ext.ep.event import Event
from dualpipe_ext.ep.fp8 import Quantized, StraightThroughDequantize, dequantize

Layout = Literal["token", "expert"]
LAYOUTS: tuple[Layout, ...] = ("token", "expert")


_keys = itertools.count()
_handles: weakref.WeakValueDictionary[int, Handle] = weakref.WeakValueDictionary()


def handle_with_key(key: int) -> Handle:
    """The live handle of that :attr:`Handle.key`."""
    return _handles[key]


class _WeaklyReferable:
    __slots__ = ("__weakref__",)  # dataclass has weakref_slot from Python 3.11 on


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Handle(_WeaklyReferable):
    """Where every row of one dispatch came from and went to; made by a transport, opaque to users.

    Not a tensor, never changed, valid as long as it is referenced: any number of handles can be
    alive, and each can serve any number of combines and cached dispatches in any order, as long as
    every rank makes the same calls in the same order. Transports extend it with their own state. On
    CUDA its memory belongs to the stream of the dispatch: while another stream still uses it (but
    for the side stream of ``async_op``), it must be referenced, as any tensor.
    """

    owner: object = field(repr=False)
    """The transport that made it; no other can use it."""
    layout: Layout
    alignment: int
    num_tokens: int
    """T, rows of ``x`` and of the combined output."""
    num_rows: int
    """Rows of ``recv.tokens``: N or M, or ``max_recv_tokens`` where that was given."""
    topk_idx: Tensor | None = field(repr=False)
    """Token layout: int64 [N, K], see :class:`TokenMajor`."""
    offsets: Tensor | None = field(repr=False)
    """Expert layout: int32 [E/R], see :class:`ExpertMajor`."""
    counts: Tensor = field(repr=False)
    """int64 [E/R], rows that each local expert has, padding not counted."""
    host_counts: list[int] | None = field(default=None, repr=False)
    """The same as numbers, where the host has waited for them; see :class:`Received`."""
    zero_copy: bool = False
    """Whether rows are left in the communication buffer if they can be."""
    rows_per_expert: int | None = None
    """Rows of each expert's group, where that was given."""
    key: int = field(init=False, repr=False)
    """Its number in this process, by which compiled code names it (see ``ops.py``)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", next(_keys))
        _handles[self.key] = self

    def tensors(self) -> Iterator[Tensor]:
        """All that it holds, those of its parts included."""
        return _tensors_of(self)


def _tensors_of(holder: Any) -> Iterator[Tensor]:
    for part in fields(holder):
        value = getattr(holder, part.name)
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors_of(value)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Received:
    """What both layouts have in common.

    ``tokens`` owns its memory; with ``zero_copy=True`` it may be a view of the communication buffer
    instead, a slab of which stays taken until the last tensor of that storage is gone (as with any
    tensor: a stream that still reads it when the last reference goes must be waited for).

    With ``fp8=True`` it is float8_e4m3fn and ``scales`` float32 [rows, H/128]; otherwise it has the
    dtype of ``x`` and ``scales`` is None. After ``async_op=True`` call ``event.wait()`` before
    anything else is used.
    """

    tokens: Tensor
    counts: Tensor
    """int64 [E/R]: rows for each local expert, padding not counted."""
    host_counts: list[int] | None = None
    """The same [E/R] as numbers: for grouped GEMMs that are told sizes by the host. Reading
    ``counts`` there would wait for all rows; these came with the number of rows. None with
    ``max_recv_tokens`` or ``rows_per_expert``, where the host waits for nothing, and in compiled
    code."""
    scales: Tensor | None = None
    event: Event = field(default_factory=Event, repr=False)
    grad_carrier: Tensor | None = field(default=None, repr=False)
    """FP8 only: the tensor whose gradient is taken as the gradient of the rows (see
    :class:`~dualpipe_ext.ep.fp8.StraightThroughDequantize`); for FP8 GEMMs with their own
    backward. Its values mean nothing."""

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """FP8 rows as ``dtype``, differentiable: their gradient passes the quantisation by."""
        if self.scales is None:
            raise ValueError(f"expected rows dispatched with fp8=True, got {self.tokens.dtype}")
        if self.grad_carrier is None:
            return dequantize(Quantized(self.tokens, self.scales), dtype)
        rows = (self.grad_carrier, self.tokens, self.scales, dtype)
        if torch.compiler.is_compiling():
            # As an op (ops.py): torch 2.11 compiles the function itself to one without gradient,
            # since its forward does not read the carrier.
            return torch.ops.dualpipe_ext.dequantize(*rows)
        return StraightThroughDequantize.apply(*rows)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenMajor(Received):
    """Token layout: one row per (source rank, token) that has an expert here.

    Rows are grouped by source rank, in the source's token order: ``tokens`` [N, H]. With
    ``max_recv_tokens`` the rows past the last token are zero and their ``topk_idx`` is -1.
    """

    topk_idx: Tensor
    """int64 [N, K]: **local** expert ids (0 .. E/R-1), -1 where the choice is not here."""
    topk_weights: Tensor | None
    """[N, K], 0 where the choice is not here; None if none were dispatched."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertMajor(Received):
    """Expert layout: one row per (token, local expert), ready for a grouped GEMM.

    Rows are grouped by local expert; inside an expert they are in token-layout order (a token that
    names an expert twice has two rows, in top-k order); each expert's rows are followed by zero
    rows up to a multiple of ``alignment``: ``tokens`` [M, H]. Rows past ``offsets[-1]``, which
    exist only with ``max_recv_tokens``, are zero too.

    With ``rows_per_expert=n`` every group has n rows, ``tokens.view(E/R, n, H)``, of which the
    first ``counts`` are filled; **the others are not written**, nor are their scales and weights:
    what reads the rows must be told the counts, as masked grouped GEMMs are.
    """

    offsets: Tensor
    """int32 [E/R]: the END row of each expert's group, padding included (what
    ``torch._grouped_mm`` calls ``offs``)."""
    weights: Tensor | None
    """[M], the top-k weight of each row, 0 in padding; None if none were dispatched."""


def received(
    handle: Handle,
    outputs: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    event: Event,
) -> TokenMajor | ExpertMajor:
    """What a dispatch gives: tokens, scales, weights and grad_carrier, as the handle says."""
    tokens, scales, weights, grad_carrier = outputs
    shared = {
        "tokens": tokens,
        "counts": handle.counts,
        "host_counts": handle.host_counts,
        "scales": scales,
        "event": event,
        "grad_carrier": grad_carrier,
    }
    if handle.layout == "expert":
        assert handle.offsets is not None
        return ExpertMajor(**shared, offsets=handle.offsets, weights=weights)
    assert handle.topk_idx is not None
    return TokenMajor(**shared, topk_idx=handle.topk_idx, topk_weights=weights)
