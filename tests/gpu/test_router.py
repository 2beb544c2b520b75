"""The router kernels on a GPU: the indices of the composed torch operations, at real sizes."""

from __future__ import annotations

import pytest
import torch
from dualpipe_ext.kernels.router import choose_experts, route

from dualpipe_ext.eplb import Placement, select_replicas

# (tokens, experts, groups, chosen groups, top-k); DeepSeek-V3's first.
SHAPES = [(4096, 256, 8, 4, 8), (4099, 160, 8, 3, 6), (2048, 64, 1, 1, 6), (777, 4096, 16, 8, 64)]


def inputs(tokens, experts, *, tied=False):
    generator = torch.Generator("cuda").manual_seed(0)
    logits = 2 * torch.randn(tokens, experts, device="cuda", generator=generator)
    bias = 0.3 * torch.randn(experts, device="cuda", generator=generator)
    return (logits.round(), bias.mul(4).round()) if tied else (logits, bias)


def rules_of(shape):
    return dict(zip(("num_groups", "top_groups", "top_k"), shape[2:], strict=True))


def crowded_placement(experts):
    """One slot for each expert and as many again for the first eighth of them."""
    slots = torch.cat([torch.arange(experts), torch.arange(experts) % (experts // 8)])
    return Placement.from_phy2log(slots[None], experts).to("cuda")


@pytest.mark.parametrize("tied", [False, True], ids=["random", "tied"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chooses_what_torch_chooses(shape, tied):
    logits, bias = inputs(*shape[:2], tied=tied)
    routing = route(logits, bias, **rules_of(shape), route_scale=2.5)
    scores = torch.sigmoid(logits)
    expected = choose_experts(scores + bias, **rules_of(shape))
    assert torch.equal(routing.topk_idx, expected)
    assert torch.equal(routing.counts, torch.bincount(expected.flatten(), minlength=shape[1]))
    chosen = scores.double().gather(1, expected)
    weights = 2.5 * chosen / chosen.sum(1, keepdim=True)
    torch.testing.assert_close(routing.topk_weights.double(), weights, rtol=2e-6, atol=0)


def test_scores_have_the_bits_of_torch():
    # What is kept for the backward are the scores themselves.
    every = torch.linspace(-110, 110, 2**20, device="cuda")
    near_zero = torch.linspace(-1, 1, 2**20, device="cuda")
    logits = torch.cat([every, near_zero])[:, None].requires_grad_()
    rules = {"num_groups": 1, "top_groups": 1, "top_k": 1, "route_scale": 1.0}
    routing = route(logits, torch.zeros(1, device="cuda"), **rules)
    _, scores = routing.topk_weights.grad_fn.saved_tensors
    assert torch.equal(scores, torch.sigmoid(logits))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_replicas_take_turns(shape):
    logits, bias = inputs(*shape[:2])
    placement = crowded_placement(shape[1])
    maps = {"log2phy": placement.log2phy[0], "logcnt": placement.logcnt[0]}
    routing = route(logits, bias, **rules_of(shape), route_scale=1.0, **maps, replica_offset=5)
    expected = select_replicas(routing.topk_idx, **maps, offset=5)
    assert torch.equal(routing.slot_idx, expected)


def test_gradient_matches_float64():
    shape = SHAPES[0]
    logits, bias = inputs(*shape[:2])
    logits.requires_grad_()
    routing = route(logits, bias, **rules_of(shape), route_scale=2.5)
    grad = torch.randn_like(routing.topk_weights)
    routing.topk_weights.backward(grad)
    exact = logits.detach().double().requires_grad_()
    chosen = exact.sigmoid().gather(1, routing.topk_idx)
    (2.5 * chosen / chosen.sum(1, keepdim=True)).backward(grad.double())
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_replays_in_a_graph():
    shape = SHAPES[0]
    logits, bias = inputs(*shape[:2])
    placement = crowded_placement(shape[1])
    options = rules_of(shape) | {"route_scale": 2.5}
    options |= {"log2phy": placement.log2phy[0], "logcnt": placement.logcnt[0]}
    route(logits, bias, **options)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routing = route(logits, bias, **options)
    for _ in range(2):
        logits.copy_(logits.roll(1, dims=1))
        graph.replay()
        expected = route(logits, bias, **options)
        assert all(torch.equal(got, want) for got, want in zip(routing, expected, strict=True))
