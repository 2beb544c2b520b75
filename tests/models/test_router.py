import pytest
import torch

from dualpipe_ext.eplb import Placement, select_replicas
from dualpipe_ext.models import ModelConfig, Router
from dualpipe_ext.models.router import routing_logits


def make_router(**overrides) -> Router:
    torch.manual_seed(0)
    router = Router(ModelConfig().with_overrides(**overrides))
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.bias, std=0.1)
    return router


def route_one(router: Router, x: torch.Tensor) -> tuple[set[int], dict[int, float]]:
    """The published rules for one token, in plain Python."""
    scores = torch.sigmoid(router.weight @ x).tolist()
    biased = [s + b for s, b in zip(scores, router.bias.tolist(), strict=True)]
    size = len(scores) // router.num_groups
    groups = [biased[g * size : (g + 1) * size] for g in range(router.num_groups)]
    strength = [sum(sorted(group)[-2:]) for group in groups]
    best = sorted(range(router.num_groups), key=lambda g: -strength[g])[: router.top_groups]
    open_experts = [e for e in range(len(scores)) if e // size in best]
    chosen = sorted(open_experts, key=lambda e: -biased[e])[: router.top_k]
    total = sum(scores[e] for e in chosen)
    return set(chosen), {e: scores[e] / total * router.route_scale for e in chosen}


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_experts": 32, "num_groups": 8, "top_groups": 3, "top_k": 6},
        {"num_groups": 1, "top_groups": 1},
        {"num_experts": 4, "num_groups": 4, "top_groups": 2, "top_k": 2},
    ],
)
def test_follows_the_published_rules(sizes):
    router = make_router(**sizes)
    x = torch.randn(50, router.weight.shape[1])
    topk_idx, topk_weights, slot_idx, counts = router(x)
    assert slot_idx is topk_idx
    assert torch.equal(counts, torch.bincount(topk_idx.flatten(), minlength=len(router.bias)))
    assert topk_idx.dtype == torch.int64
    for token in range(50):
        chosen, weights = route_one(router, x[token])
        assert set(topk_idx[token].tolist()) == chosen
        for expert, weight in zip(
            topk_idx[token].tolist(), topk_weights[token].tolist(), strict=True
        ):
            assert weight == pytest.approx(weights[expert], rel=1e-5)


def test_bias_selects_but_does_not_weigh():
    router = make_router(num_groups=1, top_groups=1)
    x = torch.randn(20, router.weight.shape[1])
    router.bias.zero_()
    router.bias[3] = 10.0
    topk_idx, topk_weights = router(x)[:2]
    assert (topk_idx == 3).any(dim=1).all()
    torch.testing.assert_close(
        topk_weights.sum(dim=1), torch.full((20,), router.route_scale), rtol=1e-5, atol=0
    )
    scores = torch.sigmoid(x @ router.weight.T).gather(1, topk_idx)
    torch.testing.assert_close(
        topk_weights, scores / scores.sum(1, keepdim=True) * router.route_scale
    )


def test_bias_moves_toward_equal_loads():
    router = make_router()
    before = router.bias.clone()
    counts = torch.full((16,), 10)
    counts[0], counts[1] = 19, 1
    router.update_bias(counts, rate=0.01)
    moved = router.bias - before
    assert moved[0].item() == pytest.approx(-0.01)
    assert moved[1].item() == pytest.approx(0.01)
    assert torch.equal(moved[2:], torch.zeros(14))


def test_gradient_reaches_input_and_weight():
    router = make_router()
    x = torch.randn(7, 128, requires_grad=True)
    topk_weights = router(x).topk_weights
    (topk_weights * torch.randn_like(topk_weights)).sum().backward()
    assert x.grad.abs().sum() > 0
    assert router.weight.grad.abs().sum() > 0


def test_ties_go_to_the_lowest_expert():
    router = make_router()
    router.bias.zero_()
    with torch.no_grad():
        router.weight.zero_()
    assert router(torch.randn(3, 128)).topk_idx.tolist() == [[0, 1, 2, 3]] * 3


def test_slots_and_sums_of_counts():
    router = make_router()
    placement = Placement.identity(1, 16, 24)
    maps = {"log2phy": placement.log2phy[0], "logcnt": placement.logcnt[0]}
    sums = torch.arange(16)
    x = torch.randn(30, 128)
    routing = router(x, **maps, replica_offset=1, counts=sums)
    plain = router(x)
    assert torch.equal(routing.topk_idx, plain.topk_idx)
    assert torch.equal(routing.slot_idx, select_replicas(plain.topk_idx, **maps, offset=1))
    assert routing.counts is sums
    assert torch.equal(sums, torch.arange(16) + plain.counts)


def test_a_float64_model_routes_in_float64():
    router = make_router().double()
    x = torch.randn(9, 128, dtype=torch.float64, requires_grad=True)
    weights = router(x).topk_weights
    assert weights.dtype == torch.float64
    chosen = torch.sigmoid(x @ router.weight.t()).gather(1, router(x).topk_idx)
    expected = chosen / chosen.sum(1, keepdim=True) * router.route_scale
    torch.testing.assert_close(weights, expected, rtol=1e-14, atol=0)
    weights.square().sum().backward()
    ours, router.weight.grad = router.weight.grad, None
    expected.square().sum().backward()
    torch.testing.assert_close(ours, router.weight.grad, rtol=1e-12, atol=1e-14)


def errors(found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Largest errors of a product and of the plain float32 one."""
    return float((found - exact).abs().max()), float((plain - exact).abs().max())


def bfloat16_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 512, generator=generator).bfloat16()
    weight = torch.randn(48, 512, generator=generator)
    return x, weight, torch.randn(200, 48, generator=generator)


def test_bfloat16_rows_are_routed_as_exactly_as_in_float32():
    x, weight, _ = bfloat16_case()
    exact = x.double() @ weight.double().t()
    logits = routing_logits(x, weight)
    assert logits.dtype == torch.float32
    ours, float32s = errors(logits, x.float() @ weight.t(), exact)
    assert ours <= 2 * float32s
    # Weights that bfloat16 cannot tell apart must give other logits.
    near = weight * (1 + 2.0**-20)
    assert not torch.equal(logits, routing_logits(x, near))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_bfloat16_rows_with_weights_of_any_dtype(dtype):
    x, weight, grad = bfloat16_case()
    weight = weight.to(dtype).requires_grad_()
    logits = routing_logits(x, weight)
    assert torch.equal(logits, routing_logits(x, weight.detach().float()))
    logits.backward(grad)
    assert weight.grad.dtype == dtype


def test_gradients_of_bfloat16_rows():
    x, weight, grad = bfloat16_case()
    x.requires_grad_(), weight.requires_grad_()
    logits = routing_logits(x, weight)
    # Neither kept nor made: a float32 copy of x.
    assert [t.dtype for t in logits.grad_fn.saved_tensors] == [torch.bfloat16, torch.float32]
    assert logits.grad_fn.saved_tensors[0].data_ptr() == x.data_ptr()
    logits.backward(grad)
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    exact = grad.double().t() @ x.detach().double()
    ours, float32s = errors(weight.grad, grad.t() @ x.detach().float(), exact)
    assert ours <= 2 * float32s
    # One rounding to bfloat16 (2**-8), and what the parts leave out (3 * 2**-16) and their sum
    # rounds: less than 2**-14 of the sum of magnitudes.
    exact = grad.double() @ weight.detach().double()
    size = grad.double().abs() @ weight.detach().double().abs()
    assert bool(((x.grad - exact).abs() <= exact.abs() * 2**-8 + size * 2**-14).all())
