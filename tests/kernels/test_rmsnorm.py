"""RMSNorm against float64. Run twice: with ``TRITON_INTERPRET=1`` these are the Triton kernels in
the interpreter (float32: it rounds bf16 wrongly), without it the torch fallback.
"""

from __future__ import annotations

import os

import pytest
import torch
from dualpipe_ext.kernels import rmsnorm
from dualpipe_ext.kernels.rmsnorm import rms_norm

from tests.kernels.rmsnorm_exact import exact_and_bounds, within

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def inputs(rows, size, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(rows, size, generator=generator)
    weight = torch.randn(size, generator=generator)
    grad_y = torch.randn(rows, size, generator=generator)
    return x.to(dtype).requires_grad_(), weight.requires_grad_(), grad_y.to(dtype)


def matches(x, weight, grad_y, eps=1e-6):
    y = rms_norm(x, weight, eps)
    y.backward(grad_y)
    expected = exact_and_bounds(x, weight, grad_y, eps)
    return [within(t, e) for t, e in zip((y, x.grad, weight.grad), expected, strict=True)]


# One column, a partly filled block, a whole one, and rows of several blocks (the second kernel).
@pytest.mark.parametrize("size", [1, 24, 1024, 1500, 8193, 20000])
def test_matches_float64(size):
    assert matches(*inputs(5, size)) == [True, True, True]


@pytest.mark.parametrize("size", [8, 40])
def test_programs_with_several_rows(size, monkeypatch):
    # 3 programs for 10 rows, and blocks of 16, so that 40 columns are three of them.
    monkeypatch.setattr(rmsnorm, "_MAX_PROGRAMS", 3)
    monkeypatch.setattr(rmsnorm, "_MAX_BLOCK", 16)
    assert matches(*inputs(10, size)) == [True, True, True]


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_eps_counts(eps):
    x, weight, grad_y = inputs(4, 32)
    assert matches((0.1 * x).detach().requires_grad_(), weight, grad_y, eps) == [True, True, True]


def test_example_of_the_docstrings():
    x = torch.tensor([[3.0, 4.0]], requires_grad=True)
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    y = rms_norm(x, weight, 0.0)
    y.sum().backward()
    torch.testing.assert_close(y, torch.tensor([[0.848528, 2.262742]]))
    expected = torch.tensor([[-0.090510, 0.067882]])
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(weight.grad, torch.tensor([0.848528, 1.131371]))


def test_keeps_only_the_input_and_the_weight():
    x, weight, _ = inputs(4, 32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight)
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), weight.data_ptr()]


def test_no_rows():
    x, weight, grad_y = inputs(0, 8)
    rms_norm(x, weight).backward(grad_y)
    assert x.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros(8))


def test_a_row_of_zeros_stays_finite():
    x, weight = torch.zeros(2, 8, requires_grad=True), torch.ones(8)
    y = rms_norm(x, weight)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 8))
    torch.testing.assert_close(x.grad, torch.full((2, 8), 1000.0))


def test_more_dimensions_and_strided_rows():
    x, weight, grad_y = inputs(6, 16)
    rms_norm(x, weight).backward(grad_y)
    cube = x.detach().view(2, 3, 16).clone().requires_grad_()
    cube_weight = weight.detach().clone().requires_grad_()
    y = rms_norm(cube, cube_weight)
    y.backward(grad_y.view(2, 3, 16))
    assert torch.equal(cube.grad.view(6, 16), x.grad)
    assert torch.equal(cube_weight.grad, weight.grad)
    assert torch.equal(rms_norm(x.detach()[::2], weight), rms_norm(x, weight)[::2])


def test_float64_is_left_to_torch():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rms_norm, (x, weight))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds bf16 wrongly")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fallback_in_16_bits(dtype):
    x, weight, grad_y = inputs(7, 300, dtype=dtype)
    assert matches(x, weight, grad_y) == [True, True, True]
    narrow = weight.detach().to(dtype).requires_grad_()
    assert matches(x.detach().requires_grad_(), narrow, grad_y) == [True, True, True]


@pytest.mark.parametrize(
    ("x", "weight", "eps", "message"),
    [
        (torch.zeros(()), torch.zeros(1), 1e-6, "expected x of shape"),
        (torch.zeros(2, 0), torch.zeros(0), 1e-6, "expected x of shape"),
        (torch.zeros(2, 4, dtype=torch.int32), torch.zeros(4), 1e-6, "expected x in one of"),
        (torch.zeros(4, 2).t(), torch.zeros(4), 1e-6, "contiguous rows"),
        (torch.zeros(2, 4), torch.zeros(3), 1e-6, "expected weight of shape"),
        (torch.zeros(2, 4), torch.zeros(4).half(), 1e-6, "expected weight of shape"),
        (torch.zeros(2, 4), torch.zeros(8)[::2], 1e-6, "expected contiguous weight"),
        (torch.zeros(2, 4), torch.zeros(4), -1.0, "expected eps"),
        (torch.zeros(2, 4), torch.zeros(4), float("nan"), "expected eps"),
    ],
)
def test_bad_input(x, weight, eps, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, eps)
