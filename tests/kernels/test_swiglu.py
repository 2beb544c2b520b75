"""SwiGLU against float64 torch. Run twice: with ``TRITON_INTERPRET=1`` these are the Triton kernels
in the interpreter (float32: it rounds bf16 wrongly), without it the torch fallback.
"""

from __future__ import annotations

import os

import pytest
import torch
from dualpipe_ext.kernels.swiglu import swiglu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# A column count below, at and above one block of 1024, and one that fills it partly.
SIZES = [1, 24, 1024, 1500]


def reference(gate, up, weights):
    y = torch.nn.functional.silu(gate.double()) * up.double()
    return y if weights is None else y * weights.double()[:, None]


def inputs(rows, size, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(rows, 2 * size, generator=generator)
    return x, torch.rand(rows, generator=generator), torch.randn(rows, size, generator=generator)


def close(got, expected, *, terms=1):
    # Each value is a short product (rounding 2^-24 a step) or a sum of `terms` of them.
    scale = expected.abs().max().item() if expected.numel() else 0.0
    bound = 4e-7 * max(1.0, scale) * terms**0.5
    return torch.allclose(got.double(), expected, rtol=1e-6, atol=bound)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "pair"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "plain"])
def test_matches_float64(size, packed, weighted):
    x, weights, grad_y = inputs(5, size)
    x.requires_grad_()
    weights = weights.requires_grad_() if weighted else None
    gate, up = x[:, :size], x[:, size:]
    y = swiglu(x if packed else (gate, up), weights)
    y.backward(grad_y)
    got = [x.grad, weights.grad] if weighted else [x.grad]

    exact_x = x.detach().double().requires_grad_()
    exact_weights = weights.detach().double().requires_grad_() if weighted else None
    leaves = [exact_x, exact_weights] if weighted else [exact_x]
    expected_y = reference(exact_x[:, :size], exact_x[:, size:], exact_weights)
    expected = torch.autograd.grad(expected_y, leaves, grad_y.double())

    assert close(y, expected_y)
    assert close(got[0], expected[0])
    if weighted:
        assert close(got[1], expected[1], terms=size)


def test_example_of_the_docstrings():
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0]], requires_grad=True)
    weights = torch.tensor([2.0], requires_grad=True)
    y = swiglu(x, weights)
    y.sum().backward()
    torch.testing.assert_close(y, torch.tensor([[0.0, 4.386351]]))
    torch.testing.assert_close(x.grad, torch.tensor([[2.0, 5.566023, 0.0, 1.462117]]))
    torch.testing.assert_close(weights.grad, torch.tensor([2.193176]))


def test_no_rows():
    x = torch.zeros(0, 8, requires_grad=True)
    weights = torch.zeros(0, requires_grad=True)
    swiglu(x, weights).sum().backward()
    assert x.grad.shape == (0, 8)
    assert weights.grad.shape == (0,)


def test_rows_may_be_strided():
    x, weights, _ = inputs(6, 16)
    assert torch.equal(swiglu(x[::2], weights[::2].contiguous()), swiglu(x, weights)[::2])


# exp(1e4) is infinite, and 1 / (1 + inf) is the 0 that is wanted.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_extreme_gates_stay_finite():
    x = torch.tensor([[-1e4, 1e4, 1.0, 1.0]], requires_grad=True)
    y = swiglu(x)
    y.sum().backward()
    assert torch.equal(y, torch.tensor([[0.0, 1e4]]))
    assert torch.isfinite(x.grad).all()


def test_float64_is_left_to_torch():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, (x, weights))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds bf16 wrongly")
def test_fallback_rounds_bf16_once():
    x, weights, _ = inputs(4, 32)
    x = x.bfloat16()
    expected = reference(x[:, :32], x[:, 32:], weights).float().bfloat16()
    assert torch.equal(swiglu(x, weights), expected)


@pytest.mark.parametrize(
    ("x", "weights", "message"),
    [
        (torch.zeros(2, 3), None, "expected x of shape"),
        (torch.zeros(4), None, "expected x of shape"),
        ((torch.zeros(2, 3), torch.zeros(2, 4)), None, "one shape"),
        (torch.zeros(2, 4, dtype=torch.int32), None, "expected gate and up in one of"),
        (torch.zeros(4, 2).t(), None, "contiguous rows"),
        (torch.zeros(2, 4), torch.zeros(3), "expected weights"),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.bfloat16), "expected weights"),
    ],
)
def test_bad_input(x, weights, message):
    with pytest.raises(ValueError, match=message):
        swiglu(x, weights)
