"""Layers for tests of the overlap engine, and what their gradients are compared with."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dualpipe_ext.pipeline.launch_order import LEFT, PairTimes, fill_gaps
from dualpipe_ext.pipeline.overlap import Phase
from dualpipe_ext.pipeline.weight_grad import defer_weight_grads

H = 6
LAYER = [("attention", "compute"), ("dispatch", "comm"), ("mlp", "compute"), ("combine", "comm")]


class Layer(nn.Module):
    """Four phases: a residual passes by, integers and a plain object travel along."""

    def __init__(self, *, checkpointed=False):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(H), nn.Linear(H, H)
        self.up, self.down = nn.Linear(H, 2 * H), nn.Linear(2 * H, H, bias=False)
        self.unused = nn.Linear(H, H)
        self.checkpointed = checkpointed

    def _attention(self, x):
        y = x + self.attention(self.norm(x)).tanh()
        order = torch.arange(y.shape[0]).flip(0)
        return y, self.norm(y), order, "handle"

    def _dispatch(self, y, h, order, handle):
        assert handle == "handle"
        # y is returned as it was given, h moves, and a tensor nobody uses is added.
        return y, h[order], order, handle, h * 3

    def _mlp(self, y, h, order, handle, _):
        def expert(rows):
            return self.down(self.up(rows).relu())

        out = checkpoint(expert, h, use_reentrant=False) if self.checkpointed else expert(h)
        return y, out, order, handle

    def _combine(self, y, out, order, _):
        return (y + torch.zeros_like(out).index_add(0, order, out),)

    def phases(self):
        fns = (self._attention, self._dispatch, self._mlp, self._combine)
        return [Phase(name, stream, fn) for (name, stream), fn in zip(LAYER, fns, strict=True)]

    def forward(self, x):
        state = (x,)
        for phase in self.phases():
            state = phase.fn(*state)
        return state[0]


class Stack(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def phases(self):
        return [phase for layer in self.layers for phase in layer.phases()]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def two_layers():
    torch.manual_seed(0)
    return defer_weight_grads(Stack(Layer(), Layer()).double())


def grads_of(module):
    return {name: p.grad for name, p in module.named_parameters()}


def assert_same_grads(a, b, exact):
    assert a.keys() == b.keys()
    for name, grad in a.items():
        assert (grad is None) == (b[name] is None), name
        if grad is None:
            continue
        if exact:
            assert torch.equal(grad, b[name]), name
        else:
            torch.testing.assert_close(grad, b[name], rtol=1e-12, atol=1e-12)


def leaving_order(module):
    """For two layers: an order that leaves weight gradients to the next pair."""
    one_layer = (1.9, 3.9, 3.3, 3.9)
    times = PairTimes(2 * one_layer, 2 * one_layer, 2 * ((1.9,), (), (0.9, 1.9), ()))
    order = fill_gaps(module.phases(), module.phases(), times)
    assert LEFT in order
    return order


class Told:
    """A partition that writes down what it is told."""

    comm_sms = 24

    def __init__(self):
        self.now = []
        self.follow = lambda follower: setattr(self, "set", follower)

    @contextmanager
    def _inside(self, name):
        self.now.append(name)
        yield
        assert self.now.pop() == name

    def step(self):
        return self._inside("step")

    def beside(self):
        return self._inside("beside")
