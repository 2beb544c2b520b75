"""Gradients of weighted rows against float64 torch. Run twice: with ``TRITON_INTERPRET=1`` this is
the Triton kernel in the interpreter (float32: it rounds bf16 wrongly), without it the torch
operations.
"""

from __future__ import annotations

import pytest
import torch
from dualpipe_ext.kernels.weighted_rows import filled_rows, weighted_rows_grad

# A column count below, at and above one block of 1024, and one that fills it partly.
SIZES = [1, 24, 1024, 1500]


def inputs(num_rows, size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(size)
    grad, rows = (torch.randn(num_rows, size, generator=generator, dtype=dtype) for _ in range(2))
    return grad, rows, torch.rand(num_rows, generator=generator, dtype=dtype)


def expected(grad, rows, weights):
    rows = rows.double().requires_grad_()
    weights = weights.double().requires_grad_()
    (rows * weights[:, None]).backward(grad.double())
    return rows.grad, weights.grad


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_matches_float64(size, dtype):
    grad, rows, weights = inputs(5, size, dtype)
    grad_rows, grad_weights = weighted_rows_grad(grad, rows, weights)
    want_rows, want_weights = expected(grad, rows, weights)
    assert (grad_rows.dtype, grad_weights.dtype) == (dtype, dtype)
    # One rounding; a sum of as many terms.
    assert torch.equal(grad_rows, (grad * weights[:, None]).to(dtype))
    torch.testing.assert_close(grad_rows.double(), want_rows, rtol=1e-6, atol=0)
    bound = size**0.5 * torch.finfo(dtype).eps * grad.abs().max() * rows.abs().max()
    assert (grad_weights.double() - want_weights).abs().max() <= 4 * bound


def test_example_of_the_docstring():
    grad, rows = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    grad_rows, grad_weights = weighted_rows_grad(grad, rows, torch.tensor([0.5]))
    assert (grad_rows.tolist(), grad_weights.tolist()) == ([[0.5, 1.0]], [11.0])


def test_only_what_is_wanted():
    grad, rows, weights = inputs(3, 40)
    both = weighted_rows_grad(grad, rows, weights)
    only_rows = weighted_rows_grad(grad, None, weights)
    only_weights = weighted_rows_grad(grad, rows, None)
    assert torch.equal(only_rows[0], both[0])
    assert torch.equal(only_weights[1], both[1])
    assert only_rows[1] is None
    assert only_weights[0] is None


# END rows of groups and rows that hold something: the docstring's, empty groups first, last and in
# between, nothing at all, no padding.
GROUPS = [
    ([2, 6], [1, 3], [1, 0, 1, 1, 1, 0, 0]),
    ([0, 3, 3, 5, 5], [0, 2, 0, 2, 0], [1, 1, 0, 1, 1, 0, 0]),
    ([0, 0, 0], [0, 0, 0], [0] * 7),
    ([7], [7], [1] * 7),
]


@pytest.mark.parametrize(("ends", "counts", "filled"), GROUPS)
def test_weights_of_padding_rows_get_nothing(ends, counts, filled):
    groups = torch.tensor(ends, dtype=torch.int32), torch.tensor(counts)
    assert filled_rows(*groups, 7).int().tolist() == filled
    filled = torch.tensor(filled).bool()
    grad, rows, weights = inputs(7, 40)
    plain = weighted_rows_grad(grad, rows, weights)
    rows[~filled] = float("nan")
    grad_rows, grad_weights = weighted_rows_grad(grad, rows, weights, groups=groups)
    assert torch.equal(grad_rows, plain[0])
    assert torch.equal(grad_weights, torch.where(filled, plain[1], 0))
    assert weighted_rows_grad(grad, None, weights, groups=groups)[1] is None


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_empty(shape):
    grad_rows, grad_weights = weighted_rows_grad(
        torch.empty(shape), torch.empty(shape), torch.ones(shape[0])
    )
    assert grad_rows.shape == shape
    assert grad_weights.tolist() == [0.0] * shape[0]


def test_strided():
    grad, rows, weights = inputs(4, 32)
    want = weighted_rows_grad(grad[:1].repeat(4, 1), rows[:, :16].repeat(1, 2), weights)
    halves = rows.as_strided((4, 16), (32, 1))
    got = weighted_rows_grad(grad[:1].expand(4, 32), torch.cat([halves] * 2, 1), weights)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    got = weighted_rows_grad(grad, rows.t().contiguous().t(), weights)
    assert all(
        torch.equal(a, b) for a, b in zip(weighted_rows_grad(grad, rows, weights), got, strict=True)
    )
