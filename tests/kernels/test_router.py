"""The router against its composed torch definition, and that against the rules in plain Python.

Run twice: with ``TRITON_INTERPRET=1`` these are the Triton kernels in the interpreter, without it
the torch fallback.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from dualpipe_ext.kernels.router import choose_experts, route

from dualpipe_ext.eplb import Placement, select_replicas
from dualpipe_ext.eplb.shares import to_shares

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# (tokens, experts, groups, chosen groups, top-k): powers of two and not, groups of one expert, one
# group, all groups open, every open expert chosen, blocks that are full, partial and of one token.
SHAPES = [
    (33, 16, 4, 2, 4),
    (9, 256, 8, 4, 8),
    (20, 30, 5, 3, 6),
    (17, 12, 12, 5, 3),
    (18, 24, 1, 1, 7),
    (5, 21, 3, 3, 21),
    (3, 2048, 8, 2, 8),
    (1, 1, 1, 1, 1),
]


def sigmoid(logits):
    """Scores with the bits that the router under test has: rounding decides between near ties."""
    if not INTERPRETED or logits.dtype == torch.float64:
        return torch.sigmoid(logits)
    return torch.from_numpy(np.float32(1) / (np.float32(1) + np.exp(-logits.numpy())))


def inputs(tokens, experts, *, tied=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(tokens, experts, generator=generator)
    bias = 0.3 * torch.randn(experts, generator=generator)
    # Few different values: ties between experts and between groups everywhere.
    return (logits.round(), bias.mul(4).round()) if tied else (logits, bias)


def select_in_python(biased, num_groups, top_groups, top_k):
    """The published rules for one token."""
    size = len(biased) // num_groups
    groups = [biased[g * size : (g + 1) * size] for g in range(num_groups)]
    strength = [float(np.sum(np.float32(sorted(group)[-2:]))) for group in groups]
    best = sorted(range(num_groups), key=lambda g: -strength[g])[:top_groups]
    open_experts = [e for e in range(len(biased)) if e // size in best]
    return sorted(open_experts, key=lambda e: -biased[e])[:top_k]


@pytest.mark.parametrize("tied", [False, True], ids=["random", "tied"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chooses_what_the_definition_chooses(shape, tied):
    tokens, experts, num_groups, top_groups, top_k = shape
    rules = {"num_groups": num_groups, "top_groups": top_groups, "top_k": top_k}
    logits, bias = inputs(tokens, experts, tied=tied)
    routing = route(logits, bias, **rules, route_scale=2.5)

    scores = sigmoid(logits)
    expected = choose_experts(scores + bias, **rules)
    assert torch.equal(routing.topk_idx, expected)
    for row, biased in zip(expected.tolist(), (scores + bias).tolist(), strict=True):
        assert row == select_in_python(biased, *shape[2:])
    assert torch.equal(routing.counts, torch.bincount(expected.flatten(), minlength=experts))
    assert routing.slot_idx is routing.topk_idx
    chosen = scores.double().gather(1, expected)
    weights = 2.5 * chosen / chosen.sum(1, keepdim=True)
    torch.testing.assert_close(routing.topk_weights.double(), weights, rtol=2e-6, atol=0)


def crowded_maps(experts):
    """Every expert has a slot, and a few have up to four more."""
    generator = torch.Generator().manual_seed(1)
    more = torch.randint(min(experts, 5), (experts,), generator=generator)
    order = torch.randperm(2 * experts, generator=generator)
    slots = torch.cat([torch.arange(experts), more])[order]
    placement = Placement.from_phy2log(slots[None], experts)
    return {"log2phy": placement.log2phy[0], "logcnt": placement.logcnt[0]}


def uneven_split(log2phy, logcnt):
    weights = torch.rand(log2phy.shape, generator=torch.Generator().manual_seed(3)) ** 3
    weights[0] = 0  # an expert that nothing was said about
    return to_shares(weights * (torch.arange(log2phy.shape[1]) < logcnt[:, None]))


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_replicas_take_turns(shape, offset, uneven):
    tokens, experts, num_groups, top_groups, top_k = shape
    rules = {"num_groups": num_groups, "top_groups": top_groups, "top_k": top_k}
    maps = crowded_maps(experts)
    split = uneven_split(**maps) if uneven else None
    logits, bias = inputs(tokens, experts)
    routing = route(
        logits, bias, **rules, route_scale=1.0, **maps, replica_offset=offset, split=split
    )

    plain = route(logits, bias, **rules, route_scale=1.0)
    assert torch.equal(routing.topk_idx, plain.topk_idx)
    assert torch.equal(routing.counts, plain.counts)
    expected = select_replicas(routing.topk_idx, **maps, offset=offset, split=split)
    assert torch.equal(routing.slot_idx, expected)
    assert torch.equal(plain.topk_weights, routing.topk_weights)


def test_counts_are_added_to_what_is_given():
    logits, bias = inputs(33, 16)
    rules = {"num_groups": 4, "top_groups": 2, "top_k": 4, "route_scale": 1.0}
    counts = torch.arange(16)
    sums = [route(logits, bias, **rules, counts=counts).counts for _ in range(2)]
    assert all(s is counts for s in sums)
    assert torch.equal(counts, torch.arange(16) + 2 * route(logits, bias, **rules).counts)


def test_a_split_does_not_touch_the_gradient():
    logits, bias = inputs(20, 24)
    rules = {"num_groups": 4, "top_groups": 2, "top_k": 5, "route_scale": 2.5}
    maps = crowded_maps(24)
    grads = []
    for split in (None, uneven_split(**maps)):
        leaf = logits.clone().requires_grad_()
        route(leaf, bias, **rules, **maps, split=split).topk_weights.square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    assert grads[0].any()


def test_example_of_the_docstring():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]] * 2)
    maps = {
        "log2phy": torch.tensor([[0, -1], [5, 6], [2, -1], [3, -1]]),
        "logcnt": torch.tensor([1, 2, 1, 1]),
    }
    rules = {"num_groups": 2, "top_groups": 1, "top_k": 1, "route_scale": 2.0}
    routing = route(logits, torch.zeros(4), **rules, **maps)
    assert routing.topk_idx.tolist() == [[1], [1]]
    assert routing.topk_weights.tolist() == [[2.0], [2.0]]
    assert routing.slot_idx.tolist() == [[5], [6]]
    assert routing.counts.tolist() == [0, 2, 0, 0]


def test_gradient_matches_float64():
    logits, bias = inputs(9, 24)
    rules = {"num_groups": 4, "top_groups": 2, "top_k": 5, "route_scale": 2.5}
    logits.requires_grad_()
    routing = route(logits, bias, **rules)
    grad = torch.randn(9, 5, generator=torch.Generator().manual_seed(2))
    routing.topk_weights.backward(grad)

    exact = logits.detach().double().requires_grad_()
    chosen = exact.sigmoid().gather(1, routing.topk_idx)
    (2.5 * chosen / chosen.sum(1, keepdim=True)).backward(grad.double())
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits.grad != 0, exact.grad != 0)
    assert not routing.topk_idx.requires_grad
    assert not routing.counts.requires_grad


def test_fallback_gradients_in_float64():
    logits, bias = inputs(4, 12)
    logits = logits.double().requires_grad_()

    def weights(x):
        return route(x, bias, num_groups=3, top_groups=2, top_k=4, route_scale=2.5).topk_weights

    assert torch.autograd.gradcheck(weights, (logits,))


def test_no_tokens():
    logits = torch.zeros(0, 8, requires_grad=True)
    maps = {"log2phy": torch.arange(8)[:, None], "logcnt": torch.ones(8, dtype=torch.int64)}
    rules = {"num_groups": 2, "top_groups": 1, "top_k": 2, "route_scale": 1.0}
    routing = route(logits, torch.zeros(8), **rules, **maps)
    routing.topk_weights.sum().backward()
    assert routing.topk_idx.shape == routing.slot_idx.shape == (0, 2)
    assert not routing.counts.any()
    assert logits.grad.shape == (0, 8)


def test_rows_may_be_strided():
    logits, bias = inputs(8, 16)
    rules = {"num_groups": 4, "top_groups": 2, "top_k": 3, "route_scale": 1.0}
    whole, half = route(logits, bias, **rules), route(logits[::2], bias, **rules)
    assert torch.equal(half.topk_idx, whole.topk_idx[::2])
    assert torch.equal(half.topk_weights, whole.topk_weights[::2])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_values_that_are_not_finite_are_ordered_as_by_the_definition():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor(
        [
            [nan, 1, nan, 0, 2, 2, -nan, 1],
            [inf, -inf, inf, 5, -200, -200, 200, 200],
            [-200, -200, -200, -200, -200, -200, -200, -200],
        ]
    )
    rules = {"num_groups": 4, "top_groups": 2, "top_k": 3}
    closed_by_bias = torch.tensor([0, -inf, 0, -inf, -inf, -inf, inf, 0])
    # The sign of a NaN must not matter.
    negative_nan = torch.tensor([0, -nan, nan, 0, 0, 0, 0, 0])
    for bias in (torch.zeros(8), closed_by_bias, negative_nan):
        routing = route(logits, bias, **rules, route_scale=1.0)
        expected = choose_experts(torch.sigmoid(logits) + bias, **rules)
        assert torch.equal(routing.topk_idx, expected)


RULES = {"num_groups": 2, "top_groups": 1, "top_k": 2, "route_scale": 1.0}
ONES = torch.ones(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "bias", "changes", "message"),
    [
        (torch.zeros(4), torch.zeros(4), {}, "expected logits"),
        (torch.zeros(2, 0), torch.zeros(0), {}, "expected logits"),
        (torch.zeros(2, 4, dtype=torch.bfloat16), torch.zeros(4), {}, "expected logits"),
        (torch.zeros(4, 2).t(), torch.zeros(4), {}, "contiguous rows"),
        (torch.zeros(2, 4), torch.zeros(3), {}, "expected a floating bias"),
        (torch.zeros(2, 4), ONES, {}, "expected a floating bias"),
        (torch.zeros(2, 4), torch.zeros(4), {"num_groups": 3}, "num_groups to divide 4"),
        (torch.zeros(2, 4), torch.zeros(4), {"top_groups": 3}, "top_groups from 1 to 2"),
        (torch.zeros(2, 4), torch.zeros(4), {"top_k": 3}, "top_k from 1 to 2"),
        (torch.zeros(1, 8192), torch.zeros(8192), {}, "at most 4096"),
        (torch.zeros(2, 4), torch.zeros(4), {"logcnt": ONES}, "together"),
        (torch.zeros(2, 4), torch.zeros(4), {"split": ONES[:, None].int()}, "together"),
        (torch.zeros(2, 4), torch.zeros(4), {"counts": ONES[:3]}, r"counts int64 \[4\]"),
        (torch.zeros(2, 4), torch.zeros(4), {"counts": ONES.int()}, r"counts int64 \[4\]"),
        (
            torch.zeros(2, 4),
            torch.zeros(4),
            {"logcnt": ONES, "log2phy": ONES[:, None], "split": ONES[:, None]},
            r"split int32 \[4, 1\]",
        ),
        (
            torch.zeros(2, 4),
            torch.zeros(4),
            {"logcnt": ONES, "log2phy": ONES},
            r"log2phy int64 \[4, X\]",
        ),
        (
            torch.zeros(2, 4),
            torch.zeros(4),
            {"logcnt": ONES.int(), "log2phy": ONES[:, None]},
            r"logcnt int64 \[4\]",
        ),
        (
            torch.zeros(2, 4),
            torch.zeros(4),
            {"logcnt": ONES, "log2phy": ONES[:, None], "replica_offset": -1},
            "replica_offset of at least 0",
        ),
    ],
)
def test_bad_input(logits, bias, changes, message):
    with pytest.raises(ValueError, match=message):
        route(logits, bias, **(RULES | changes))
