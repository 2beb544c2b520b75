"""Stand-ins for saved tensors: what comes back, what stays alive, and what it changes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dualpipe_ext.ep.fp8 import quantize
from dualpipe_ext.memory import Kept, in_fp8, recomputed, saved_as


def fp8_bound(x: torch.Tensor) -> torch.Tensor:
    """What :func:`in_fp8` promises, with 4 roundings of the widest arithmetic it uses (float32)."""
    blocks = x.double().unflatten(-1, (-1, 128))
    amax = blocks.abs().amax(-1, keepdim=True)
    bound = 2.0**-4 * blocks.abs() + 2.0**-10 * amax / 448 + 4 * 2.0**-24 * blocks.abs()
    if x.dtype in (torch.bfloat16, torch.float16):
        bound = bound * (1 + 2.0**-8) + 2.0**-8 * blocks.abs()  # the result is rounded to it
    return bound.flatten(-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fp8_comes_back_within_its_bound(dtype):
    torch.manual_seed(0)
    # Normal values, and blocks with one large value beside small ones: subnormal in FP8.
    x = torch.randn(64, 256, dtype=torch.float64)
    x[:, 128:] *= 10.0 ** torch.linspace(-9, 0, 128, dtype=torch.float64)
    x = x.to(dtype).requires_grad_()
    kept = in_fp8(x)
    back = kept.restore(*kept.tensors)
    assert back.dtype == dtype
    error = (back.double() - x.detach().double()).abs()
    assert (error <= fp8_bound(x.detach())).all()
    assert error.max() > 0
    # The bound says something: no smaller one in its first term would do.
    assert (error / x.detach().double().abs()).max() > 2.0**-4.5
    assert sum(t.nbytes for t in kept.tensors) == x.numel() * 33 // 32
    assert not any(t.requires_grad for t in kept.tensors)


def test_fp8_needs_whole_blocks():
    with pytest.raises(ValueError, match="multiple of 128 for FP8, got 96"):
        in_fp8(torch.zeros(2, 96))


def test_recomputed_calls_again_with_what_it_kept():
    calls = []

    def fn(x, none, y):
        calls.append((torch.is_grad_enabled(), none))
        return x * 2 + y

    x = torch.randn(3, 128, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 128, dtype=torch.float64)
    kept = recomputed(fn, x, None, in_fp8(y))
    assert calls == []
    assert len(kept.tensors) == 3  # x, and values and scales of y
    back = in_fp8(y)
    assert torch.equal(kept.restore(*kept.tensors), x.detach() * 2 + back.restore(*back.tensors))
    assert calls == [(False, None)]
    # One in the other, to any depth.
    outer = recomputed(torch.neg, recomputed(fn, x, None, y))
    assert torch.equal(outer.restore(*outer.tensors), -(x * 2 + y).detach())


def test_recomputed_ignores_autocast():
    x, w = torch.randn(4, 4), torch.randn(4, 4)
    kept, expected = recomputed(torch.mm, x, w), x @ w
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kept.restore(*kept.tensors), expected)


def test_saved_as_replaces_what_any_operation_saves():
    torch.manual_seed(0)
    base = torch.randn(8, 128, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 128, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(8, 5, dtype=torch.float64)
    x = base * 3
    with saved_as(x, in_fp8(x)):
        y = F.linear(x, weight)
    storage = weakref.ref(x.untyped_storage())
    back = in_fp8(x)
    expected = back.restore(*back.tensors)
    del x
    gc.collect()
    assert storage() is None
    y.backward(grad)
    torch.testing.assert_close(weight.grad, grad.t() @ expected)
    torch.testing.assert_close(base.grad, 3 * (grad @ weight.detach()))


def test_saved_as_leaves_everything_else_alone():
    x = torch.randn(4, 128, dtype=torch.float64, requires_grad=True)
    other = torch.randn(4, 128, dtype=torch.float64, requires_grad=True)
    never = Kept((), lambda: pytest.fail("restored"))
    with saved_as(x, never):
        y = other.square() + x[:2].square().sum()  # x[:2] begins where x does, but is not x
    (y + x.square()).sum().backward()
    torch.testing.assert_close(other.grad, 2 * other.detach())
    torch.testing.assert_close(x.grad[2:], 2 * x.detach()[2:])


def test_saved_as_under_activation_checkpointing():
    x = torch.randn(4, 128, dtype=torch.float64, requires_grad=True)

    def block(x):
        h = x * 2
        with saved_as(h, recomputed(lambda x: x * 2, x)):
            return h.square()

    checkpoint(block, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, 8 * x.detach())


def test_restore_outlives_what_it_restores_from():
    x = torch.randn(4, 128)
    storage = weakref.ref(x.untyped_storage())
    kept = recomputed(torch.neg, x)
    restore = kept.restore
    del x, kept
    gc.collect()
    assert storage() is None
    assert torch.equal(restore(torch.ones(2)), -torch.ones(2))


def test_the_format_is_that_of_dispatch():
    x = torch.randn(4, 256)
    kept, wanted = in_fp8(x).tensors, quantize(x)
    assert torch.equal(kept[0].view(torch.uint8), wanted.values.view(torch.uint8))
    assert torch.equal(kept[1], wanted.scales)
