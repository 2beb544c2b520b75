import pytest
import torch

from dualpipe_ext.models import ModelConfig, Router


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
    topk_idx, topk_weights = router(x)
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
    topk_idx, topk_weights = router(x)
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
    _, topk_weights = router(x)
    (topk_weights * torch.randn_like(topk_weights)).sum().backward()
    assert x.grad.abs().sum() > 0
    assert router.weight.grad.abs().sum() > 0
