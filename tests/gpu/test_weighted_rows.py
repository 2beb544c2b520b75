"""The gradients of weighted rows on a GPU: bfloat16 against float64, and more than 2^31 values."""

from __future__ import annotations

import pytest
import torch
from dualpipe_ext.kernels.weighted_rows import weighted_rows_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [7168, 1408, 24])
def test_matches_torch(dtype, size):
    torch.manual_seed(0)
    grad, rows = (torch.randn(300, size, device="cuda", dtype=dtype) for _ in range(2))
    weights = torch.rand(300, device="cuda")
    grad_rows, grad_weights = weighted_rows_grad(grad, rows, weights)
    # The exact product is rounded once: the same bits.
    assert torch.equal(grad_rows, (grad.float() * weights[:, None]).to(dtype))
    want = (grad.double() * rows.double()).sum(1)
    size_of_terms = (grad.double() * rows.double()).abs().sum(1)
    assert ((grad_weights.double() - want).abs() <= 1e-6 * size_of_terms).all()
    again = weighted_rows_grad(grad, rows, weights)
    assert torch.equal(again[1], grad_weights)


def test_more_than_2_to_31_elements():
    rows = torch.zeros(2**19 + 3, 2**12, device="cuda", dtype=torch.bfloat16)
    rows[-1] = 1.0
    grad_rows, grad_weights = weighted_rows_grad(
        rows, rows, torch.full((len(rows),), 0.5, device="cuda")
    )
    assert grad_weights[-1].item() == 2**12
    assert torch.equal(grad_rows[-1], torch.full((2**12,), 0.5, device="cuda").bfloat16())
    assert not grad_rows[:-1].any()
