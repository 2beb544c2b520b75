"""Slabs are taken once, come back by themselves, and stay with the graph that has captured them."""

from __future__ import annotations

from dualpipe_ext.ep.slabs import FreeSlabs


class Captures:
    """Stands for the stream: in which capture it is."""

    def __init__(self) -> None:
        self.current = 0

    def __call__(self) -> int:
        return self.current


def test_a_slab_is_taken_until_its_lease_is_gone() -> None:
    slabs = FreeSlabs(range(2, 4), Captures())
    first, second = slabs.take(), slabs.take()
    assert {first.index, second.index} == {2, 3}
    assert slabs.take() is None
    index = first.index
    del first
    again = slabs.take()
    assert again.index == index
    assert slabs.take() is None


def test_what_a_capture_has_taken_only_that_capture_takes_again() -> None:
    capture = Captures()
    slabs = FreeSlabs(range(1, 3), capture)
    capture.current = 7
    index = slabs.take().index  # gone at once
    assert slabs.take().index == index, "the calls of one graph share a slab"
    capture.current = 0
    other = slabs.take()
    assert other.index != index
    assert slabs.take() is None, "the graph may be replayed at any time"
    del other
    capture.current = 8
    assert slabs.take().index != index


def test_two_outputs_of_one_capture_have_a_slab_each() -> None:
    capture = Captures()
    capture.current = 7
    slabs = FreeSlabs(range(1, 3), capture)
    first, second = slabs.take(), slabs.take()
    assert first.index != second.index
    assert slabs.take() is None
