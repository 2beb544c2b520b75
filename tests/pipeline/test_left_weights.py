"""Weight gradients that pairs leave to each other: where they run, and that none is lost."""

from __future__ import annotations

import copy

import pytest
import torch

from dualpipe_ext.pipeline.launch_order import LEFT, Launch, interleave
from dualpipe_ext.pipeline.overlap import ChunkGraph, Launcher, run_pair
from dualpipe_ext.pipeline.pair_orders import PairOrders
from dualpipe_ext.pipeline.weight_grad import WeightGradStore
from tests.pipeline.layers import H, Told, assert_same_grads, grads_of, leaving_order, two_layers


class Chain:
    """Pairs in a row: the forward of each chunk beside the backward of the one before."""

    def __init__(self, module, record, partition=None):
        self.module, self.store = module, WeightGradStore()
        self.launcher = Launcher(torch.device("cpu"), record, partition)
        self.waiting = None

    def begin(self, number):
        torch.manual_seed(number)
        self.grad = torch.randn(5, H).double()
        return ChunkGraph(
            self.module.phases(),
            (torch.randn(5, H).double(),),
            (True,),
            launcher=self.launcher,
            store=self.store,
            key=number,
        )

    def first(self):
        self.waiting = self.begin(0)
        self.waiting.forward()
        self.waiting.take_outputs()

    def backward_of_last(self):
        self.waiting.start_backward([self.grad])
        self.waiting.backward(defer=True)
        self.waiting.weights()

    def pair(self, number, *, overlapped):
        graph = self.begin(number)
        self.waiting.start_backward([self.grad])
        if overlapped:
            run_pair(graph, self.waiting)
        else:
            graph.forward()
            self.waiting.backward(defer=True)
            self.waiting.weights()
        graph.take_outputs()
        self.waiting.take_input_grads()
        self.waiting = graph


def _chains(monkeypatch, *, num_pairs=3, orders=None):
    """One that runs serially, and one in pairs that leave weight gradients to each other."""
    module = two_layers()
    orders = orders or [leaving_order(module)] * num_pairs
    given = iter(orders)
    monkeypatch.setattr(PairOrders, "begin", lambda *_, **how: (next(given), None))
    launches = []
    chains = [Chain(copy.deepcopy(module), launches.append) for _ in range(2)]
    for chain in chains:
        chain.first()
        launches.clear()
        for number in range(num_pairs):
            chain.pair(number + 1, overlapped=chain is chains[1])
    return *chains, launches


def test_weight_gradients_are_left_to_the_next_pair(monkeypatch):
    serial, paired, launches = _chains(monkeypatch)
    module = serial.module
    order = leaving_order(module)
    weights = [Launch("W", i, p) for i, num in ((6, 2), (4, 1), (2, 2), (0, 1)) for p in range(num)]
    left = [w for w in weights if w not in order]
    place = order.index(LEFT)
    phases = module.phases()

    def names(of):
        return [f"{phases[launch.index].name}({launch.op})" for launch in of]

    ahead, behind = names(order[:place]), names(order[place + 1 :])
    assert launches == [*ahead, *behind, *(2 * [*ahead, *names(left), *behind])]
    assert len(paired.store) > 0
    paired.launcher.settle()
    assert len(paired.store) == 0
    # Also the order in which gradients are added up is that of the chunks.
    assert_same_grads(grads_of(paired.module), grads_of(module), exact=True)


@pytest.mark.parametrize("then", ["backward", "forward", "weights", "pair"])
def test_what_follows_first_catches_up(monkeypatch, then):
    module = two_layers()
    leaving, plain = leaving_order(module), interleave(module.phases(), module.phases())
    serial, paired, launches = _chains(monkeypatch, num_pairs=1, orders=[leaving, plain])
    assert len(paired.store) > 0
    for chain in (serial, paired):
        launches.clear()
        if then == "forward":
            chain.begin(7).forward()
        elif then == "pair":
            chain.pair(2, overlapped=chain is paired)
        elif then == "weights":
            chain.begin(7).weights()
        else:
            chain.backward_of_last()
    assert launches[0].endswith("(W)")
    assert len(paired.store) == 0
    assert_same_grads(grads_of(paired.module), grads_of(serial.module), exact=True)


def test_a_step_that_fails_leaves_nothing(monkeypatch):
    _, paired, launches = _chains(monkeypatch, num_pairs=1)
    launches.clear()
    paired.launcher.forget_left()
    paired.launcher.settle()
    assert launches == []


def test_what_pairs_leave_runs_as_if_beside_communication(monkeypatch):
    told, places, module = Told(), [], two_layers()
    order = leaving_order(module)
    monkeypatch.setattr(PairOrders, "begin", lambda *_, **how: (order, None))
    chain = Chain(module, lambda name: places.append((name[-3:], *told.now)), told)
    chain.first()
    chain.pair(1, overlapped=True)
    places.clear()
    chain.backward_of_last()
    ahead = places[: places.index(("(B)",))]
    assert ahead
    assert set(ahead) == {("(W)", "beside")}
    assert set(places[len(ahead) :]) == {("(B)",), ("(W)",)}
