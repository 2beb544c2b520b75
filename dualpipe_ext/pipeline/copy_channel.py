"""Messages between two ranks of one host by copy engine: nobody's SM moves a byte over the link.

What belongs here: :class:`CopyChannel`, which does what ``p2p.Channel`` does, in terms of a
:class:`Lane`: one end's way to the other's memory. How that looks on a GPU is in
``copy_engine.py``; where a message lies in the receiver's memory, in ``ring.py``.

Both ends do the same for every piece of a message, each on a stream that nobody else uses:

    sender                                         receiver
      after what the caller's stream has so far      after what the caller's stream has so far
      acquire: pieces up to `after` were read        acquire: this piece is here
      copy its parts into the ring                   copy its parts out of the ring
      signal: the piece is here             ---->
                                            <----    signal: it was read

A send starts at once and has no part in what the receiver does; what is sent ahead waits in the
ring. A receive takes nothing until it is waited for: then the pieces of that message, and of all
earlier ones, are copied out in the order in which they come. docs/internals.md has the arguments
(order, memory, and why nothing can wait in a circle).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dualpipe_ext.errors import CommTimeoutError
from dualpipe_ext.pipeline.p2p import as_bytes, plain
from dualpipe_ext.pipeline.ring import Piece, Ring

_POLL_S = 100e-6


class Failure(NamedTuple):
    """The first wait of this rank that has run out of time."""

    sending: bool
    """Waited for room, to send; else for a piece."""
    peer: int
    number: int
    """Of the piece that could not be sent or did not come, modulo 2^32."""


class Mark(Protocol):
    """A point in the order of a lane."""

    def query(self) -> bool:
        """Whether everything before it is done."""
        ...


class Lane(Protocol):
    """One end of a channel: a stream of its own, a flag of its own that the other end sets, and
    the ring. Everything happens in the order of the calls, and no call waits for it.

    Attributes:
        ring: uint8 [bytes], the receiver's memory as seen from this end.
    """

    ring: Tensor

    def follow(self) -> None:
        """Go on only after what the current stream has been given so far."""
        ...

    def acquire(self, expected: int, number: int) -> None:
        """Wait until the flag has come to ``expected``; then make ``number`` the next signal.

        The wait is bounded. If it fails, or another one of this rank has, the signal stays what it
        was. Numbers are compared modulo 2^32.
        """
        ...

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Copy bytes: uint8, equal sizes, contiguous."""
        ...

    def add(self, total: Tensor, mine: Tensor | None, other: Tensor) -> None:
        """total = mine + other, element by element; without ``mine``, a copy. Equal dtypes."""
        ...

    def signal(self) -> None:
        """Set the other end's flag, after everything before."""
        ...

    def mark(self) -> Mark:
        """This point of the lane."""
        ...

    def join(self, mark: Mark) -> None:
        """Let the current stream go on only after ``mark``."""
        ...

    def blank(self, tensor: Tensor) -> None:
        """In the order of the current stream: zeros, if a wait of this rank has failed."""
        ...

    def failure(self) -> Failure | None:
        """The failure of any lane of this rank. Waits for nothing."""
        ...

    def close(self, *, abort: bool) -> None:
        """End all lanes of this rank; with ``abort`` also what still waits on them."""
        ...


@dataclass(slots=True, eq=False)
class Arriving:
    """A message that is being received; ``mark`` and ``tensors`` once it has been asked for."""

    layouts: list[tuple[tuple[int, ...], torch.dtype]]
    pieces: list[Piece]
    tensors: list[Tensor] | None = None
    mark: Mark | None = None


@dataclass(slots=True, eq=False)
class _Moving:
    """Pieces that a lane is busy with, and the caller's tensors that it reads or writes."""

    pieces: list[Piece]
    what: str
    mark: Mark
    tensors: list[Tensor] = field(default_factory=list)


class CopyChannel:
    """One direction between two ranks, first in, first out: see ``p2p.Channel``.

    Used from one stream at a time, on which tensors are sent, received and used.

    Args:
        lane: this rank's end.
        source: rank that sends.
        destination: rank that receives.
        rank: this rank, one of the two.
        device: where the tensors are.
        timeout_s: longest wait for the other rank, in seconds.
        siblings: all channels of this rank, by (sends, peer), this one included: a failure of one
            is found by the next call on any. This channel enters itself.

    Attributes:
        piece_bytes: a message of no more travels as one piece, if every tensor of it is counted in
            multiples of ``ring.ALIGNMENT``. Three of them fit into the ring, whatever comes before.
    """

    def __init__(
        self,
        lane: Lane,
        source: int,
        destination: int,
        *,
        rank: int,
        device: torch.device,
        timeout_s: float,
        siblings: dict[tuple[bool, int], CopyChannel],
    ) -> None:
        assert rank in (source, destination)
        self.rank = rank
        self.sends = rank == source
        self.peer = destination if self.sends else source
        self.device = device
        self.timeout_s = timeout_s
        self._lane: Any = lane
        self._ring = Ring(lane.ring.numel())
        self.piece_bytes = self._ring.piece_bytes
        self._siblings = siblings
        siblings[self.sends, self.peer] = self
        self._expected: deque[Arriving] = deque()
        self._moving: deque[_Moving] = deque()
        # The last of what has been sent since the other rank was seen to have read everything.
        self._unread: tuple[Piece, str] | None = None

    def send(self, tensors: Sequence[Tensor], what: str, *, follow: bool = True) -> None:
        """Start sending; the tensors are kept until they are sent and must not change before.

        Args:
            tensors: of any strides and dtypes.
            what: what they are, for errors.
            follow: see :meth:`follow`; without, that has been called since the tensors were made.
        """
        assert self.sends
        self.release_sent()
        parts = [as_bytes(plain(tensor)) for tensor in tensors]
        pieces = self._ring.pieces([part.numel() for part in parts])
        if not pieces:
            return
        lane = self._lane
        # Also before the first acquire: what has failed before these tensors were made is known
        # then, and they are not announced.
        if follow:
            lane.follow()
        for piece in pieces:
            lane.acquire(piece.after, piece.number)
            for part in piece.parts:
                there = lane.ring[part.at : part.at + part.stop - part.start]
                lane.copy(there, parts[part.index][part.start : part.stop])
            lane.signal()
        self._moving.append(_Moving(pieces, what, lane.mark(), parts))
        self._unread = pieces[-1], what

    def receive(self, layouts: Sequence[tuple[Sequence[int], torch.dtype]]) -> Arriving:
        """Expect a message, given the shapes and dtypes of its tensors: nothing happens yet.

        The sender does not depend on it: what is early waits in the ring, and takes nothing else.
        """
        assert not self.sends
        shapes = [(tuple(shape), dtype) for shape, dtype in layouts]
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes]
        arriving = Arriving(shapes, self._ring.pieces(sizes))
        self._expected.append(arriving)
        return arriving

    def wait(self, incoming: Arriving, what: str, *, on_host: bool = False) -> list[Tensor]:
        """Let the current stream wait until a message is there.

        Args:
            what: what is received, for errors.
            on_host: let the host wait too, for data that the host will read.

        Returns:
            The tensors of the message, on the current stream.

        Raises:
            CommTimeoutError: a message did not come within the time-out. Without ``on_host``, the
                host does not wait; what never comes is found by a later call, :meth:`drain` at the
                latest.
        """
        while incoming.tensors is None:
            # Earlier ones too: their places are given back in order.
            arriving = self._expected.popleft()
            self._take(arriving, what if arriving is incoming else f"what comes before {what}")
        self._prune()
        if incoming.mark is not None:
            if on_host:
                self._wait_for(incoming.mark)
            self._lane.join(incoming.mark)
        return incoming.tensors

    def add(
        self,
        incoming: Arriving,
        what: str,
        mine: Sequence[Tensor | None],
        totals: Sequence[Tensor],
    ) -> None:
        """Add a message to tensors, straight from the ring: ``totals[i] = mine[i] + message[i]``.

        :meth:`follow` has been called since ``mine`` and the memory of ``totals`` were there. The
        current stream does not wait, but for :meth:`join`. Tensors are kept until then.

        Args:
            incoming: the next message of the channel.
            what: what is received, for errors.
            mine: [tensors] contiguous, of the shapes and dtypes of the message; None for zeros.
            totals: [tensors] likewise.
        """
        following = self._expected.popleft()
        assert following is incoming, "messages are added in their order"
        lane = self._lane
        incoming.tensors = list(totals)
        for piece in incoming.pieces:
            lane.acquire(piece.number, piece.number)
            for part in piece.parts:
                other = lane.ring[part.at : part.at + part.stop - part.start]
                here, total = mine[part.index], totals[part.index]
                span = slice(part.start // total.itemsize, part.stop // total.itemsize)
                lane.add(
                    total.view(-1)[span],
                    None if here is None else here.view(-1)[span],
                    other.view(total.dtype),
                )
            incoming.mark = lane.mark()
            lane.signal()
        if incoming.pieces:
            kept = [tensor for tensor in (*mine, *totals) if tensor is not None]
            self._moving.append(_Moving(incoming.pieces, what, incoming.mark, kept))
        self._prune()

    def follow(self) -> None:
        """Go on only after what the current stream has been given so far."""
        self._lane.follow()

    def join(self) -> None:
        """Let the current stream go on only after all that :meth:`add` has been given."""
        self._lane.join(self._lane.mark())

    def _take(self, arriving: Arriving, what: str) -> None:
        """Copy a message out of the ring, into tensors of the current stream's own memory."""
        tensors = [torch.empty(s, dtype=d, device=self.device) for s, d in arriving.layouts]
        arriving.tensors = tensors
        if not arriving.pieces:
            return
        lane = self._lane
        # Not before: this memory may still be in use on the current stream. And a wait that began
        # while that computes would take from the computation's registers.
        lane.follow()
        parts = [as_bytes(tensor) for tensor in tensors]
        for piece in arriving.pieces:
            lane.acquire(piece.number, piece.number)
            for part in piece.parts:
                here = lane.ring[part.at : part.at + part.stop - part.start]
                lane.copy(parts[part.index][part.start : part.stop], here)
            # The mark of the last piece lies before its signal, which nobody here waits for.
            arriving.mark = lane.mark()
            lane.signal()
        # At once, not only where the message is waited for: from here on the memory is in the
        # order of the current stream alone, whoever lets go of it.
        lane.join(arriving.mark)
        for tensor in tensors:
            if not (tensor.is_floating_point() or tensor.is_complex()):
                # What a failed wait leaves could be an index out of range, which would cost the
                # device its context.
                lane.blank(tensor)
        self._moving.append(_Moving(arriving.pieces, what, arriving.mark))

    def release_sent(self) -> None:
        """Forget the tensors of what has been sent, which frees those that nothing else needs.

        Raises:
            CommTimeoutError: a wait of this rank, in whichever channel, has run out of time.
        """
        self._prune()

    def drain(self) -> None:
        """Wait, on the host, until everything is sent and read, or has come.

        Read too: copies follow a wait for room that has failed. What they write over must belong to
        a step that cannot end well any more, not to one that its reader has yet to end.

        Raises:
            CommTimeoutError: the other rank did not take its part within the time-out.
        """
        if self._unread is not None:
            (last, what), self._unread = self._unread, None
            self._lane.acquire(last.number, last.number)
            self._moving.append(_Moving([last], what, self._lane.mark()))
        while self._moving:
            self._wait_for(self._moving[0].mark)
            self._prune()

    def close(self, *, abort: bool) -> None:
        """End this and all other channels of the rank.

        Args:
            abort: something may still wait for another rank.
        """
        if self._lane is not None:
            self._lane.close(abort=abort)
        self._expected.clear()
        self._moving.clear()
        self._lane = None  # and with the last one the memory

    def _prune(self) -> None:
        # In this order: had a wait failed before its mark was seen, the failure is seen too.
        done = 0
        for moving in self._moving:
            if not moving.mark.query():
                break
            done += 1
        self._raise_failure()
        for _ in range(done):
            self._moving.popleft()

    def _wait_for(self, mark: Mark) -> None:
        # The device gives up by itself; the margin is for one that was busy before.
        limit_s = 2 * self.timeout_s + 10
        deadline = time.monotonic() + limit_s
        while not mark.query():
            self._raise_failure()
            if time.monotonic() > deadline:
                raise CommTimeoutError(
                    f"rank {self.rank} waited {limit_s:g} s for its own device to end a transfer "
                    f"{'to' if self.sends else 'from'} rank {self.peer} (pipeline ranks)"
                )
            time.sleep(_POLL_S)
        self._raise_failure()

    def _raise_failure(self) -> None:
        failure = self._lane.failure()
        if failure is not None:
            channel = self._siblings[failure.sending, failure.peer]
            raise CommTimeoutError(channel._waited_for(failure.number))

    def _waited_for(self, number: int) -> str:
        named = (
            moving.what
            for moving in self._moving
            for piece in moving.pieces
            if (piece.number - number) % 2**32 == 0
        )
        what = next(named, f"piece {number} of its messages")
        purpose = f"to make room for {what}" if self.sends else f"to send {what}"
        return (
            f"rank {self.rank} waited {self.timeout_s:g} s for rank {self.peer} {purpose} "
            f"(pipeline ranks)"
        )


def open_all(channels: Sequence[Any]) -> None:
    """Send one message through each of this rank's channels, and wait for those of the others.

    What cannot work shows here, and all kernels are loaded, those for integers too. Sends first:
    they wait for nobody.

    Raises:
        CommTimeoutError: another rank did not do so in time.
    """
    what = "the opening of a channel"
    for channel in channels:
        if channel.sends:
            channel.send([torch.zeros(1, dtype=torch.int64, device=channel.device)], what)
    for channel in channels:
        if not channel.sends:
            channel.wait(channel.receive([((1,), torch.int64)]), what, on_host=True)
    for channel in channels:
        channel.drain()
