"""The overlap engine: launch order, results equal to running F then B, and what crosses a cut."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from dualpipe_ext.pipeline.cut import GradSlot, gradient_root, receive
from dualpipe_ext.pipeline.launch_order import LEFT, interleave
from dualpipe_ext.pipeline.overlap import ChunkGraph, Launcher, Phase, run_pair
from dualpipe_ext.pipeline.pair_orders import PairOrders
from dualpipe_ext.pipeline.stage import LocalStage, overlap
from dualpipe_ext.pipeline.weight_grad import WeightGradStore, defer_weight_grads
from tests.pipeline.layers import (
    LAYER,
    H,
    Layer,
    Stack,
    Told,
    assert_same_grads,
    grads_of,
    leaving_order,
    two_layers,
)


def _phases(layers=1, before=(), after=()):
    rows = [*before, *(row for _ in range(layers) for row in LAYER), *after]
    return [Phase(name, stream, lambda *x: x) for name, stream in rows]


def _names(forward, backward):
    return [
        f"{(forward if op == 'F' else backward)[index].name}({op})"
        for op, index, _ in interleave(forward, backward)
    ]


def test_one_layer_in_the_order_of_deepseeks_profile():
    assert _names(_phases(), _phases()) == [
        *("combine(B)", "attention(F)", "mlp(B)", "dispatch(F)", "dispatch(B)"),
        *("mlp(W)", "mlp(F)", "attention(B)", "attention(W)", "combine(F)"),
    ]


@pytest.mark.parametrize("forward_layers", [1, 2, 3])
@pytest.mark.parametrize("backward_layers", [1, 2, 4])
@pytest.mark.parametrize("ends", [(), (("embedding", "compute"),)])
@pytest.mark.parametrize("tail", [(), (("head", "compute"), ("criterion", "compute"))])
def test_any_lists_keep_their_order_and_overlap(forward_layers, backward_layers, ends, tail):
    forward = _phases(forward_layers, before=ends)
    backward = _phases(backward_layers, before=ends, after=tail)
    order = interleave(forward, backward)
    assert [i for op, i, _ in order if op == "F"] == list(range(len(forward)))
    assert [i for op, i, _ in order if op == "B"] == list(range(len(backward)))[::-1]
    weights = [i for op, i, _ in order if op == "W"]
    assert weights == [i for i, p in reversed(list(enumerate(backward))) if p.stream == "compute"]
    for i in weights:
        assert order.index(("W", i, None)) > order.index(("B", i, None))
    # Every communication has compute of the other side launched next to it, while both last.
    both = order[: max(i for i, launch in enumerate(order) if launch.op == "F") + 1]
    last_b = max((i for i, launch in enumerate(both) if launch.op == "B"), default=0)
    for position, (op, index, _) in enumerate(both[: last_b + 1]):
        phases = forward if op == "F" else backward
        if phases[index].stream == "comm":
            near = both[max(0, position - 3) : position + 4]
            others = [(o, i) for o, i, _ in near if (o == "F") != (op == "F")]
            assert any(
                (forward if o == "F" else backward)[i].stream == "compute" for o, i in others
            )


def test_empty_sides():
    assert [launch.op for launch in interleave(_phases(), [])] == ["F"] * 4
    assert {launch.op for launch in interleave([], _phases())} == {"B", "W"}


def _graph(module, x, *, store=None, record=None, key=0):
    return ChunkGraph(
        module.phases(),
        (x,),
        (True,),
        launcher=Launcher(x.device, record),
        store=store or WeightGradStore(),
        key=key,
    )


@pytest.mark.parametrize("checkpointed", [False, True])
def test_phases_equal_the_module(checkpointed):
    torch.manual_seed(0)
    module = defer_weight_grads(Layer(checkpointed=checkpointed).double())
    plain = copy.deepcopy(module)
    x, grad = torch.randn(5, H).double(), torch.randn(5, H).double()
    leaf = x.clone().requires_grad_()
    y = plain(leaf)
    y.backward(grad)

    graph = _graph(module, x)
    graph.forward()
    (out,), (needs_grad,) = graph.take_outputs()
    assert needs_grad
    assert not out.requires_grad
    assert torch.equal(out, y)
    graph.start_backward([grad])
    graph.backward(defer=False)
    (input_grad,) = graph.take_input_grads()
    torch.testing.assert_close(input_grad, leaf.grad, rtol=1e-12, atol=1e-12)
    assert_same_grads(grads_of(module), grads_of(plain), exact=False)


@pytest.mark.parametrize(("forward_layers", "backward_layers"), [(1, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_pair_equals_forward_then_backward(forward_layers, backward_layers, checkpointed):
    torch.manual_seed(0)
    first = Stack(*(Layer(checkpointed=checkpointed) for _ in range(forward_layers)))
    second = Stack(*(Layer(checkpointed=checkpointed) for _ in range(backward_layers)))
    x, z, grad = (torch.randn(5, H).double() for _ in range(3))
    results, launches = [], []
    for paired in (False, True):
        modules = [defer_weight_grads(copy.deepcopy(m).double()) for m in (first, second)]
        store = WeightGradStore()
        forward = _graph(modules[0], x, store=store, record=launches.append, key="f")
        backward = _graph(modules[1], z, store=store, record=launches.append, key="b")
        backward.forward()
        backward.take_outputs()
        launches.clear()
        backward.start_backward([grad])
        if paired:
            run_pair(forward, backward)
        else:
            forward.forward()
            backward.backward(defer=True)
            backward.weights()
        assert len(store) == 0
        (out,), _ = forward.take_outputs()
        results.append((out, backward.take_input_grads()[0], grads_of(modules[1])))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert_same_grads(results[0][2], results[1][2], exact=True)
    assert launches == _names(first.phases(), second.phases())


@pytest.mark.parametrize("parts_known", [2, 1, 0])
def test_weights_run_where_the_order_has_them(monkeypatch, parts_known):
    """Also if there are more of them than the order knows of."""
    plain = two_layers()
    module = copy.deepcopy(plain)
    x, grad = torch.randn(5, H).double(), torch.randn(5, H).double()
    order = [launch for launch in leaving_order(plain) if launch != LEFT]
    assert any(launch.part == 1 for launch in order)
    order = [launch for launch in order if launch.part is None or launch.part < parts_known]
    monkeypatch.setattr(PairOrders, "begin", lambda *_, **how: (order, None))
    launches, store = [], WeightGradStore()
    for m in (plain, module):
        forward, backward = (_graph(m, x, store=store, key=key) for key in "fb")
        backward.forward()
        backward.take_outputs()
        backward.start_backward([grad])
        backward.launcher._on_launch = forward.launcher._on_launch = launches.append
        if m is plain:
            backward.backward(defer=False)
            launches.clear()
        else:
            run_pair(forward, backward)
    assert len(store) == 0
    assert_same_grads(grads_of(module), grads_of(plain), exact=True)
    # attention has one weight that waits, mlp two.
    assert sum(name == "mlp(W)" for name in launches) == (4 if parts_known else 2)


def test_only_pairs_run_beside_communication():
    told, places = Told(), []
    launcher = Launcher(torch.device("cpu"), lambda name: places.append(tuple(told.now)), told)
    module, store = defer_weight_grads(Layer().double()), WeightGradStore()
    x = torch.randn(4, H).double()
    graphs = [
        ChunkGraph(module.phases(), (x,), (True,), launcher=launcher, store=store, key=key)
        for key in range(2)
    ]
    graphs[0].forward()
    graphs[0].take_outputs()
    assert set(places) == {()}
    places.clear()
    graphs[0].start_backward([x])
    with launcher.step():
        run_pair(graphs[1], graphs[0])
    assert set(places) == {("step", "beside")}
    assert len(places) == len(_names(graphs[1].phases, graphs[0].phases))
    places.clear()
    graphs[1].take_outputs()
    graphs[1].start_backward([x])
    graphs[1].backward(defer=True)
    graphs[1].weights()
    assert set(places) == {()}


def test_launch_orders_belong_to_a_number_of_sms():
    told = Told()
    launcher = Launcher(torch.device("cpu"), partition=told)
    with_24 = launcher.orders
    told.set(8)
    with_8 = launcher.orders
    assert with_8 is not with_24
    told.set(24)
    assert launcher.orders is with_24
    told.set(8)
    assert launcher.orders is with_8


def test_launch_orders_belong_to_stages(monkeypatch):
    """Also if their phases have the same names."""
    asked, store = [], WeightGradStore()
    plain = PairOrders.begin

    def begin(self, *sides, **how):
        asked.append(how["stages"])
        return plain(self, *sides, **how)

    monkeypatch.setattr(PairOrders, "begin", begin)
    launcher = Launcher(torch.device("cpu"))
    first, second = (LocalStage(Layer().double(), launcher, store) for _ in range(2))
    x = torch.randn(3, H).double()
    for forward, backward in ((first, second), (second, first), (first, second)):
        ahead, back = (s.begin((x,), (True,), key=s) for s in (forward, backward))
        back.forward()
        back.take_outputs()
        back.start_backward([x])
        how = {"criterion": None, "labels": (), "backward_has_loss": False}
        overlap(forward, ahead, backward, back, **how)
    assert asked[0] == asked[2] != asked[1]


def test_input_only_backward_then_weights():
    torch.manual_seed(0)
    module = defer_weight_grads(Layer().double())
    plain = copy.deepcopy(module)
    x, grad = torch.randn(5, H).double(), torch.randn(5, H).double()
    launches, store = [], WeightGradStore()
    for m, defer in ((plain, False), (module, True)):
        graph = _graph(m, x, store=store, record=launches.append)
        graph.forward()
        graph.take_outputs()
        graph.start_backward([grad])
        launches.clear()
        graph.backward(defer=defer)
    assert module.up.weight.grad is None
    assert module.up.bias.grad is not None
    graph.weights()
    assert launches == [
        *("combine(B)", "mlp(B)", "dispatch(B)", "attention(B)"),
        *("mlp(W)", "attention(W)"),
    ]
    assert_same_grads(grads_of(module), grads_of(plain), exact=True)


def test_no_gradient_to_pass_back():
    """No gradient arrives, or the stage's input wants none."""
    module = Layer().double()
    x = torch.randn(3, H).double()
    graph = _graph(module, x)
    graph.forward()
    graph.take_outputs()
    graph.start_backward([None])
    graph.backward(defer=True)
    assert graph.take_input_grads() == [None]
    assert all(grad is None for grad in grads_of(module).values())

    graph = ChunkGraph(
        module.phases(),
        (x,),
        (False,),
        launcher=Launcher(x.device),
        store=WeightGradStore(),
        key=0,
    )
    graph.forward()
    graph.take_outputs()
    graph.start_backward([x])
    graph.backward(defer=False)
    assert graph.take_input_grads() == [None]
    assert module.attention.weight.grad is not None


def test_changed_in_place():
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    phases = [
        Phase("a", "compute", lambda x: (x * 1, x * 2)),
        Phase("b", "compute", lambda y, z: (y.mul_(weight), z)),
        Phase("c", "compute", lambda y, z: (y * z,)),
    ]
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    graph = ChunkGraph(
        phases, (x,), (True,), launcher=Launcher(x.device), store=WeightGradStore(), key=0
    )
    graph.forward()
    graph.take_outputs()
    graph.start_backward([torch.ones_like(x)])
    graph.backward(defer=False)
    assert torch.equal(weight.grad, 2 * x * x)
    assert torch.equal(graph.take_input_grads()[0], 4 * x)


def test_same_tensor_twice_and_stage_that_returns_its_input():
    phases = [Phase("a", "compute", lambda x: (x, x, x * 2))]
    x = torch.ones(2)
    graph = ChunkGraph(
        phases, (x,), (True,), launcher=Launcher(x.device), store=WeightGradStore(), key=0
    )
    graph.forward()
    _, needs_grad = graph.take_outputs()
    assert needs_grad == (True, True, True)
    graph.start_backward([torch.ones(2) * g for g in (1.0, 10.0, 100.0)])
    graph.backward(defer=False)
    assert torch.equal(graph.take_input_grads()[0], torch.full((2,), 211.0))


def test_without_grad_nothing_is_recorded():
    module = Layer().double()
    with torch.no_grad():
        graph = _graph(module, torch.randn(3, H).double())
        graph.forward()
        (out,), needs_grad = graph.take_outputs()
    assert not out.requires_grad
    assert needs_grad == (False,)


def test_outputs_and_boundaries_are_not_kept_alive():
    """The sum of a residual saves nothing, so nothing of it may outlive its users."""
    alive = {}

    def watch(name, tensor):
        alive[name] = weakref.ref(tensor.untyped_storage())
        return tensor

    phases = [
        Phase("a", "compute", lambda x: (watch("boundary", x + 1),)),
        Phase("b", "comm", lambda y: (watch("output", y + 1), watch("saved", y.exp()))),
    ]
    x = torch.zeros(3)
    graph = ChunkGraph(
        phases, (x,), (True,), launcher=Launcher(x.device), store=WeightGradStore(), key=0
    )
    graph.forward()
    outputs, _ = graph.take_outputs()
    del outputs
    gc.collect()
    assert alive["boundary"]() is None
    assert alive["output"]() is None
    assert alive["saved"]() is not None, "exp needs its result for its backward"
    graph.start_backward([torch.ones(3), torch.ones(3)])
    graph.backward(defer=False)
    torch.testing.assert_close(graph.take_input_grads()[0], 1 + torch.ones(3).exp())


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 3)])
def test_stub_stands_for_a_tensor_that_is_gone(shape):
    slot = GradSlot()
    x = receive(torch.randn(shape), slot)
    stub = gradient_root(x * 3, as_tensor=True)
    assert stub.shape == x.shape
    assert stub.untyped_storage().nbytes() <= 4
    torch.autograd.backward((stub,), (torch.ones(shape),))
    assert torch.equal(slot.take(), torch.full(shape, 3.0))
    assert slot.take() is None


def test_bad_phases():
    with pytest.raises(ValueError, match="'compute' or 'comm', got 'gpu'"):
        Phase("a", "gpu", lambda x: (x,))
    x = torch.zeros(2)
    graph = ChunkGraph(
        [Phase("a", "compute", lambda x: x)],
        (x,),
        (True,),
        launcher=Launcher(x.device),
        store=WeightGradStore(),
        key=0,
    )
    with pytest.raises(ValueError, match="expected phase 'a' to return a tuple, got Tensor"):
        graph.forward()
