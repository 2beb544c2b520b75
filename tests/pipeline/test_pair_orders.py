"""Orders that learn: when pairs are timed, when times are used, and what they are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dualpipe_ext.pipeline.launch_order import Launch, PairTimes, fill_gaps, interleave
from dualpipe_ext.pipeline.overlap import Phase
from dualpipe_ext.pipeline.pair_orders import NUM_SAMPLES, WARM_UP, PairOrders

SIDE = [
    Phase(name, stream, tuple)
    for name, stream in 2 * (("a", "compute"), ("d", "comm"), ("e", "compute"), ("c", "comm"))
]
TIMES = PairTimes(
    forward=2 * (2, 4, 3, 4),
    backward=2 * (2, 4, 3, 4),
    weights=2 * ((1, 1), (), (2, 1), ()),
)


class Event:
    """At ``ms`` on the device, which has got to ``Event.now``."""

    now = float("inf")

    def __init__(self, ms):
        self.ms = ms

    def query(self):
        return Event.now >= self.ms

    def elapsed_time(self, other):
        return other.ms - self.ms


@pytest.fixture(autouse=True)
def _device_is_ahead():
    Event.now = float("inf")


def test_kinds_without_a_fixed_number_of_gradients_stay_plain():
    orders = warmed_up()
    fewer = (*TIMES.weights[:-2], (2,), ())
    sampled = 0
    for number in range(100):
        order, sample = orders.begin(SIDE, SIDE, may_time=True)
        assert order == interleave(SIDE, SIDE)
        if sample is not None:
            sampled += 1
            note(sample, weights=(TIMES.weights, fewer)[number % 2])
    assert sampled == 3 * NUM_SAMPLES


def note(sample, *, begin=0.0, factor=1.0, weights=TIMES.weights, of=None):
    times = TIMES if of is None else replace(TIMES, weights=of)
    launches = [Launch(op, index) for op in "FB" for index in range(len(SIDE))]
    launches += [
        Launch("W", i, part) for i, parts in enumerate(weights) for part, _ in enumerate(parts)
    ]
    for launch in launches:
        ms = 1e3 * factor * times.of(launch)
        sample.add(launch, Event(begin), Event(begin + ms))


def warmed_up(**how):
    orders = PairOrders()
    for _ in range(WARM_UP):
        order, sample = orders.begin(SIDE, SIDE, may_time=True)
        assert (order, sample) == (interleave(SIDE, SIDE), None)
    return orders


def test_the_median_of_the_samples_decides():
    orders = warmed_up()
    for factor in (1.0, 1000.0, 1.0)[:NUM_SAMPLES]:
        order, sample = orders.begin(SIDE, SIDE, may_time=True)
        assert order == interleave(SIDE, SIDE)
        note(sample, factor=factor)
    order, sample = orders.begin(SIDE, SIDE, may_time=True)
    assert sample is None
    assert order == fill_gaps(SIDE, SIDE, TIMES) != interleave(SIDE, SIDE)
    assert orders.begin(SIDE, SIDE, may_time=False) == (order, None)
    # Pairs of other phases are pairs of their own.
    assert orders.begin(SIDE[:2], SIDE, may_time=True)[0] == interleave(SIDE[:2], SIDE)
    orders.forget()
    assert orders.begin(SIDE, SIDE, may_time=True)[0] == interleave(SIDE, SIDE)


def test_stages_of_equal_names_have_orders_of_their_own():
    """Here the second stage's weight gradients take much longer than anything else."""
    times = {
        "first": TIMES.weights,
        "second": tuple(tuple(100 * w for w in parts) for parts in TIMES.weights),
    }
    kinds = [(forward, backward) for forward in times for backward in times]
    orders, learned = PairOrders(), {}
    for _ in range(WARM_UP + NUM_SAMPLES + 1):
        for stages in kinds:
            order, sample = orders.begin(SIDE, SIDE, may_time=True, stages=stages)
            learned[stages] = order
            if sample is not None:
                note(sample, weights=TIMES.weights, of=times[stages[1]])
    for stages in kinds:
        own = replace(TIMES, weights=times[stages[1]])
        assert learned[stages] == fill_gaps(SIDE, SIDE, own), stages
    assert learned["first", "first"] != learned["first", "second"]


def test_nobody_waits_for_the_device():
    orders = warmed_up()
    for _ in range(NUM_SAMPLES):
        note(orders.begin(SIDE, SIDE, may_time=True)[1], begin=100.0)
    Event.now = 100.0
    for _ in range(5):
        assert orders.begin(SIDE, SIDE, may_time=True) == (interleave(SIDE, SIDE), None)
    Event.now = 1e9
    assert orders.begin(SIDE, SIDE, may_time=True)[0] == fill_gaps(SIDE, SIDE, TIMES)


def test_what_cannot_be_timed_stays_plain():
    orders = PairOrders()
    for _ in range(20):
        assert orders.begin(SIDE, SIDE, may_time=False) == (interleave(SIDE, SIDE), None)


def test_samples_of_other_gradients_are_taken_again():
    orders = warmed_up()
    fewer = (*TIMES.weights[:-2], (2,), ())
    for weights in (TIMES.weights, fewer, TIMES.weights):
        note(orders.begin(SIDE, SIDE, may_time=True)[1], weights=weights)
    assert orders.begin(SIDE, SIDE, may_time=True) == (interleave(SIDE, SIDE), None)
    for _ in range(NUM_SAMPLES):
        note(orders.begin(SIDE, SIDE, may_time=True)[1])
    assert orders.begin(SIDE, SIDE, may_time=True)[0] == fill_gaps(SIDE, SIDE, TIMES)
