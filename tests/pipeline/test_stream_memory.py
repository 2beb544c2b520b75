"""Memory is kept while a stream that is not its home may still use it, and no longer."""

from __future__ import annotations

import weakref

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_ext.pipeline.stream_memory import StreamMemory

COMPUTE, COMM = "compute", "comm"


def tensor() -> tuple[torch.Tensor, weakref.ref]:
    """A tensor, and what tells whether its memory is still there."""
    made = torch.zeros(8)
    return made, weakref.ref(made.untyped_storage())


def test_memory_goes_when_its_home_has_waited_for_the_last_use() -> None:
    memory = StreamMemory()
    rows, there = tensor()
    memory.crossed([rows, None, "a handle"], made_on=COMM, user=COMPUTE)
    memory.recorded(COMPUTE, 1)  # a use, but not the last: somebody has the rows
    memory.waited(COMM, COMPUTE, 1)
    del rows
    memory.waited(COMM, COMPUTE, 1)
    assert there() is not None, "nothing says that what was launched since is over"
    memory.recorded(COMPUTE, 2)
    assert there() is not None
    memory.waited(COMM, COMPUTE, 2)
    assert there() is None
    assert len(memory) == 0


def test_an_earlier_event_is_not_enough_and_a_later_one_is() -> None:
    memory = StreamMemory()
    rows, there = tensor()
    memory.crossed([rows], made_on=COMM, user=COMPUTE)
    del rows
    memory.recorded(COMPUTE, 5)
    memory.waited(COMM, COMPUTE, 4)
    assert there() is not None
    memory.waited(COMPUTE, COMM, 9)  # the other way round: says nothing
    assert there() is not None
    memory.waited(COMM, COMPUTE, 7)
    assert there() is None


def test_views_count_as_their_storage() -> None:
    memory = StreamMemory()
    rows, there = tensor()
    view = rows[2:4]
    memory.crossed([rows, view], made_on=COMM, user=COMPUTE)
    del rows
    memory.recorded(COMPUTE, 1)
    memory.waited(COMM, COMPUTE, 1)
    assert there() is not None, "the view is in use"
    assert len(memory) == 1
    del view
    memory.recorded(COMPUTE, 2)
    memory.waited(COMM, COMPUTE, 2)
    assert there() is None


def test_what_autograd_has_saved_is_in_use() -> None:
    memory = StreamMemory()
    rows, there = tensor()
    weight = torch.ones(8, requires_grad=True)
    memory.crossed([rows], made_on=COMM, user=COMPUTE)
    loss = (rows * weight).sum()
    del rows
    memory.recorded(COMPUTE, 1)
    memory.waited(COMM, COMPUTE, 1)
    assert len(memory) == 1
    loss.backward()
    memory.recorded(COMPUTE, 2)
    memory.waited(COMM, COMPUTE, 2)
    assert there() is None


def test_what_comes_home_is_not_foreign_there() -> None:
    memory = StreamMemory()
    x, there = tensor()
    memory.crossed([x], made_on=COMPUTE, user=COMM)
    memory.crossed([x], made_on=COMM, user=COMPUTE)  # passed on; it was made on COMPUTE
    del x
    memory.recorded(COMM, 1)
    memory.waited(COMPUTE, COMM, 1)
    assert there() is None
    assert len(memory) == 0


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["make", "drop", "record", "wait"]), st.integers(0, 5)), max_size=60
)


@settings(max_examples=200)
@given(ACTIONS)
def test_whatever_the_order_nothing_goes_early_and_nothing_stays(actions: list) -> None:
    """A model beside it: a tensor may go once its home has waited for an event behind its drop."""
    memory, alive, dropped = StreamMemory(), [], []
    recorded, waited = 0, 0
    for action, number in actions:
        if action == "make":
            made, there = tensor()
            memory.crossed([made], made_on=COMM, user=COMPUTE)
            alive.append((made, there))
            del made
        elif action == "drop" and alive:
            made, there = alive.pop(number % len(alive))
            del made
            dropped.append((there, recorded))  # events after this one are behind its last use
        elif action == "record":
            recorded += 1
            memory.recorded(COMPUTE, recorded)
        elif action == "wait":
            waited = max(waited, recorded)
            memory.waited(COMM, COMPUTE, recorded)
        for there, before in dropped:
            if waited <= before:
                assert there() is not None, "used again too early"
            else:
                assert there() is None, "kept for nothing"
        assert all(there() is not None for _, there in alive)
