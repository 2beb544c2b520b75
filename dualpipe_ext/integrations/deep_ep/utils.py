"""``EventHandle`` and ``EventOverlap``: when an asynchronous call is done."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor


class Waits(Protocol):
    """What an ``EventOverlap`` can hold besides a point in a stream."""

    def wait(self) -> None:
        """Order the current stream after it."""


class EventHandle:
    """A point in the current stream, where there are streams."""

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        if torch.cuda.is_available():
            self._event = torch.cuda.Event()
            self._event.record()

    def current_stream_wait(self) -> None:
        """Order the current stream after that point."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class EventOverlap:
    """What an asynchronous call returns; as a context manager it waits when the body is over."""

    def __init__(
        self,
        event: EventHandle | Waits | None = None,
        extra_tensors: tuple[Tensor, ...] | None = None,
    ) -> None:
        self.event = event
        # Kept as long as this is.
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        """Order the current stream after the call."""
        if isinstance(self.event, EventHandle):
            self.event.current_stream_wait()
        elif self.event is not None:
            self.event.wait()

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.current_stream_wait()


def check_dims(name: str, tensor: object, dims: tuple[str, ...]) -> None:
    """Refuse what does not have these dimensions, before anybody reads their sizes."""
    if isinstance(tensor, Tensor) and tensor.dim() == len(dims):
        return
    got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
    raise ValueError(f"expected {name} as a tensor [{', '.join(dims)}], got {got}")


def overlap_of(event: Waits, async_finish: bool) -> EventOverlap:
    """What a call returns: with an event only if it was asked for, as DeepEP's do."""
    return EventOverlap(event if async_finish else None)
