"""The RMSNorm kernels on a GPU: all dtypes against float64, and the sizes of a real model."""

from __future__ import annotations

import pytest
import torch
from dualpipe_ext.kernels.rmsnorm import rms_norm

from tests.kernels.rmsnorm_exact import exact_and_bounds, within


def inputs(rows, size, dtype, weight_dtype):
    torch.manual_seed(0)
    x = torch.randn(rows, size, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(size, device="cuda", dtype=weight_dtype, requires_grad=True)
    return x, weight, torch.randn(rows, size, device="cuda", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
# A small row, DeepSeek-V3's latent and hidden sizes, an odd one, and one of several blocks.
@pytest.mark.parametrize("size", [24, 512, 7168, 1501, 20000])
@pytest.mark.parametrize("wide_weight", [True, False], ids=["float32-weight", "same-dtype"])
def test_matches_float64(dtype, size, wide_weight):
    # 600 rows: more than there are programs in the backward, and not a multiple.
    x, weight, grad_y = inputs(600, size, dtype, torch.float32 if wide_weight else dtype)
    y = rms_norm(x, weight)
    y.backward(grad_y)
    expected = exact_and_bounds(x, weight, grad_y, 1e-6)
    assert [within(t, e) for t, e in zip((y, x.grad, weight.grad), expected, strict=True)] == [
        True,
        True,
        True,
    ]


@pytest.mark.parametrize("size", [7168, 20000])
def test_same_bits_every_time(size):
    x, weight, grad_y = inputs(4096, size, torch.bfloat16, torch.float32)
    runs = []
    for _ in range(3):
        a, w = (t.detach().clone().requires_grad_() for t in (x, weight))
        y = rms_norm(a, w)
        y.backward(grad_y)
        runs.append((y.detach(), a.grad, w.grad))
    for other in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], other, strict=True))


def test_more_than_2_to_31_elements():
    rows, size = 2**18 + 3, 2**13
    x = torch.zeros(rows, size, device="cuda", dtype=torch.bfloat16)
    x[-1] = 2.0
    x.requires_grad_()
    weight = torch.full((size,), 3.0, device="cuda", requires_grad=True)
    y = rms_norm(x, weight, 0.5)
    # 2 / sqrt(4 + 0.5)
    normed = torch.full((size,), 2.0 / 4.5**0.5, device="cuda")
    assert torch.equal(y[-1], (3 * normed).bfloat16())
    assert not y[:-1].any()
    y.backward(torch.ones(size, device="cuda", dtype=torch.bfloat16).expand(rows, size))
    torch.testing.assert_close(weight.grad, normed)
