"""A hand on the link between ranks: slower, recorded, or taken out, below autograd.

What belongs here: :class:`Link`, which stands between a ``Buffer`` and its transport, so that a
backward meets it as a forward does. A benchmark uses it to make communication as slow as on a
slower network, to repeat it without the compute around it, and to run that compute without it.

T tokens of this rank, H hidden, K top-k, M expert rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualpipe_ext.ep import Buffer
from dualpipe_ext.ep.copy_engine import CopyEngineTransport
from dualpipe_ext.ep.handle import Handle
from dualpipe_ext.ep.transport import Rows
from dualpipe_ext.profiling.trace import COMM_PATTERNS

SLOW_LINKS = ("host", "peer")
"""Where copies go that make a copy engine's link slower: to the host, through PCIe, at the rate of
a network adapter, or to the peer again, which takes as much of the memory's rate as a fast link,
for as long as a slow one."""
_DETOUR_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Recording:
    """What went over a link.

    Attributes:
        calls: every call of the transport, in order, ready to be made again. Rows are others of
            the same shape: they would take more memory than a model leaves.
        handles: of the routes among them, in order.
    """

    calls: list[Callable[[], object]] = field(default_factory=list)
    handles: list[Handle] = field(default_factory=list)

    def replay(self) -> None:
        """Make all calls again, on the current stream."""
        for call in self.calls:
            call()


class Link:
    """Every dispatch and combine of ``buffer`` goes through it from now on, gradients included.

    Args:
        buffer: whose link it is.
        slow_link: what ``repeats`` repeats where copy engines drive the link, of
            :data:`SLOW_LINKS`.

    Attributes:
        repeats: how often each dispatch and combine is made. Between whole numbers, some calls are
            made once more than others: 2.5 is 2, 3, 2, 3, ... times. The results are those of the
            last time. The same on all ranks. Where copy engines drive the link, only their copies
            are repeated, as if it were slower: what packs and unpacks runs once.
        slow_link: what is repeated: "host" and "peer" as in :data:`SLOW_LINKS`, or "calls".
    """

    def __init__(self, buffer: Buffer, *, slow_link: str = SLOW_LINKS[0]) -> None:
        self._transport = transport = buffer._transport
        self._repeats = 1.0
        self._config = transport.config
        self._real = (transport.route, transport.dispatch, transport.combine)
        # In the transport's place nothing else would do: its handles must be its own.
        transport.route, transport.dispatch, transport.combine = (
            self._route,
            self._dispatch,
            self._combine,
        )
        self.slow_link = slow_link if self._repeats_copies() else "calls"
        self._num_calls = 0
        self._pool = _Pool()
        self._recording: Recording | None = None
        self._handles: Iterator[Handle] | None = None

    @property
    def repeats(self) -> float:
        return self._repeats

    @repeats.setter
    def repeats(self, repeats: float) -> None:
        self._repeats = repeats
        if self._repeats_copies():
            if self._goes_aside and self._transport.link_detour is None:
                memory = torch.empty(_DETOUR_BYTES, dtype=torch.uint8, pin_memory=True)
                self._transport.link_detour = memory
            self._transport.link_repeats = max(1.0, repeats)

    @property
    def _goes_aside(self) -> bool:
        return self.slow_link == "host" and self.repeats > 1

    @property
    def comm_patterns(self) -> tuple[str, ...]:
        """Of what communicates in a trace of it."""
        return (*COMM_PATTERNS, "Memcpy DtoH") if self._goes_aside else COMM_PATTERNS

    def _repeats_copies(self) -> bool:
        return isinstance(self._transport, CopyEngineTransport)

    def can_be_slower(self) -> bool:
        """Whether there is anything to repeat: copy engines carry nothing for a single rank."""
        return not self._repeats_copies() or self._config.num_ranks > 1

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """Record what the body moves."""
        self._recording = found = Recording()
        try:
            yield found
        finally:
            self._recording = None

    @contextmanager
    def taken_out(self, handles: Sequence[Handle]) -> Iterator[None]:
        """In the body nothing moves and nobody waits: rows of the right shapes are there at once.

        Their values are random, for zeros would be multiplied in less time. Tensors share memory.

        Args:
            handles: what the routes in the body return, one after the other.
        """
        self._handles = iter(handles)
        try:
            yield
        finally:
            self._handles = None

    def _route(self, topk_idx: Tensor, options: Any) -> Handle:
        if self._handles is not None:
            return next(self._handles)
        route = self._real[0]
        handle = route(topk_idx, options)
        if self._recording is not None:
            self._recording.handles.append(handle)
            self._recording.calls.append(partial(route, topk_idx, options))
        return handle

    def _dispatch(
        self, x: Tensor, topk_weights: Tensor | None, handle: Handle, **options: Any
    ) -> Rows:
        if self._handles is None:
            return self._move(self._real[1], x, topk_weights, handle, **options)
        assert not options.get("fp8")  # nor token layout: not what the model's layers ask for
        tokens = self._pool.take((handle.num_rows, self._config.hidden), x)
        weights = None
        if topk_weights is not None:
            weights = self._pool.take((handle.num_rows,), topk_weights)
        return Rows(tokens, None, weights)

    def _combine(
        self, rows: Tensor, handle: Handle, *, row_weights: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self._handles is None:
            return self._move(self._real[2], rows, handle, row_weights=row_weights, **options)
        weights = None
        if row_weights is not None:
            weights = self._pool.take((handle.num_tokens, self._config.top_k), row_weights)
        return self._pool.take((handle.num_tokens, self._config.hidden), rows), weights

    def _move(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self._recording is not None:
            again = partial(self._again, call, _kinds(args), _kinds(options.values()), [*options])
            self._recording.calls.append(again)
        return self._repeat(call, args, options)

    def _again(
        self, call: Callable[..., Any], args: list[Any], values: list[Any], names: list[str]
    ) -> None:
        given, named = self._filled(args), self._filled(values)
        self._repeat(call, given, dict(zip(names, named, strict=True)))

    def _filled(self, items: list[Any]) -> list[Any]:
        return [self._pool.take(*item) if isinstance(item, _Kind) else item for item in items]

    def _repeat(self, call: Callable[..., Any], args: Sequence[Any], options: dict) -> Any:
        if self._repeats_copies():
            return call(*args, **options)
        before = self._num_calls
        self._num_calls += 1
        times = math.floor((before + 1) * self.repeats) - math.floor(before * self.repeats)
        for _ in range(times - 1):
            call(*args, **options)
        return call(*args, **options)


class _Kind(NamedTuple):
    """All of a tensor but its values."""

    shape: torch.Size
    like: Tensor
    """Of its dtype, on its device, without memory."""


def _kinds(values: Iterable[Any]) -> list[Any]:
    return [
        _Kind(value.shape, value.new_empty(0)) if isinstance(value, Tensor) else value
        for value in values
    ]


class _Pool:
    """Tensors of random values, all of a kind in the same memory; nobody writes to them."""

    def __init__(self) -> None:
        self._values: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Of this shape, with the dtype and device of ``like``."""
        key, size = (like.dtype, like.device), math.prod(shape)
        if key not in self._values or self._values[key].numel() < size:
            generator = torch.Generator(like.device).manual_seed(0)
            values = torch.empty(size, dtype=like.dtype, device=like.device)
            self._values[key] = values.normal_(generator=generator)
        # A tensor of its own on the shared memory: autograd gives each its place in a graph.
        return self._values[key].detach()[:size].view(shape)
