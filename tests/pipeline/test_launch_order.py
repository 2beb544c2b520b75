"""Weight gradients go where the compute stream would wait, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpipe_ext.pipeline.launch_order import (
    LEFT,
    Launch,
    PairTimes,
    fill_gaps,
    interleave,
    mean_span,
    predicted_span,
)
from dualpipe_ext.pipeline.overlap import Phase

LAYER = (("attention", "compute"), ("dispatch", "comm"), ("mlp", "compute"), ("combine", "comm"))


def phases(layers, head=False):
    rows = [*LAYER * layers, *((("head", "compute"),) if head else ())]
    return [Phase(name, stream, tuple) for name, stream in rows]


def times_of(side, *, compute, comm, weights):
    per_phase = [comm if phase.stream == "comm" else compute[phase.name] for phase in side]
    parts = [() if phase.stream == "comm" else weights[phase.name] for phase in side]
    return PairTimes(tuple(per_phase), tuple(per_phase), tuple(parts))


def one_layer():
    """Phases and times of examples that are worked out by hand."""
    side, weights = phases(1), {"attention": (2.0,), "mlp": (3.0,)}
    return side, times_of(side, compute={"attention": 2.0, "mlp": 3.0}, comm=4.0, weights=weights)


def test_span_of_two_streams_by_hand():
    side, times = one_layer()
    # compute:  attention(F) 0-2 | mlp(B) 4-7, mlp(W) 7-10, mlp(F) 10-13 (dispatch(F) ended at 8)
    #           attention(B) 13-15 (dispatch(B) ended at 12), attention(W) 15-17
    # comm:     combine(B) 0-4, dispatch(F) 4-8, dispatch(B) 8-12, combine(F) 13-17
    assert predicted_span(interleave(side, side), side, side, times) == 17.0


def test_span_in_one_queue_by_hand():
    side, times = one_layer()
    times = replace(times, one_queue=True)
    # What communicates first in every turn:
    # compute:  attention(F) 0-2, mlp(B) 4-7 | mlp(W) 8-11, mlp(F) 11-14 | attention(B) 14-16,
    #           attention(W) 16-18
    # comm:     combine(B) 0-4, dispatch(F) 4-8, dispatch(B) 8-12, combine(F) 14-18
    assert predicted_span(interleave(side, side, one_queue=True), side, side, times) == 18.0
    # The other order: dispatch(F) begins behind mlp(B), and combine(F) behind attention(W).
    # compute:  attention(F) 0-2, mlp(B) 4-7 | mlp(W) 11-14, mlp(F) 14-17 | attention(B) 17-19,
    #           attention(W) 19-21
    # comm:     combine(B) 0-4, dispatch(F) 7-11, dispatch(B) 11-15, combine(F) 21-25
    assert predicted_span(interleave(side, side), side, side, times) == 25.0


def test_communication_is_launched_first_in_one_queue():
    layer = phases(1)
    order = interleave(layer, layer, one_queue=True)
    assert [f"{layer[one.index].name}({one.op})" for one in order] == [
        *("combine(B)", "attention(F)", "dispatch(F)", "mlp(B)", "dispatch(B)"),
        *("mlp(W)", "mlp(F)", "combine(F)", "attention(B)", "attention(W)"),
    ]


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_one_queue_hides_what_is_shorter_than_compute(layers):
    side = phases(layers)
    times = times_of(
        side,
        compute={"attention": 1.9, "mlp": 3.3},
        comm=0.6,
        weights={"attention": (0.5, 1.4), "mlp": (0.9, 1.9, 0.2, 0.3)},
    )
    times = replace(times, one_queue=True)
    compute = sum(times.forward[::2]) + sum(times.backward[::2]) + sum(map(sum, times.weights))
    for order in (interleave(side, side, one_queue=True), fill_gaps(side, side, times)):
        assert predicted_span(order, side, side, times) == pytest.approx(compute)
    # In the order for two queues half of the communication begins behind the compute of its turn.
    exposed = predicted_span(interleave(side, side), side, side, times) - compute
    assert exposed == pytest.approx(layers * 2 * 0.6)


@pytest.mark.parametrize(("layers", "speed_up"), [(1, 1.77), (2, 1.87), (4, 1.93)])
def test_equal_streams_come_close_to_half_of_serial(layers, speed_up):
    side = phases(layers)
    # A layer of DeepSeek-V3 by its products: attention, experts, and the pieces of their gradients.
    times = times_of(
        side,
        compute={"attention": 1.9, "mlp": 3.3},
        comm=3.9,  # 4 of them are as long as all that is computed
        weights={"attention": (0.5, 1.4), "mlp": (0.9, 1.9, 0.2, 0.3)},
    )
    compute = sum(times.forward[::2]) + sum(times.backward[::2]) + sum(map(sum, times.weights))
    comm = 8 * layers * 3.9 / 2
    assert comm == pytest.approx(compute, rel=0.01)
    before = predicted_span(interleave(side, side), side, side, times)
    after = predicted_span(fill_gaps(side, side, times), side, side, times)
    assert after < before
    assert (compute + comm) / after > speed_up


def test_what_the_first_gap_needs_is_left_to_the_next_pair():
    side, times = one_layer()
    # compute:  attention(F) 0-2, attention(W) of the pair before 2-4, mlp(B) 4-7, mlp(F) 8-11,
    #           mlp(W) 11-14, attention(B) 14-16
    # comm:     combine(B) 0-4, dispatch(F) 4-8, dispatch(B) 8-12, combine(F) 12-16
    order = [
        *(Launch("B", 3), Launch("F", 0), LEFT, Launch("B", 2), Launch("F", 1)),
        *(Launch("B", 1), Launch("F", 2), Launch("W", 2, 0), Launch("B", 0), Launch("F", 3)),
    ]
    assert fill_gaps(side, side, times) == order
    assert predicted_span(order, side, side, times) == 16.0


@pytest.mark.parametrize("share", [0.9, 1.0, 1.1, 1.2, 1.3])
def test_orders_are_good_though_communication_was_timed_wrongly(share):
    """Times of pairs with 2 layers of DeepSeek-V3 on 2 x H200, on a link as slow as compute."""
    side = phases(2)
    times = times_of(
        side,
        compute={"attention": 4.1, "mlp": 6.5},
        comm=8.9,
        weights={"attention": (1.85, 0.65), "mlp": (0.45, 0.3, 4.1, 7.6)},
    )
    compute = sum(times.forward[::2]) + sum(times.backward[::2]) + sum(map(sum, times.weights))
    order = fill_gaps(side, side, times.with_comm(share, side, side))
    assert predicted_span(order, side, side, times) < 1.035 * compute


def test_left_weight_gradients_fill_the_first_gap():
    side = phases(2)
    parts = {"attention": (1.0, 1.5), "mlp": (1.0, 2.0)}
    times = times_of(side, compute={"attention": 2.0, "mlp": 4.0}, comm=4.0, weights=parts)
    order = fill_gaps(side, side, times)
    place = order.index(LEFT)
    named = [w for w in order if w.op == "W"]
    left = {Launch("W", i, p) for i in (0, 2, 4, 6) for p in range(2)} - set(named)
    assert 0 < sum(map(times.of, left)) <= 4.0
    # Behind the attention of the forward, before the backward that waits for communication.
    assert order[:place] == [Launch("B", 7), Launch("F", 0)]
    assert order[place + 1] == Launch("B", 6)
    without = [w for w in order if w != LEFT] + sorted(left)
    spans = [predicted_span(o, side, side, times) for o in (order, without)]
    assert spans[0] < 0.97 * spans[1]


def test_little_more_time_does_not_keep_more_in_memory():
    side = phases(2)
    parts = {"attention": (1.25, 1.75), "mlp": (1.5, 2.5)}
    times = times_of(side, compute={"attention": 2.25, "mlp": 6.25}, comm=4.25, weights=parts)
    order = fill_gaps(side, side, times)
    left = {Launch("W", i, p) for i in (0, 2, 4, 6) for p in range(2)} - set(order)
    # Together with the other gradient of that attention it would be 48.0, and 50.0 without any.
    assert left == {Launch("W", 0, 1)}
    assert predicted_span(order, side, side, times) == 48.25


def test_a_weight_that_has_two_gradients_leaves_none():
    side = phases(2)
    parts = {"attention": (1.0, 1.5), "mlp": (1.0, 2.0)}
    times = times_of(side, compute={"attention": 2.0, "mlp": 4.0}, comm=4.0, weights=parts)
    pieces = [Launch("W", i, p) for i in (6, 4, 2, 0) for p in range(2)]
    twice = replace(times, weight_of={w: (w.index % 4, w.part) for w in pieces})
    assert LEFT not in fill_gaps(side, side, twice)
    once = replace(times, weight_of={w: w for w in pieces})
    assert fill_gaps(side, side, once) == fill_gaps(side, side, times)


seconds = st.floats(0.01, 10)


@st.composite
def cases(draw):
    sides = [phases(draw(st.integers(0, 3)), draw(st.booleans())) for _ in range(2)]
    forward, backward = ([draw(seconds) for _ in side] for side in sides)
    weights = [
        tuple(draw(st.lists(seconds, max_size=3))) if phase.stream == "compute" else ()
        for phase in sides[1]
    ]
    times = PairTimes(
        tuple(forward), tuple(backward), tuple(weights), one_queue=draw(st.booleans())
    )
    return *sides, times


@given(cases())
def test_only_weights_move_and_none_is_lost(case):
    forward, backward, times = case
    order = fill_gaps(forward, backward, times)
    turns = interleave(forward, backward, one_queue=times.one_queue)
    assert [x for x in order if x.op not in "WL"] == [x for x in turns if x.op != "W"]
    assert order.count(LEFT) <= 1
    for index, parts in enumerate(times.weights):
        mine = [launch for launch in order if launch.op == "W" and launch.index == index]
        assert all(order.index(w) > order.index(Launch("B", index)) for w in mine)
        if LEFT in order:
            assert all(order.index(w) > order.index(LEFT) for w in mine)
            assert len(mine) == len({launch.part for launch in mine} & set(range(len(parts))))
        elif mine != [Launch("W", index)]:
            assert sorted(launch.part for launch in mine) == list(range(len(parts)))
    if LEFT in order:
        assert sum(map(len, times.weights)) > sum(launch.op == "W" for launch in order)


def test_gradients_of_one_weight_keep_their_order():
    side = phases(2)
    # Longest first would take the last ones of each phase first; both phases have the same weight.
    parts = {"attention": (0.1, 0.5, 1.4), "mlp": (0.2, 0.9, 1.9)}
    times = times_of(side, compute={"attention": 1.9, "mlp": 3.3}, comm=3.9, weights=parts)
    pieces = [Launch("W", i, p) for i in (6, 4, 2, 0) for p in range(3)]
    free = [launch for launch in fill_gaps(side, side, times) if launch.op == "W"]
    assert free != pieces
    times = replace(times, weight_of=dict.fromkeys(pieces, "tied"))
    tied = [launch for launch in fill_gaps(side, side, times) if launch.op == "W"]
    assert tied in (pieces, [Launch("W", i) for i in (6, 4, 2, 0)])


@given(cases())
def test_never_later_than_the_plain_order(case):
    forward, backward, times = case
    order = fill_gaps(forward, backward, times)
    turns = interleave(forward, backward, one_queue=times.one_queue)
    plain = mean_span(turns, forward, backward, times)
    assert mean_span(order, forward, backward, times) <= plain + 1e-9
