"""Rotary positions against float64 torch. Run twice: with ``TRITON_INTERPRET=1`` these are the
Triton kernels in the interpreter (float32: it rounds bf16 wrongly), without it the torch fallback.
"""

from __future__ import annotations

import os

import pytest
import torch
from dualpipe_ext.kernels import rotary as module
from dualpipe_ext.kernels.rotary import rotary
from torch._subclasses.fake_tensor import FakeTensorMode

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BASE = 10_000.0
# Heads and their size: one pair, no power of two, a block of 512 pairs, more than one block.
SIZES = [(1, 2), (3, 12), (8, 128), (9, 128)]


def reference(qkv, num_heads, base):
    """By complex numbers, in float64."""
    num, length, width = qkv.shape
    heads = qkv.double().view(num, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    half = width // (6 * num_heads)
    angles = torch.arange(length).double()[:, None] / base ** (torch.arange(half).double() / half)
    turns = torch.polar(torch.ones_like(angles), angles)
    turned = [torch.complex(*x.chunk(2, -1)) * turns for x in heads[:2]]
    return *(torch.cat((x.real, x.imag), -1) for x in turned), heads[2]


def draw(num, length, num_heads, size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num, length, 3 * num_heads * size, generator=generator).to(dtype)


@pytest.mark.parametrize(("num_heads", "size"), SIZES)
@pytest.mark.parametrize("layout", ["as-given", "by-head", "expanded", "strided"])
def test_matches_float64(num_heads, size, layout):
    qkv = draw(2, 5, num_heads, size).requires_grad_()
    found = rotary(qkv, num_heads, BASE)
    exact = qkv.detach().double().requires_grad_()
    want = reference(exact, num_heads, BASE)
    shape, generator = want[0].shape, torch.Generator().manual_seed(1)
    grads = [torch.randn(shape, generator=generator) for _ in range(3)]
    if layout == "by-head":
        grads = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in grads]
    elif layout == "expanded":
        grads = [g[:, :1].expand(shape) for g in grads]
    elif layout == "strided":
        grads = [torch.stack((g, g), -1)[..., 0] for g in grads]
    for got, expected in zip(found, want, strict=True):
        assert got.shape == expected.shape
        assert got.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
    torch.autograd.backward(found, grads)
    torch.autograd.backward(want, [g.double() for g in grads])
    torch.testing.assert_close(qkv.grad.double(), exact.grad, rtol=1e-6, atol=1e-6)


def test_values_are_copied_bit_for_bit_and_position_zero_does_not_turn():
    qkv = draw(2, 3, 2, 4)
    query, key, value = rotary(qkv, 2, BASE)
    heads = qkv.view(2, 3, 3, 2, 4)
    assert torch.equal(value.transpose(1, 2), heads[:, :, 2])
    assert torch.equal(query[:, :, 0], heads[:, 0, 0])
    assert torch.equal(key[:, :, 0], heads[:, 0, 1])
    assert not torch.equal(query[:, :, 1], heads[:, 1, 0])


def test_scores_depend_on_distance_only():
    row = draw(1, 1, 1, 16, torch.float64)
    query, key, _ = rotary(row.expand(1, 9, -1), 1, BASE)
    scores = query[0, 0] @ key[0, 0].T
    for distance in range(-4, 5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.allclose(scores[0, 0], scores[0, 1])


def test_late_positions_are_as_exact():
    # Angles are from one table in either run; the interpreter takes 3 ms for each position.
    qkv = draw(1, 1, 1, 8).expand(1, 1_000 if INTERPRETED else 20_000, -1)
    found, want = rotary(qkv, 1, BASE), reference(qkv, 1, BASE)
    torch.testing.assert_close(found[0].double(), want[0], rtol=1e-6, atol=1e-6)


def test_float64_is_left_to_torch():
    qkv = draw(2, 3, 2, 4, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotary(x, 2, 100.0), (qkv,))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds bf16 wrongly")
def test_fallback_rounds_bf16_once():
    qkv = draw(2, 7, 2, 16, torch.bfloat16)
    for got, want in zip(rotary(qkv, 2, BASE), reference(qkv, 2, BASE), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2**-8 * (1 + 2**-10), atol=1e-6)


def test_a_tracer_leaves_no_table_to_others():
    qkv = draw(1, 13, 2, 4)
    want = rotary(qkv.double(), 2, 77.0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        rotary(torch.empty(1, 13, 24, dtype=torch.float64), 2, 77.0)
    for got, expected in zip(rotary(qkv.double(), 2, 77.0), want, strict=True):
        assert type(got) is torch.Tensor
        assert torch.equal(got, expected)
    module._TABLES.clear()
    with FakeTensorMode():
        rotary(torch.empty(1, 13, 24, dtype=torch.float64), 2, 77.0)
    assert len(module._TABLES) == 0


def test_tables_are_kept_and_the_last_used_ones_stay():
    tables = module._Tables(2)
    kind = (torch.float32, torch.device("cpu"))
    first = tables.of((1, 2, BASE, *kind))
    second = tables.of((2, 2, BASE, *kind))
    assert tables.of((1, 2, BASE, *kind)) is first
    tables.of((3, 2, BASE, *kind))
    assert len(tables) == 2
    assert tables.of((1, 2, BASE, *kind)) is first
    assert tables.of((2, 2, BASE, *kind)) is not second


def test_an_output_that_nobody_uses():
    qkv = draw(1, 4, 2, 4).requires_grad_()
    rotary(qkv, 2, BASE)[2].sum().backward()
    grad = qkv.grad.view(1, 4, 3, 2, 4)
    assert (grad[:, :, 2] == 1).all()
    assert not grad[:, :, :2].any()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_nothing_to_turn(shape):
    qkv = torch.zeros(*shape, 24, requires_grad=True)
    found = rotary(qkv, 2, BASE)
    assert [x.shape for x in found] == [(shape[0], 2, shape[1], 4)] * 3
    torch.stack(found).sum().backward()
    assert qkv.grad.shape == (*shape, 24)


@pytest.mark.parametrize(
    ("qkv", "heads", "message"),
    [
        (torch.zeros(2, 3), 1, "expected qkv of shape"),
        (torch.zeros(2, 3, 18), 2, "with an even D"),
        (torch.zeros(2, 3, 12), 0, "expected qkv of shape"),
        (torch.zeros(2, 3, 12, dtype=torch.int32), 2, "expected qkv in one of"),
    ],
)
def test_bad_input(qkv, heads, message):
    with pytest.raises(ValueError, match=message):
        rotary(qkv, heads, BASE)
