"""When a communication call is done: events, and the side stream that ``async_op=True`` uses.

Only the ordering between streams belongs here, and what it means for memory; what runs on them does
not. Whose memory is at stake in an asynchronous call, for the caching allocator gives it to the
next allocation on the stream it was allocated on, its home, as soon as nobody refers to it:

- Inputs, and the arrays of the handle: their home is the caller's stream, and the side stream reads
  them. The event keeps them until the caller's stream waits for it. If another stream waits, or
  none ever does, they are recorded on the side stream instead: then the allocator waits.
- The same with gradients: a backward runs on the side stream too and reads what it has saved, the
  handle among it. The graph is taken down while it runs, and no event is there to keep anything, so
  they are recorded at the call.
- Outputs: their home is the side stream. They are recorded on the caller's stream, and on the one
  that waits first. On any further stream they are like any tensor from elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dualpipe_ext.ep.handle import Handle


@dataclass(slots=True, eq=False)
class _Crossing:
    """What two streams use of each other's memory, while nothing orders the two.

    Not a part of :class:`Event`: ``torch.compile`` traces the making of those, but no ``__del__``.
    """

    caller: torch.cuda.Stream
    side: torch.cuda.Stream
    reads: list[Tensor]
    """Of the caller's memory, by the side stream."""
    outputs: list[Tensor]
    """Of the side stream's memory, by whoever waits."""

    def waited(self, on: torch.cuda.Stream) -> None:
        """The stream ``on`` has been ordered after the side stream."""
        if on == self.caller:
            self.reads = []
        else:
            _record(self.outputs, on)

    def __del__(self) -> None:
        # The home of what is left does not wait.
        _record(self.reads, self.side)


class Event:
    """A point in a communication stream that later work can be ordered after.

    On the CPU every call has finished when it returns, so the event is complete from the start.
    """

    __slots__ = ("_crossing", "_cuda_event")

    def __init__(
        self, cuda_event: torch.cuda.Event | None = None, crossing: _Crossing | None = None
    ) -> None:
        self._cuda_event = cuda_event
        self._crossing = crossing

    def wait(self) -> None:
        """Order what the current stream is given from now on after this event; no host wait.

        The outputs may be used on the stream of the call and on the first that waits; who lets go
        of them while any other uses them takes the care that memory of another stream needs.
        """
        if self._cuda_event is None:
            return
        current = torch.cuda.current_stream()
        current.wait_event(self._cuda_event)
        if self._crossing is not None:
            self._crossing.waited(current)
            self._crossing = None

    def done(self) -> bool:
        """Whether the work before the event has finished, as far as the host can see now."""
        return self._cuda_event is None or self._cuda_event.query()


def _record(tensors: Iterable[Tensor], stream: torch.cuda.Stream) -> None:
    for tensor in tensors:
        tensor.record_stream(stream)


_HERE = contextlib.nullcontext()


class CommStream:
    """The stream on which ``async_op`` calls of one buffer run, created at the first of them."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def run(self, async_op: bool, rows: Tensor) -> contextlib.AbstractContextManager[None]:
        """Run the body after the current stream, on the side stream if asked and if there is one.

        Autograd runs a backward on the stream of its forward and orders it after the streams that
        its gradients come from; :meth:`event` takes care of what it saves.

        Args:
            async_op: asked.
            rows: something that the body reads.
        """
        return self._aside(rows.device) if async_op and rows.is_cuda else _HERE

    @contextlib.contextmanager
    def _aside(self, device: torch.device) -> Iterator[None]:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def event(
        self,
        async_op: bool,
        handle: Handle,
        *,
        inputs: tuple[Tensor | None, ...],
        outputs: tuple[Tensor | None, ...],
    ) -> Event:
        """The event after everything given to :meth:`run` so far; right after it.

        Args:
            async_op: as given to :meth:`run`.
            handle: the transport's own, which the side stream reads.
            inputs: what it reads besides.
            outputs: what it made.
        """
        if not async_op or self._stream is None:
            return Event()
        caller, side = torch.cuda.current_stream(), self._stream
        reads = [*_on_gpu(inputs), *_on_gpu(handle.tensors())]
        made = [*_on_gpu(outputs)]
        _record(made, caller)
        if torch.is_grad_enabled():
            _record(reads, side)
            reads = []
        return Event(side.record_event(), _Crossing(caller, side, reads, made))


def _on_gpu(tensors: Iterable[Tensor | None]) -> Iterator[Tensor]:
    return (tensor for tensor in tensors if tensor is not None and tensor.is_cuda)
