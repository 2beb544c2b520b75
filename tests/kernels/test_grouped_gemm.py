"""Grouped products against one product per group, in float64."""

from __future__ import annotations

import pytest
import torch
from dualpipe_ext.kernels.grouped_gemm import grouped_mm, grouped_mm_weight_grad

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = [[2, 2, 7, 9], [0, 0, 0, 0], [12, 12, 12, 12], [0, 3, 3, 12]]
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}


def _expected(x, w, offsets):
    out = torch.zeros(x.shape[0], w.shape[2], dtype=torch.float64, device=x.device)
    start = 0
    for group, end in enumerate(offsets.tolist()):
        out[start:end] = x[start:end].double() @ w[group].double()
        start = end
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("ends", CASES)
@pytest.mark.parametrize(("k", "n"), [(8, 16), (5, 3)])
def test_forward_and_weight_grad(device, dtype, ends, k, n):
    torch.manual_seed(0)
    x = torch.randn(12, k, dtype=dtype, device=device)
    w = torch.randn(4, k, n, dtype=dtype, device=device)
    grad = torch.randn(12, n, dtype=dtype, device=device)
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)

    out = grouped_mm(x, w, offsets)
    exact = _expected(x, w, offsets)
    assert out.dtype == dtype
    size = _expected(x.abs(), w.abs(), offsets)
    assert ((out.double() - exact).abs() <= (k + 1) * EPS[dtype] * size).all()
    assert torch.equal(out[ends[-1] :], torch.zeros_like(out[ends[-1] :]))

    grad_w = grouped_mm_weight_grad(x, grad, offsets)
    assert grad_w.shape == w.shape
    start = 0
    for group, end in enumerate(ends):
        rows, rows_grad = x[start:end].double(), grad[start:end].double()
        size = rows.abs().t() @ rows_grad.abs()
        error = (grad_w[group].double() - rows.t() @ rows_grad).abs()
        assert (error <= 13 * EPS[dtype] * size).all()
        start = end


@pytest.mark.parametrize("device", DEVICES)
def test_docstring_example(device):
    x = torch.arange(8.0, device=device).reshape(4, 2)
    w = torch.stack([torch.eye(2), 5 * torch.eye(2), 10 * torch.eye(2)]).to(device)
    offsets = torch.tensor([2, 2, 3], dtype=torch.int32, device=device)
    expected = torch.tensor([[0, 1], [2, 3], [40, 50], [0, 0]], dtype=torch.float32)
    assert torch.equal(grouped_mm(x, w, offsets).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_rows(dtype):
    offsets = torch.zeros(3, dtype=torch.int32)
    x, w = torch.randn(0, 8, dtype=dtype), torch.randn(3, 8, 16, dtype=dtype)
    assert grouped_mm(x, w, offsets).shape == (0, 16)
    grad_w = grouped_mm_weight_grad(x, torch.randn(0, 16, dtype=dtype), offsets)
    assert torch.equal(grad_w, torch.zeros_like(w))


def test_transposed_weights():
    torch.manual_seed(0)
    x, w = torch.randn(6, 4).double(), torch.randn(2, 3, 4).double()
    offsets = torch.tensor([4, 6], dtype=torch.int32)
    out = grouped_mm(x, w.transpose(1, 2), offsets)
    assert torch.equal(out, grouped_mm(x, w.transpose(1, 2).contiguous(), offsets))


@pytest.mark.parametrize(
    ("x", "w", "offsets", "message"),
    [
        (torch.zeros(4), torch.zeros(1, 4, 2), torch.zeros(1, dtype=torch.int32), "x of shape"),
        (torch.zeros(4, 3), torch.zeros(1, 4, 2), torch.zeros(1, dtype=torch.int32), "w of shape"),
        (torch.zeros(4, 3), torch.zeros(1, 3, 2), torch.zeros(1), "offsets int32"),
        (
            torch.zeros(4, 3),
            torch.zeros(1, 3, 2).double(),
            torch.zeros(1, dtype=torch.int32),
            "float32",
        ),
    ],
)
def test_bad_input(x, w, offsets, message):
    with pytest.raises(ValueError, match=message):
        grouped_mm(x, w, offsets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ends", CASES)
def test_adding_to_a_total(dtype, ends):
    torch.manual_seed(0)
    x, grad = torch.randn(12, 8).to(dtype), torch.randn(12, 16).to(dtype)
    offsets = torch.tensor(ends, dtype=torch.int32)
    for total_dtype in (dtype, torch.float32):
        total = torch.randn(4, 8, 16).to(total_dtype)
        want = total.clone().add_(grouped_mm_weight_grad(x, grad, offsets))
        assert grouped_mm_weight_grad(x, grad, offsets, total=total) is total
        assert torch.equal(total, want)


@pytest.mark.parametrize("total", [torch.zeros(1, 3, 4), torch.zeros(1, 2, 3).transpose(1, 2)])
def test_bad_total(total):
    offsets = torch.tensor([4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"contiguous total of shape \[1, 3, 2\]"):
        grouped_mm_weight_grad(torch.zeros(4, 3), torch.zeros(4, 2), offsets, total=total)


def test_bad_weight_grad_input():
    with pytest.raises(ValueError, match="expected grad of shape"):
        grouped_mm_weight_grad(
            torch.zeros(4, 3), torch.zeros(5, 2), torch.zeros(1, dtype=torch.int32)
        )
