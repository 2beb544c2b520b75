"""Places in a ring: nothing is written over what may still be read, and both ends agree."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from dualpipe_ext.pipeline.ring import ALIGNMENT, MIN_BYTES, Piece, Ring


def spans(piece: Piece) -> list[tuple[int, int]]:
    return [(part.at, part.at + part.stop - part.start) for part in piece.parts]


def test_small_messages_follow_each_other_and_wrap_around():
    ring = Ring(4 * ALIGNMENT)
    pieces = [ring.pieces([100])[0] for _ in range(10)]
    assert [piece.number for piece in pieces] == list(range(1, 11))
    assert [piece.parts[0].at // ALIGNMENT for piece in pieces] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert [piece.after for piece in pieces] == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6]


def test_several_tensors_share_a_piece():
    (piece,) = Ring(8 * MIN_BYTES).pieces([10, 0, 300])
    assert [(p.index, p.start, p.stop, p.at) for p in piece.parts] == [
        (0, 0, 10, 0),
        (2, 0, 300, ALIGNMENT),
    ]


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_what_is_empty_takes_no_place(sizes):
    ring = Ring(MIN_BYTES)
    assert ring.pieces(sizes) == []
    assert ring.pieces([1])[0].number == 1


def test_a_message_larger_than_the_ring_is_cut():
    ring = Ring(MIN_BYTES)
    size = 3 * MIN_BYTES + 5
    pieces = ring.pieces([size])
    assert len(pieces) == 13
    parts = [part for piece in pieces for part in piece.parts]
    assert parts[0].start == 0
    assert parts[-1].stop == size
    assert all(a.stop == b.start for a, b in pairwise(parts))
    assert [piece.after for piece in pieces] == [0, 0, 0, 0, *range(1, 10)]


def test_a_piece_that_does_not_fit_before_the_end_goes_to_the_beginning():
    ring = Ring(32 * ALIGNMENT)
    sizes = [7, 7, 7, 7, 5]  # in units; the fifth would cross the end
    pieces = [ring.pieces([n * ALIGNMENT])[0] for n in sizes]
    assert [piece.parts[0].at // ALIGNMENT for piece in pieces] == [0, 7, 14, 21, 0]
    assert [piece.after for piece in pieces] == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("seed", range(20))
def test_random_messages_never_meet(seed):
    rng = random.Random(seed)
    size = rng.choice([MIN_BYTES, 3 * MIN_BYTES, 17 * MIN_BYTES])
    ring, other = Ring(size), Ring(size)
    lying: dict[int, list[tuple[int, int]]] = {}  # not known to be read
    number = after = 0
    for _ in range(300):
        most = rng.choice([10, ALIGNMENT, size // 4, 2 * size])
        sizes = [rng.choice([0, rng.randint(1, most)]) for _ in range(rng.randint(0, 4))]
        pieces = ring.pieces(sizes)
        assert pieces == other.pieces(sizes)
        cut = [0] * len(sizes)
        for piece in pieces:
            number += 1
            assert piece.number == number
            assert after <= piece.after < number
            after = piece.after
            lying = {n: places for n, places in lying.items() if n > after}
            mine = spans(piece)
            for start, stop in mine:
                assert 0 <= start < stop <= size
                assert start % ALIGNMENT == 0
                for places in [*lying.values(), [m for m in mine if m != (start, stop)]]:
                    assert all(stop <= a or b <= start for a, b in places)
            lying[number] = mine
            for part in piece.parts:
                assert part.start == cut[part.index]
                cut[part.index] = part.stop
        assert cut == sizes
    assert sum(b - a for places in lying.values() for a, b in places) <= size


def test_a_ring_is_not_left_unused():
    """A piece waits only for pieces that lie where it will: a quarter of the ring ahead at most."""
    ring = Ring(64 * MIN_BYTES)
    pieces = [ring.pieces([16 * MIN_BYTES])[0] for _ in range(40)]
    assert all(piece.after == max(0, piece.number - 4) for piece in pieces)
