"""Bfloat16 parts of float32 numbers: by torch operations here, by the kernel where that runs."""

from __future__ import annotations

import os

import pytest
import torch
from dualpipe_ext.kernels.bf16_parts import bf16_parts

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter rounds bf16 wrongly"
)


def draw(*shape):
    """All sizes, with zeros, exact halves between two bfloat16 numbers, and subnormals."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    x *= torch.exp2(torch.randint(-130, 100, shape, generator=generator).float())
    x.view(-1)[::7], x.view(-1)[1::7] = 0.0, 1 + 2**-8
    return x


def by_hand(x):
    parts, rest = [], x.double()
    for _ in range(3):
        parts.append(rest.float().bfloat16())
        rest = rest - parts[-1].double()
    return parts, rest


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", [(0,), (2, 1, 0, 0), (2, 0, 1, 0)], ids=str)
@pytest.mark.parametrize("shape", [(64, 256), (3, 5), (1000, 7)])
def test_parts_lie_in_the_order_asked_for(device, order, shape):
    x = draw(*shape)
    parts, _ = by_hand(x)
    for dim in (0, 1):
        found = bf16_parts(x.to(device), order, dim=dim)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found.cpu(), torch.cat([parts[part] for part in order], dim))


@pytest.mark.parametrize("device", DEVICES)
def test_three_parts_sum_to_the_number_and_two_nearly(device):
    x = draw(50, 40)
    x[x.abs() < 2.0**-100] = 0.0  # of smaller ones, the third part is less than any bfloat16
    found = bf16_parts(x.to(device), (0, 1, 2), dim=0).cpu().double().view(3, 50, 40)
    assert torch.equal(found.sum(0), x.double())
    assert ((found[:2].sum(0) - x).abs() <= 2.0**-16 * x.abs()).all()


@pytest.mark.parametrize("device", DEVICES)
def test_docstring_example_strides_and_nothing(device):
    x = torch.tensor([[1 + 2.0**-9 + 2.0**-18]], device=device)
    assert bf16_parts(x, (2, 0), dim=1).tolist() == [[2.0**-18, 1.0]]
    wide = draw(6, 10).to(device)
    expected = bf16_parts(wide.t().contiguous(), (0, 1), dim=1)
    assert torch.equal(bf16_parts(wide.t(), (0, 1), dim=1), expected)
    assert bf16_parts(x[:0], (0, 1, 2), dim=0).shape == (0, 1)


@pytest.mark.parametrize(
    ("x", "order", "dim", "message"),
    [
        (torch.zeros(3), (0,), 0, "expected float32"),
        (torch.zeros(3, 2).bfloat16(), (0,), 0, "expected float32"),
        (torch.zeros(3, 2).double(), (0,), 0, "expected float32"),
        (torch.zeros(3, 2), (0,), 2, "dim 0 or 1"),
        (torch.zeros(3, 2), (3,), 0, "expected an order"),
        (torch.zeros(3, 2), (), 0, "expected an order"),
    ],
)
def test_bad_input(x, order, dim, message):
    with pytest.raises(ValueError, match=message):
        bf16_parts(x, order, dim=dim)
