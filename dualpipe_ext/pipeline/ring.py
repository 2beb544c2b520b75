"""Where the messages of a channel lie in its ring: memory at the receiver, used round and round.

What belongs here: cutting messages into pieces and giving every piece a place. Sender and receiver
do so for the same messages in the same order, so they come to the same places without a word.

Sizes and offsets are in bytes. Pieces are numbered from 1, through all messages of the channel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

# Parts begin on multiples of it: copies of unaligned memory are slow.
ALIGNMENT = 256
_PIECES = 4  # that fit into a ring at least, so that one is filled while others are read
MIN_BYTES = ALIGNMENT * _PIECES


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes ``start`` to ``stop`` of tensor ``index`` of the message; in the ring from ``at``."""

    index: int
    start: int
    stop: int
    at: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What travels, and is read, at once.

    Attributes:
        number: of the piece.
        after: number of the last earlier piece that must have been read before this one may be
            written over it; 0 if there is none.
        parts: what it is made of.
    """

    number: int
    after: int
    parts: tuple[Part, ...]


class Ring:
    """The places of all pieces of one channel.

    Args:
        num_bytes: of the ring, a multiple of ``ALIGNMENT`` and at least ``MIN_BYTES``.

    Attributes:
        piece_bytes: the most that a piece holds, a quarter of the ring.
    """

    def __init__(self, num_bytes: int) -> None:
        assert num_bytes % ALIGNMENT == 0
        assert num_bytes >= MIN_BYTES
        self._size = num_bytes
        self.piece_bytes = num_bytes // MIN_BYTES * ALIGNMENT
        self._number = 0
        # Positions count on and on; the place in the ring is the rest modulo its size.
        self._end = 0
        self._after = 0
        # (number, first position) of pieces that nothing has been written over yet.
        self._lying: deque[tuple[int, int]] = deque()

    def pieces(self, sizes: Sequence[int]) -> list[Piece]:
        """The pieces of the next message.

        Args:
            sizes: of its tensors; empty ones take no place. A message may be larger than the ring.
        """
        pieces: list[Piece] = []
        parts: list[tuple[int, int, int]] = []
        taken = 0
        for index, size in enumerate(sizes):
            start = 0
            while start < size:
                if taken == self.piece_bytes:
                    pieces.append(self._place(parts, taken))
                    parts, taken = [], 0
                stop = min(size, start + self.piece_bytes - taken)
                parts.append((index, start, stop))
                taken += aligned(stop - start)
                start = stop
        if parts:
            pieces.append(self._place(parts, taken))
        return pieces

    def _place(self, parts: Sequence[tuple[int, int, int]], num_bytes: int) -> Piece:
        start = self._end
        left = self._size - start % self._size
        if num_bytes > left:
            start += left  # a piece lies in one run: what is left at the end stays unused
        self._end = start + num_bytes
        while self._lying and self._lying[0][1] + self._size < self._end:
            self._after = self._lying.popleft()[0]
        self._number += 1
        self._lying.append((self._number, start))
        at = start % self._size
        placed = []
        for index, first, stop in parts:
            placed.append(Part(index, first, stop, at))
            at += aligned(stop - first)
        return Piece(self._number, self._after, tuple(placed))


def aligned(num_bytes: int) -> int:
    """The next multiple of ``ALIGNMENT``."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
