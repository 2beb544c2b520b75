"""Deferred weight gradients: nothing changes but when they are computed."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dualpipe_ext.memory import in_fp8, recomputed
from dualpipe_ext.pipeline import weight_grad
from dualpipe_ext.pipeline.fp8_linear import grouped_linear_fp8
from dualpipe_ext.pipeline.weight_grad import (
    WeightGradStore,
    defer_weight_grads,
    grouped_linear,
    linear,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def experts(x, w):
    return grouped_linear(x, w, torch.tensor([2, 2, 9], dtype=torch.int32))


def experts_fp8(x, w):
    return grouped_linear_fp8(x, w, torch.tensor([2, 2, 9], dtype=torch.int32))


def _grads(fn, *tensors):
    for t in tensors:
        t.grad = None
    fn().square().sum().backward()
    return [None if t.grad is None else t.grad.clone() for t in tensors]


def _leaves(dtype, *shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(6,), (2, 3), (), (0,)])
def test_linear_equals_torch(dtype, lead):
    x, w, b = _leaves(dtype, (*lead, 5), (4, 5), (4,))
    assert torch.equal(linear(x, w, b), F.linear(x, w, b))
    expected = _grads(lambda: F.linear(x, w, b), x, w, b)
    for got, want in zip(_grads(lambda: linear(x, w, b), x, w, b), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_deferred_weight_gradient_arrives_with_its_w(dtype):
    x, w, b = _leaves(dtype, (6, 5), (4, 5), (4,))
    expected = _grads(lambda: linear(x, w, b), x, w, b)
    store = WeightGradStore()
    with store.deferring("chunk"):
        early = _grads(lambda: linear(x, w, b), x, w, b)
    assert torch.equal(early[0], expected[0])
    assert early[1] is None
    assert torch.equal(early[2], expected[2])
    assert len(store) == 1
    store.run("chunk")
    assert torch.equal(w.grad, expected[1])
    assert len(store) == 0


def test_deferred_gradients_accumulate_and_run_hooks():
    x, w = _leaves(torch.float64, (6, 5), (4, 5))
    store = WeightGradStore()
    for key in range(2):
        with store.deferring(key):
            linear(x, w).sum().backward()
    calls = []
    w.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.clone()))
    store.run(1)
    buffer = w.grad
    store.run(0)
    assert w.grad is buffer, "the second gradient must be added in place"
    assert len(calls) == 2
    assert torch.equal(calls[1], 2 * calls[0])


LAYERS = [(linear, (4, 8)), (experts, (3, 8, 4)), (experts_fp8, (3, 128, 128))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=["linear", "grouped", "fp8"])
@pytest.mark.parametrize("deferred", [False, True], ids=["at-once", "deferred"])
def test_gradients_are_added_in_place_with_the_bits_of_autograd(dtype, layer, shape, deferred):
    x, w = _leaves(dtype, (9, shape[-2] if len(shape) == 3 else shape[1]), shape)
    store = WeightGradStore()

    def backward(key):
        if key is None:
            layer(x, w).square().sum().backward()
            return
        with store.deferring(key) if deferred else store.at_once():
            layer(x, w).square().sum().backward()
        if deferred:
            store.run(key)

    totals = []
    for keys in ((None, None), (1, 2)):
        w.grad = None
        backward(keys[0])
        first, version = w.grad, w.grad._version
        backward(keys[1])
        assert w.grad is first
        assert w.grad._version > version
        totals.append(w.grad)
    assert torch.equal(*totals)
    assert totals[0].any()


@pytest.mark.parametrize("deferred", [False, True], ids=["at-once", "deferred"])
def test_a_weight_with_hooks_gets_its_gradient_from_autograd(deferred):
    x, w = _leaves(torch.float64, (9, 8), (3, 8, 4))
    experts(x, w).sum().backward()
    want, w.grad, store, seen = 4 * w.grad, None, WeightGradStore(), []
    w.register_hook(lambda grad: 2 * grad)
    w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    for key in range(2):
        with store.deferring(key) if deferred else store.at_once():
            experts(x, w).sum().backward()
        store.run(key)
    assert torch.equal(w.grad, want)
    assert torch.equal(seen[-1], want)


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
@pytest.mark.parametrize("way", ["parameter", "gradient"])
def test_unusual_strides_keep_autograds_layout(way):
    x, w = _leaves(torch.float64, (9, 8), (4, 8))
    if way == "parameter":
        w = w.detach().t().contiguous().t().requires_grad_()
    else:
        w.grad = torch.ones(8, 4, dtype=torch.float64).t()
    store = WeightGradStore()
    for _ in range(2):
        with store.at_once():
            linear(x, w).sum().backward()
    assert w.grad.stride() == (1, 4)
    want = 2 * x.detach().sum(0).expand(4, 8) + (way == "gradient")
    torch.testing.assert_close(w.grad, want)


@pytest.mark.parametrize("at_once", [False, True], ids=["outside", "at-once"])
def test_a_backward_for_values_or_for_other_leaves_does_not_add(at_once):
    x, w = _leaves(torch.float64, (9, 8), (3, 8, 4))
    w.grad = torch.ones_like(w)
    store = WeightGradStore()
    with store.at_once():
        experts(x, w).sum().backward()
    was = w.grad.clone()
    with store.at_once() if at_once else nullcontext():
        (found,) = torch.autograd.grad(experts(x, w).sum(), w)
        experts(x, w).sum().backward(inputs=[x])
    assert torch.equal(found + 1, was)
    assert torch.equal(w.grad, was)


@pytest.mark.parametrize("deferred", [False, True], ids=["at-once", "deferred"])
def test_a_gradient_of_another_dtype_stays_what_it_is(deferred):
    x, w = _leaves(torch.bfloat16, (9, 8), (3, 8, 4))
    if not hasattr(w, "grad_dtype"):
        pytest.skip("this torch has gradients in the dtype of the leaf only")
    w.grad_dtype = torch.float32
    store = WeightGradStore()
    for key in range(2):
        with store.deferring(key) if deferred else store.at_once():
            experts(x, w).sum().backward()
        store.run(key)
    assert w.grad.dtype == torch.float32
    want = 2 * torch.autograd.grad(experts(x, w).sum(), w)[0].float()
    torch.testing.assert_close(w.grad, want)


@pytest.mark.parametrize("deferred", [False, True], ids=["at-once", "deferred"])
def test_a_weight_frozen_after_its_forward_gets_nothing(deferred):
    x, w = _leaves(torch.float64, (9, 8), (3, 8, 4))
    store = WeightGradStore()
    y = experts(x, w).sum()
    if not deferred:
        w.requires_grad_(False)
    with store.deferring(0) if deferred else store.at_once():
        y.backward()
    w.requires_grad_(False)
    store.run(0)
    assert w.grad is None
    assert x.grad is not None


def test_users_of_at_once_may_end_in_any_order():
    first, second = WeightGradStore().at_once(), WeightGradStore().at_once()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert weight_grad._accumulating == 0


def test_a_checkpoint_of_a_compiled_layer():
    x, w = _leaves(torch.float64, (9, 8), (4, 8))
    want = torch.autograd.grad(linear(x, w).square().sum(), w)[0]
    layer = torch.compile(linear, backend="aot_eager")
    store = WeightGradStore()
    with store.at_once():
        checkpoint(layer, x, w, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(w.grad, want)


def test_at_once_ends_after_an_error():
    x, w = _leaves(torch.float64, (9, 8), (3, 8, 4))
    with pytest.raises(RuntimeError, match="boom"), WeightGradStore().at_once():
        raise RuntimeError("boom")
    assert torch.autograd.grad(experts(x, w).sum(), w)[0] is not None
    assert w.grad is None


def test_computed_weight_is_not_deferred():
    x, base = _leaves(torch.float64, (6, 5), (4, 5))
    store = WeightGradStore()
    with store.deferring(0):
        linear(x, base * 2).sum().backward()
    store.run(0)
    torch.testing.assert_close(base.grad, 2 * x.detach().sum(0).expand(4, 5))


def test_frozen_weight_and_input_without_gradient():
    x, w = _leaves(torch.float64, (6, 5), (4, 5))
    store = WeightGradStore()
    with store.deferring(0):
        linear(x, w.detach()).sum().backward()
        assert x.grad is not None
        linear(x.detach(), w).sum().backward()
    store.run(0)
    torch.testing.assert_close(w.grad, x.detach().sum(0).expand(4, 5))
    with torch.no_grad():
        assert not linear(x, w).requires_grad


def test_deferring_ends_after_an_error():
    store = WeightGradStore()
    with pytest.raises(RuntimeError, match="boom"), store.deferring(0):
        raise RuntimeError("boom")
    x, w = _leaves(torch.float64, (6, 5), (4, 5))
    linear(x, w).sum().backward()
    assert w.grad is not None


@pytest.mark.parametrize("deferred", [False, True])
def test_activation_checkpointing(deferred):
    layer = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    plain = copy.deepcopy(layer)
    defer_weight_grads(layer)
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    plain(x).square().sum().backward()
    expected, x.grad = x.grad, None
    store = WeightGradStore()
    y = checkpoint(layer, x, use_reentrant=False)
    if deferred:
        with store.deferring(0):
            y.square().sum().backward()
        assert layer[0].weight.grad is None
        store.run(0)
    else:
        y.square().sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-13, atol=1e-13)
    for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-13, atol=1e-13)


def test_autocast_like_torch():
    x, w, b = _leaves(torch.float32, (6, 5), (4, 5), (4,))
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(x, w, b)
        got = linear(x, w, b)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, expected)
    want = _grads(lambda: expected, x, w, b)
    store = WeightGradStore()
    with store.deferring(0):
        have = _grads(lambda: got, x, w, b)
    store.run(0)
    assert w.grad.dtype == torch.float32
    for a, c in zip([have[0], w.grad, have[2]], want, strict=True):
        torch.testing.assert_close(a, c, rtol=2**-6, atol=2**-6)


def test_defer_weight_grads_changes_only_plain_linears():
    class Own(nn.Linear):
        pass

    module = nn.Sequential(nn.Linear(5, 4), Own(4, 4), nn.Sequential(nn.Linear(4, 2, bias=False)))
    keys, weight = list(module.state_dict()), module[0].weight
    x = torch.randn(3, 5)
    expected = module(x)
    assert defer_weight_grads(module) is module
    assert list(module.state_dict()) == keys
    assert module[0].weight is weight
    assert type(module[1]) is Own
    assert torch.equal(module(x), expected)
    store = WeightGradStore()
    with store.deferring(0):
        module(x).sum().backward()
    has_grad = {name for name, p in module.named_parameters() if p.grad is not None}
    assert has_grad == {"0.bias", "1.weight", "1.bias"}
    copied = copy.deepcopy(module)
    assert torch.equal(copied(x), expected)
    assert copied[0].weight is not weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ends", [[2, 2, 7], [0, 0, 0], [3, 6, 9]])
def test_grouped_linear(dtype, ends):
    x, w = _leaves(dtype, (9, 8), (3, 8, 16))
    offsets = torch.tensor(ends, dtype=torch.int32)

    def by_hand():
        rows = [x[a:b] @ w[g] for g, (a, b) in enumerate(zip([0, *ends], ends, strict=False))]
        return torch.cat([*rows, (x[ends[-1] :] @ w[0]) * 0])

    torch.testing.assert_close(grouped_linear(x, w, offsets), by_hand())
    expected = _grads(by_hand, x, w)
    tolerance = {"rtol": 2**-6, "atol": 2**-6} if dtype == torch.bfloat16 else {}
    now = _grads(lambda: grouped_linear(x, w, offsets), x, w)
    for got, want in zip(now, expected, strict=True):
        torch.testing.assert_close(got, want, **tolerance)
    store = WeightGradStore()
    with store.deferring(0):
        later = _grads(lambda: grouped_linear(x, w, offsets), x, w)
    assert later[1] is None
    store.run(0)
    assert torch.equal(w.grad, now[1])
    assert torch.equal(later[0], now[0])


class Counted:
    """A function that says how often it was called, and when."""

    def __init__(self, fn):
        self.fn, self.calls = fn, 0

    def __call__(self, *args):
        self.calls += 1
        return self.fn(*args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_input_computed_again_gives_the_same_bits(dtype):
    base, w, b = _leaves(dtype, (2, 6, 5), (4, 5), (4,))
    fn = Counted(torch.tanh)

    def layer(keep):
        x = torch.tanh(base)
        return linear(x, w, b, kept=recomputed(fn, base) if keep else None)

    expected = _grads(lambda: layer(False), base, w, b)
    assert fn.calls == 0
    for got, want in zip(_grads(lambda: layer(True), base, w, b), expected, strict=True):
        assert torch.equal(got, want)
    assert fn.calls == 1
    # Not needed for the gradient of the input alone.
    w.requires_grad_(False)
    layer(True).sum().backward()
    assert fn.calls == 1


@pytest.mark.parametrize(("narrow", "waits"), [(False, True), (True, False)])
def test_what_waits_for_its_w_is_the_smaller(narrow, waits):
    base, w = _leaves(torch.float64, (6, 8 if narrow else 4), (3, 4))
    fn = Counted(lambda t: t[:, :4].tanh())
    store = WeightGradStore()
    x = base[:, :4].tanh()
    y = linear(x, w, kept=recomputed(fn, base))
    with store.deferring(0):
        y.sum().backward()
    # From 4 values of a row the input is restored in its W; it is smaller than 8, and so waits.
    assert fn.calls == (0 if waits else 1)
    store.run(0)
    assert fn.calls == 1
    expected = torch.ones(6, 3, dtype=torch.float64).t() @ x.detach()
    torch.testing.assert_close(w.grad, expected)


def test_what_is_kept_dies_with_the_backward():
    base, w = _leaves(torch.float64, (6, 4), (3, 4))
    h = base * 2
    y = linear(h.tanh(), w, kept=recomputed(torch.tanh, h))
    storage = weakref.ref(h.untyped_storage())
    del h
    gc.collect()
    assert storage() is not None
    y.sum().backward()
    gc.collect()
    assert storage() is None, "y is still there, but its graph needs nothing any more"


def test_fp8_input_only_touches_the_weight_gradient():
    x, w = _leaves(torch.float64, (9, 128), (3, 128, 5))
    offsets = torch.tensor([4, 4, 9], dtype=torch.int32)
    exact = _grads(lambda: grouped_linear(x, w, offsets), x, w)
    found = _grads(lambda: grouped_linear(x, w, offsets, kept=in_fp8(x)), x, w)
    assert torch.equal(found[0], exact[0])
    # |x^ - x| as in_fp8 promises it, summed up over the rows of a group with the gradient's
    # magnitude.
    amax = x.detach().abs().amax(1, keepdim=True)
    error = 2.0**-4 * x.detach().abs() + 2.0**-10 * amax / 448 + 2.0**-21 * amax
    grad = 2 * grouped_linear(x, w, offsets).detach().abs()
    for group, (start, end) in enumerate([(0, 4), (4, 4), (4, 9)]):
        bound = error[start:end].t() @ grad[start:end]
        assert ((found[1][group] - exact[1][group]).abs() <= bound).all()
    assert not torch.equal(found[1], exact[1])


def test_computing_in_another_dtype():
    x, w = _leaves(torch.bfloat16, (6, 5), (4, 5))
    y = linear(x, w, dtype=torch.float32)
    assert torch.equal(y, F.linear(x.float(), w.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, w, dtype=torch.float32).dtype == torch.float32
    plain = _grads(lambda: linear(x, w, dtype=torch.float32), x, w)
    again = recomputed(lambda t: t, x)  # kept in bfloat16, half of what plain keeps
    kept = _grads(lambda: linear(x, w, dtype=torch.float32, kept=again), x, w)
    for got, want in zip(kept, plain, strict=True):
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, want)


@pytest.mark.parametrize("deferred", [False, True])
def test_a_limit_is_asked_for_at_every_product(deferred, monkeypatch):
    limits, asked = [], iter((7, 8, 9))
    for name in ("grouped_mm", "grouped_mm_weight_grad"):
        real = getattr(weight_grad, name)

        def limited(*args, real=real, max_sms, **kwargs):
            limits.append(max_sms)
            return real(*args, **kwargs)

        monkeypatch.setattr(weight_grad, name, limited)
    x, w = _leaves(torch.float32, (5, 3), (2, 3, 4))
    store = WeightGradStore()
    offsets = torch.tensor([2, 5], dtype=torch.int32)
    out = grouped_linear(x, w, offsets, max_sms=lambda: next(asked))
    assert limits == [7]
    if deferred:
        with store.deferring("key"):
            out.sum().backward()
        assert limits == [7, 8]
        store.run("key")
    else:
        out.sum().backward()
    assert limits == [7, 8, 9]
