"""The gradient of the router's logits against autograd in float64. Run twice: with
``TRITON_INTERPRET=1`` this is the kernel in the interpreter, without it the torch operations.
"""

from __future__ import annotations

import pytest
import torch
from dualpipe_ext.kernels.router_grad import route_grad

# Tokens, experts, choices: several programs, several blocks of columns, one of everything.
SIZES = [(9, 24, 5), (70, 300, 8), (1, 1, 1), (33, 16, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), SIZES)
def test_matches_autograd(num_tokens, num_experts, top_k, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    topk_idx = torch.rand(logits.shape, generator=generator).argsort(1)[:, :top_k].contiguous()
    grad = torch.randn(num_tokens, top_k, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    chosen = logits.sigmoid().gather(1, topk_idx)
    (2.5 * chosen / chosen.sum(1, keepdim=True)).backward(grad)
    found = route_grad(
        grad.to(dtype),
        topk_idx,
        chosen.detach().to(dtype),
        num_experts=num_experts,
        route_scale=2.5,
    )
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), logits.grad, rtol=1e-5, atol=1e-6)
    elsewhere = torch.ones_like(found).scatter_(1, topk_idx, 0.0).bool()
    assert not found[elsewhere].any()


def test_example_of_the_docstring_and_an_expanded_gradient():
    args = torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.25]])
    how = {"num_experts": 3, "route_scale": 3.0}
    found = route_grad(torch.tensor([[1.0, 0.0]]), *args, **how)
    torch.testing.assert_close(found, torch.tensor([[-0.5, 0.0, 1 / 3]]))
    # All the same: weights that always sum to one feel nothing.
    assert route_grad(torch.ones(1, 1).expand(1, 2), *args, **how).abs().max() < 1e-6


def test_no_tokens():
    empty = torch.zeros(0, 2)
    found = route_grad(empty, empty.long(), empty, num_experts=5, route_scale=1.0)
    assert found.shape == (0, 5)
