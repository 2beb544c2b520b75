"""The SwiGLU kernels on a GPU: bfloat16 against float64, and the sizes of a real model."""

from __future__ import annotations

import pytest
import torch
from dualpipe_ext.kernels.swiglu import swiglu


def reference(x, weights):
    gate, up = x.double().chunk(2, dim=1)
    y = torch.nn.functional.silu(gate) * up
    return y if weights is None else y * weights.double()[:, None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [2048, 1408, 24])
@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "plain"])
def test_matches_float64(dtype, size, weighted):
    torch.manual_seed(0)
    x = torch.randn(300, 2 * size, device="cuda", dtype=dtype, requires_grad=True)
    weights = torch.rand(300, device="cuda", requires_grad=True) if weighted else None
    grad_y = torch.randn(300, size, device="cuda", dtype=dtype)
    y = swiglu(x, weights)
    y.backward(grad_y)

    exact_x = x.detach().double().requires_grad_()
    exact_weights = weights.detach().double().requires_grad_() if weighted else None
    expected = reference(exact_x, exact_weights)
    expected.backward(grad_y.double())

    # Rounded once from float32: half a unit in the last place, and float32's own error beside it.
    bound = {"rtol": torch.finfo(dtype).eps / 2 + 2e-6, "atol": 2e-6}
    torch.testing.assert_close(y.double(), expected, **bound)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, **bound)
    if weighted:
        torch.testing.assert_close(
            weights.grad.double(), exact_weights.grad, rtol=1e-5, atol=4e-7 * size**0.5
        )


def test_same_bits_every_time():
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(4096, device="cuda")
    runs = []
    for _ in range(2):
        a, w = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = swiglu(a, w)
        y.float().square().sum().backward()
        runs.append((y.detach(), a.grad, w.grad))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_more_than_2_to_31_elements():
    rows, size = 2**19 + 3, 2**11
    x = torch.zeros(rows, 2 * size, device="cuda", dtype=torch.bfloat16)
    x[-1] = 1.0
    y = swiglu(x)
    expected = torch.full((size,), 1.0 / (1.0 + torch.e**-1), device="cuda").bfloat16()
    assert torch.equal(y[-1], expected)
    assert not y[:-1].any()
