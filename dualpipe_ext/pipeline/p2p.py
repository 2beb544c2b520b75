"""Point-to-point messages between two ranks: channels, in-flight sends, bounded waits.

What belongs here: :class:`Channel`, one direction between two ranks, and the waits on what travels
through it. What is sent when is in ``exchange.py``.

Each channel is a process group of its own, of two ranks: on NCCL that is a communicator and a
stream of its own, so a message that its receiver does not want yet holds up nothing but the later
messages of the same channel. The tensors of a message travel as one batch, and as bytes, so that
any dtype can.
"""

from __future__ import annotations

import datetime
import queue
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext.errors import CommTimeoutError, DualPipeError
from dualpipe_ext.timeouts import is_timeout

_POLL_S = 100e-6
# The runtime's own wait should end first: the NCCL watchdog ends the whole process.
_WATCHDOG_MARGIN_S = 60.0
_CLOSE_S = 10.0
_TAGS = 2**20  # gloo matches by tag; far more than are ever in flight


class Channel:
    """One direction between two ranks, first in, first out.

    Creating one is collective over its two ranks. A rank that creates several must do so in an
    order that all ranks agree on, or the ranks wait for each other in a circle.

    Args:
        name: the same on both ranks, and no other channel's.
        source: rank that sends.
        destination: rank that receives.
        rank: this rank, one of the two.
        device: where the tensors are; NCCL for CUDA, gloo for the CPU.
        timeout_s: longest wait for the other rank, in seconds.

    Raises:
        CommTimeoutError: the other rank did not create it in time.
    """

    piece_bytes = sys.maxsize  # see CopyChannel: here every message travels whole

    def __init__(
        self,
        name: str,
        source: int,
        destination: int,
        *,
        rank: int,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        assert rank in (source, destination)
        self.rank = rank
        self.sends = rank == source
        self.peer = destination if self.sends else source
        self.device = device
        self.timeout_s = timeout_s
        self._tag = 0
        self._in_flight: deque[_Sent] = deque()
        # gloo tells that a send is complete only to a thread that waits for it.
        waits = device.type == "cpu" and self.sends
        self._waiter = _Waiter(timeout_s) if waits else None
        store = dist.PrefixStore(f"{name}/", dist.distributed_c10d._get_default_store())
        try:
            self._backend = _backend(store, int(rank == destination), device, timeout_s)
        except RuntimeError as error:
            raise _failure(self, "to open a channel", error) from error
        self._shake_hands()

    def _shake_hands(self) -> None:
        """Send one message: NCCL connects, and blocks the host, at the first use of a group."""
        if self._backend.rank() == 0:
            self.send([torch.zeros(1, device=self.device)], "the opening of a channel")
            self.drain()
        else:
            incoming = self.receive([((1,), torch.float32)])
            self.wait(incoming, "the opening of a channel", on_host=True)

    def send(self, tensors: list[Tensor], what: str, *, follow: bool = True) -> None:
        """Start sending; the tensors are kept until they are sent and must not change before.

        Args:
            what: what they are, for errors.
            follow: see :meth:`follow`.
        """
        self.release_sent()
        tensors = [plain(tensor) for tensor in tensors]
        works = self._post(self._backend.send, 1, tensors, f"to receive {what}")
        if not works:
            return
        sent = _Sent(works, tensors, what, threading.Event() if self._waiter else None)
        self._in_flight.append(sent)
        if self._waiter is not None:
            self._waiter.watch(sent)

    def receive(self, layouts: Sequence[tuple[Sequence[int], torch.dtype]]) -> Incoming:
        """Start receiving a message, given the shapes and dtypes of its tensors.

        On CUDA the transfer does not wait for what the current stream still has to do: the host is
        ahead of the device, so that posting a receive right before its tensors are needed lets it
        run beside the actions before.
        """
        on_side = nullcontext()
        if self.device.type == "cuda":
            # Memory for it comes from the side stream's pool too: the current stream may still be
            # using what its own pool has free.
            on_side = torch.cuda.stream(_receive_stream(self.device))
        with on_side:
            tensors = [torch.empty(s, dtype=d, device=self.device) for s, d in layouts]
            return Incoming(self._post(self._backend.recv, 0, tensors, "to send"), tensors)

    def wait(self, incoming: Incoming, what: str, *, on_host: bool = False) -> list[Tensor]:
        """Wait until a message is there: on CUDA, let the current stream wait.

        Args:
            what: what is received, for errors.
            on_host: let the host wait too, for data that the host will read.

        Returns:
            The tensors of the message.

        Raises:
            CommTimeoutError: it did not come within the time-out. On CUDA without ``on_host``, the
                host does not wait; what never comes is found by :meth:`drain`, by the next wait of
                the host, or at the latest by the watchdog of NCCL.
        """
        purpose = f"to send {what}"
        deadline = time.monotonic() + self.timeout_s
        for work in incoming.works:
            try:
                if self.device.type == "cpu":
                    work.wait(datetime.timedelta(seconds=self.timeout_s))
                    continue
                if on_host:
                    self._poll(work, deadline, purpose)
                work.wait()
            except RuntimeError as error:
                raise _failure(self, purpose, error) from error
        if self.device.type == "cuda":
            for tensor in incoming.tensors:
                tensor.record_stream(torch.cuda.current_stream(self.device))
        return incoming.tensors

    def add(
        self,
        incoming: Incoming,
        what: str,
        mine: Sequence[Tensor | None],
        totals: Sequence[Tensor],
    ) -> None:
        """Add a message to tensors; see ``CopyChannel.add``. The current stream waits at once."""
        others = self.wait(incoming, what)
        for here, other, total in zip(mine, others, totals, strict=True):
            total.copy_(other) if here is None else torch.add(here, other, out=total)

    def follow(self) -> None:
        """Nothing to do: the backends follow the current stream in any case."""

    def join(self) -> None:
        """Nothing to wait for: see :meth:`add`."""

    def _poll(self, work: Any, deadline: float, purpose: str) -> None:
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise CommTimeoutError(_waited(self, purpose))
            time.sleep(_POLL_S)

    def release_sent(self) -> None:
        """Forget the tensors of completed sends, which frees those that nothing else needs."""
        while self._in_flight and self._in_flight[0].done():
            sent = self._in_flight.popleft()
            if sent.error is not None:
                raise _failure(self, f"to receive {sent.what}", sent.error) from sent.error

    def drain(self) -> None:
        """Wait, on the host, until everything is sent.

        Raises:
            CommTimeoutError: the other rank did not receive it within the time-out.
        """
        deadline = time.monotonic() + self.timeout_s
        while True:
            self.release_sent()
            if not self._in_flight:
                return
            if time.monotonic() > deadline:
                raise CommTimeoutError(_waited(self, f"to receive {self._in_flight[0].what}"))
            time.sleep(_POLL_S)

    def close(self, *, abort: bool) -> None:
        """Give up the connection.

        Args:
            abort: something may still be on its way; on CUDA it would occupy the device for ever.
                The other rank then takes this one for lost.
        """
        if self._waiter is not None:
            self._waiter.close()
        if self._backend is not None and self.device.type == "cuda":
            (self._backend.abort if abort else self._backend.shutdown)()
        self._in_flight.clear()
        self._backend = None

    def _post(
        self, start: Callable[..., Any], peer: int, tensors: list[Tensor], purpose: str
    ) -> list[Any]:
        works = []
        tensors = [tensor for tensor in tensors if tensor.numel()]
        if not tensors:
            return works
        batched = self._backend.supports_coalescing
        try:
            if batched:
                self._backend._start_coalescing()
            for tensor in tensors:
                self._tag = (self._tag + 1) % _TAGS
                works.append(start([as_bytes(tensor)], peer, self._tag))
            return [self._backend._end_coalescing()] if batched else works
        except RuntimeError as error:
            raise _failure(self, purpose, error) from error


def close_all(channels: Sequence[Channel], *, abort: bool) -> None:
    """Close channels together, within a few seconds.

    Aborting one NCCL communicator waits for the whole device, and so for the sends and receives of
    the others until they are aborted too: one after the other would never end.
    """
    threads = [
        threading.Thread(target=channel.close, kwargs={"abort": abort}, daemon=True)
        for channel in channels
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + _CLOSE_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


class Incoming(NamedTuple):
    """A message that is being received."""

    works: list[Any]
    tensors: list[Tensor]


class _Sent:
    """A message on its way, and the tensors it is made of."""

    __slots__ = ("error", "tensors", "waited", "what", "works")

    def __init__(
        self, works: list[Any], tensors: list[Tensor], what: str, waited: threading.Event | None
    ) -> None:
        self.works = works
        self.tensors = tensors
        self.what = what
        self.waited = waited  # set by a waiter, where there is one
        self.error: RuntimeError | None = None

    def done(self) -> bool:
        if self.waited is not None:
            return self.waited.is_set()
        return all(work.is_completed() for work in self.works)


class _Waiter:
    """A thread that waits for the sends of one channel, in order."""

    def __init__(self, timeout_s: float) -> None:
        self._queue: queue.SimpleQueue[_Sent | None] = queue.SimpleQueue()
        timeout = datetime.timedelta(seconds=timeout_s)
        threading.Thread(
            target=_wait_for_sends, args=(self._queue, timeout), name="dualpipe-sends", daemon=True
        ).start()
        self.close = weakref.finalize(self, self._queue.put, None)

    def watch(self, sent: _Sent) -> None:
        self._queue.put(sent)


def _wait_for_sends(pending: queue.SimpleQueue[_Sent | None], timeout: datetime.timedelta) -> None:
    while (sent := pending.get()) is not None:
        try:
            while sent.works:
                sent.works[0].wait(timeout)
                del sent.works[0]
        except RuntimeError as error:
            sent.error = error
        # Here and not where the channel forgets the message: this thread still refers to it.
        sent.tensors.clear()
        sent.waited.set()


@cache
def _receive_stream(device: torch.device) -> Any:
    """A stream on which nothing runs; receives wait for nothing but their sender there."""
    return torch.cuda.Stream(device)


def _backend(store: Any, rank: int, device: torch.device, timeout_s: float) -> Any:
    """A process group of two ranks over ``store``.

    Not ``dist.new_group``: that either involves every rank of the world, which here may belong to
    other pipelines, or derives the group's name from the number of groups this rank has, which need
    not be the same on both.
    """
    if device.type == "cpu":
        return dist.ProcessGroupGloo(store, rank, 2, datetime.timedelta(seconds=timeout_s))
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = datetime.timedelta(seconds=timeout_s + _WATCHDOG_MARGIN_S)
        return dist.ProcessGroupNCCL(store, rank, 2, options)
    raise ValueError(f"expected stages on the CPU or on CUDA, got {device}")


def plain(tensor: Tensor) -> Tensor:
    """Contiguous, and what lies in its memory is what it means."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def as_bytes(tensor: Tensor) -> Tensor:
    """uint8 [bytes], the memory of a contiguous tensor of any dtype."""
    flat = tensor.detach().reshape(-1)
    return (torch.view_as_real(flat).view(-1) if flat.is_complex() else flat).view(torch.uint8)


def _waited(channel: Channel, purpose: str) -> str:
    return (
        f"rank {channel.rank} waited {channel.timeout_s:g} s for rank {channel.peer} {purpose} "
        f"(pipeline ranks)"
    )


def _failure(channel: Channel, purpose: str, error: RuntimeError) -> DualPipeError:
    if isinstance(error, DualPipeError):
        return error
    if is_timeout(error):
        return CommTimeoutError(_waited(channel, purpose))
    return DualPipeError(
        f"rank {channel.rank} lost rank {channel.peer} while it waited for it {purpose} "
        f"(pipeline ranks): {error}"
    )
