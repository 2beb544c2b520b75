"""The router kernels on a GPU: the indices of the composed torch operations, at real sizes."""

from __future__ import annotations

import pytest
import torch
from dualpipe_ext.kernels.router import choose_experts, route

from dualpipe_ext.eplb import Placement, select_replicas
from dualpipe_ext.eplb.shares import to_shares
from dualpipe_ext.models.router import routing_logits

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


def uneven_split(placement):
    """Random shares; on the CPU, so that both devices get the same."""
    width = placement.log2phy.shape[2]
    weights = torch.rand(placement.num_experts, width, generator=torch.Generator().manual_seed(0))
    real = torch.arange(width) < placement.logcnt[0, :, None].cpu()
    return to_shares(weights * real)


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_replicas_take_turns(shape, uneven):
    logits, bias = inputs(*shape[:2])
    placement = crowded_placement(shape[1])
    maps = {"log2phy": placement.log2phy[0], "logcnt": placement.logcnt[0]}
    split = uneven_split(placement).cuda() if uneven else None
    choice = {**maps, "split": split}
    routing = route(logits, bias, **rules_of(shape), route_scale=1.0, **choice, replica_offset=5)
    expected = select_replicas(routing.topk_idx, **choice, offset=5)
    assert torch.equal(routing.slot_idx, expected)
    on_cpu = {name: None if t is None else t.cpu() for name, t in choice.items()}
    assert torch.equal(expected.cpu(), select_replicas(routing.topk_idx.cpu(), **on_cpu, offset=5))


def test_counts_are_added_without_a_wait():
    shape = SHAPES[0]
    logits, bias = inputs(*shape[:2])
    placement = crowded_placement(shape[1])
    options = rules_of(shape) | {"route_scale": 1.0, "split": uneven_split(placement).cuda()}
    options |= {"log2phy": placement.log2phy[0], "logcnt": placement.logcnt[0]}
    once = route(logits, bias, **options).counts
    sums = torch.arange(shape[1], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = route(logits, bias, **options, counts=sums)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.counts is sums
    assert torch.equal(sums, once + torch.arange(shape[1], device="cuda"))


def test_float64_goes_by_torch():
    logits, bias = inputs(300, 64)
    rules = {"num_groups": 8, "top_groups": 4, "top_k": 6, "route_scale": 2.5}
    routing = route(logits.double(), bias, **rules)
    expected = route(logits.double().cpu(), bias.cpu(), **rules)
    assert torch.equal(routing.topk_idx.cpu(), expected.topk_idx)
    torch.testing.assert_close(routing.topk_weights.cpu(), expected.topk_weights)


def truncation_bound(a, b):
    """What float32 sums of ``a @ b`` may be off where every 16 products are added toward zero.

    A unit in the last place of the largest partial sum for each addition, times 4: products are
    aligned to the sum before they are added, and libraries choose the order.
    """
    steps = a.shape[1] // 16
    by_step = torch.einsum("msk,skn->msn", a.unflatten(1, (steps, 16)), b.unflatten(0, (steps, 16)))
    return 4 * steps * 2**-23 * by_step.cumsum(1).abs().amax(1)


@pytest.mark.parametrize("tf32", [False, True])
def test_bfloat16_rows_are_routed_in_float32(tf32):
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(4096, 7168, device="cuda", generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(256, 7168, device="cuda", generator=generator).requires_grad_()
    grad = torch.randn(4096, 256, device="cuda", generator=generator)
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        logits = routing_logits(x, weight)
        logits.backward(grad)
    finally:
        torch.set_float32_matmul_precision(was)
    assert logits.dtype == weight.grad.dtype == torch.float32
    x64, w64, g64 = x.detach().double(), weight.detach().double(), grad.double()
    for found, a, b in (
        (logits[:32], x64[:32], w64.t()),
        (weight.grad[:32, :256], g64.t()[:32], x64[:, :256]),
    ):
        bound = truncation_bound(a, b)
        assert bool(((found - a @ b).abs() <= bound).all())
    # With the weight in TF32 the same check would fail.
    in_tf32 = (weight.detach().view(torch.int32) + 2**12 & -(2**13)).view(torch.float32).double()
    error = (x64[:32] @ in_tf32.t() - x64[:32] @ w64.t()).abs()
    assert bool((error > truncation_bound(x64[:32], w64.t())).any())
    exact, size = g64 @ w64, g64.abs() @ w64.abs()
    assert bool(((x.grad - exact).abs() <= exact.abs() * 2**-8 + size * 2**-14).all())


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
