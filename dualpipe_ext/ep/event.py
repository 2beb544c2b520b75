"""When a communication call is done: events, and the side stream that ``async_op=True`` uses.

Only the ordering between streams belongs here; what runs on them does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class Event:
    """A point in a communication stream that later work can be ordered after.

    On the CPU every call has finished when it returns, so the event is complete from the start.
    """

    __slots__ = ("_cuda_event", "_keep")

    def __init__(self, cuda_event: torch.cuda.Event | None = None, keep: object = None) -> None:
        self._cuda_event = cuda_event
        # What the side stream still reads, allocated on the caller's stream: its memory must not
        # be given out again before that stream has waited.
        self._keep = keep

    def wait(self) -> None:
        """Order what the current stream is given from now on after this event; no host wait."""
        if self._cuda_event is not None:
            torch.cuda.current_stream().wait_event(self._cuda_event)
            self._keep = None

    def done(self) -> bool:
        """Whether the work before the event has finished, as far as the host can see now."""
        return self._cuda_event is None or self._cuda_event.query()


_HERE = contextlib.nullcontext()


class CommStream:
    """The stream on which ``async_op`` calls of one buffer run, created at the first of them."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def run(
        self, async_op: bool, rows: Tensor, *others: Tensor | None
    ) -> contextlib.AbstractContextManager[None]:
        """Run the body after the current stream, on the side stream if asked and if there is one.

        Gradients need no care: autograd runs a backward on the stream of its forward and orders
        it after the streams that its inputs come from.

        Args:
            async_op: asked.
            rows: with ``others``, what the body reads.
            others: likewise.
        """
        if not (async_op and rows.is_cuda):
            return _HERE
        return self._aside([rows, *(t for t in others if t is not None)])

    @contextlib.contextmanager
    def _aside(self, tensors: list[Tensor]) -> Iterator[None]:
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensors[0].device)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        for tensor in tensors:
            # The caller may drop an input at once; its memory must outlive the side stream's use.
            tensor.record_stream(self._stream)

    def event(self, async_op: bool, outputs: tuple[Tensor | None, ...], keep: object) -> Event:
        """The event after everything given to :meth:`run` so far.

        Args:
            async_op: as given to :meth:`run`.
            outputs: what the side stream made; it will be read on the caller's stream.
            keep: what the side stream read besides the inputs of :meth:`run`.
        """
        if not async_op or self._stream is None:
            return Event()
        for tensor in outputs:
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream())
        return Event(self._stream.record_event(), keep)
