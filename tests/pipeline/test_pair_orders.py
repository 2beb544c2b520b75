"""Orders that learn: when pairs are timed, when times are used, and what they are."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
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
    """At ``ms`` on the device."""

    def __init__(self, ms):
        self.ms = ms
        self.waited_for = False

    def synchronize(self):
        self.waited_for = True

    def elapsed_time(self, other):
        assert other.waited_for
        return other.ms - self.ms


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


def warmed_up(agree=list, *, one_queue=False):
    orders = PairOrders(agree, one_queue=one_queue)
    for _ in range(WARM_UP):
        order, sample = orders.begin(SIDE, SIDE, may_time=True)
        assert (order, sample) == (interleave(SIDE, SIDE, one_queue=one_queue), None)
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


def test_one_queue_is_reckoned_with():
    orders = warmed_up(one_queue=True)
    for _ in range(NUM_SAMPLES):
        note(orders.begin(SIDE, SIDE, may_time=True)[1])
    order, _ = orders.begin(SIDE, SIDE, may_time=True)
    assert order == fill_gaps(SIDE, SIDE, replace(TIMES, one_queue=True))
    assert order != fill_gaps(SIDE, SIDE, TIMES)


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


class Peers:
    """Ranks that take turns here: each asks with its numbers, and all get the largest."""

    def __init__(self, num_ranks):
        self.barrier = threading.Barrier(num_ranks)
        self.values = [None] * num_ranks

    def of(self, rank):
        def agree(values):
            self.values[rank] = list(values)
            self.barrier.wait(timeout=60)
            found = [max(column) for column in zip(*self.values, strict=True)]
            self.barrier.wait(timeout=60)
            return found

        return agree


def all_orders(run, num_ranks=2):
    """What ``run(rank, orders)`` returns on every rank."""
    peers = Peers(num_ranks)
    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(lambda rank: run(rank, warmed_up(peers.of(rank))), range(num_ranks)))


def test_ranks_take_the_order_of_the_slowest_at_the_same_pair():
    """Each by itself would order otherwise: the first has fast weight gradients."""
    slow = tuple(tuple(100 * w for w in parts) for parts in TIMES.weights)

    def run(rank, orders):
        found = []
        for _ in range(NUM_SAMPLES + 2):
            order, sample = orders.begin(SIDE, SIDE, may_time=True)
            found.append(order)
            if sample is not None:
                note(sample, of=(TIMES.weights, slow)[rank])
        return found

    first, second = all_orders(run)
    assert first == second
    assert first[-1] == fill_gaps(SIDE, SIDE, replace(TIMES, weights=slow))
    assert first[-1] != fill_gaps(SIDE, SIDE, TIMES)
    assert first[NUM_SAMPLES - 1] == interleave(SIDE, SIDE)


@pytest.mark.parametrize(
    "others",
    [
        (TIMES.weights, (*TIMES.weights[:-2], (2,), ())),
        # As many, but not the same.
        (((1,), *TIMES.weights[1:]), (*TIMES.weights[:-2], (2,), ())),
    ],
)
def test_a_rank_with_other_gradients_keeps_all_at_the_plain_order(others):
    def run(rank, orders):
        for _ in range(10 * NUM_SAMPLES):
            order, sample = orders.begin(SIDE, SIDE, may_time=True)
            if sample is not None:
                note(sample, weights=others[rank])
        return order

    assert all_orders(run) == [interleave(SIDE, SIDE)] * 2


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
