"""The FP8 grouped layer: which products it takes, when, and from which weights."""

from __future__ import annotations

import pytest
import torch
from dualpipe_ext.kernels.fp8_gemm import (
    grouped_mm_fp8,
    grouped_mm_fp8_weight_grad,
    quantize_weights,
)
from torch.utils.checkpoint import checkpoint

from dualpipe_ext.ep.fp8 import quantize
from dualpipe_ext.memory import recomputed
from dualpipe_ext.pipeline import fp8_linear
from dualpipe_ext.pipeline.fp8_linear import (
    forget_quantized,
    grouped_linear_fp8,
    quantized_weights,
)
from dualpipe_ext.pipeline.weight_grad import WeightGradStore, grouped_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
OFFSETS = torch.tensor([130, 130, 200], dtype=torch.int32)  # of 210 rows


def leaves(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(210, 256, generator=generator).to(dtype).requires_grad_()
    w = torch.randn(3, 256, 128, generator=generator).to(dtype).requires_grad_()
    return x, w, torch.randn(210, 128, generator=generator).to(dtype)


@pytest.fixture
def count_quantized(monkeypatch):
    """Number of times that weights were quantised."""
    calls = []

    def counting(w):
        calls.append(w)
        return quantize_weights(w)

    monkeypatch.setattr(fp8_linear, "quantize_weights", counting)
    return lambda: len(calls)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_three_products(dtype):
    x, w, grad = leaves(dtype)
    out = grouped_linear_fp8(x, w, OFFSETS)
    out.backward(grad)
    rows, grads = (quantize(t.detach(), pow2_scales=True) for t in (x, grad))
    forward, backward = quantize_weights(w.detach())
    assert torch.equal(out, grouped_mm_fp8(rows, forward, OFFSETS, out_dtype=dtype))
    assert torch.equal(x.grad, grouped_mm_fp8(grads, backward, OFFSETS, out_dtype=dtype))
    want = grouped_mm_fp8_weight_grad(rows, grads, OFFSETS, out_dtype=dtype)
    assert torch.equal(w.grad, want)
    assert not out[200:].any()
    assert not x.grad[200:].any()
    assert not w.grad[1].any()


def test_near_the_layer_that_does_not_quantise():
    """As near as three bits of mantissa in both operands make it, at random."""
    found = {}
    for layer in (grouped_linear, grouped_linear_fp8):
        x, w, grad = leaves(torch.float64)
        out = layer(x, w, OFFSETS)
        out.backward(grad)
        found[layer] = (out.detach(), x.grad, w.grad)
    for got, want in zip(found[grouped_linear_fp8], found[grouped_linear], strict=True):
        error = (got - want).norm() / want.norm()
        # A rounding error is uniform within 1/16 of the value: 0.036 in the root mean square for
        # values just above a power of two, half of it just below; twice, for two operands.
        assert 0.01 < error < 0.036 * 2**0.5


def test_deferred_weight_gradient_arrives_with_its_w():
    x, w, grad = leaves()
    grouped_linear_fp8(x, w, OFFSETS).backward(grad)
    want, want_x, w.grad, x.grad = w.grad, x.grad, None, None
    store = WeightGradStore()
    with store.deferring(0):
        grouped_linear_fp8(x, w, OFFSETS).backward(grad)
    assert w.grad is None
    assert torch.equal(x.grad, want_x)
    store.run(0)
    assert torch.equal(w.grad, want)


def test_weights_are_quantised_once_until_they_change(count_quantized):
    x, w, grad = leaves()
    for _ in range(3):
        grouped_linear_fp8(x, w, OFFSETS).backward(grad)
    assert count_quantized() == 1
    torch.optim.AdamW([w]).step()
    grouped_linear_fp8(x, w, OFFSETS).backward(grad)
    assert count_quantized() == 2
    # As a migration of experts does.
    w.detach().index_copy_(0, torch.tensor([1]), torch.zeros(1, 256, 128))
    assert not quantized_weights(w)[0].values[1].any()
    assert count_quantized() == 3


def test_what_no_version_tells_has_to_be_told(count_quantized):
    _, w, _ = leaves()
    before = quantized_weights(w)
    w.data.zero_()
    assert quantized_weights(w) is before
    forget_quantized(w)
    assert not quantized_weights(w)[0].values.any()
    # Other memory under the same parameter is seen.
    w.data = torch.ones_like(w)
    assert quantized_weights(w)[0].values.all()
    assert count_quantized() == 3


def test_quantised_copies_go_with_their_weights():
    before = len(fp8_linear._kept)
    _, w, _ = leaves()
    quantized_weights(w)
    assert len(fp8_linear._kept) == before + 1
    del w
    assert len(fp8_linear._kept) == before


def test_changing_weights_before_the_backward_is_refused():
    x, w, grad = leaves()
    out = grouped_linear_fp8(x, w, OFFSETS)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(grad)


def test_rows_are_kept_in_fp8():
    kept = []
    x, w, _ = leaves()
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        grouped_linear_fp8(x * 1, w, OFFSETS)
    shapes = {(tuple(t.shape), t.dtype) for t in kept if isinstance(t, torch.Tensor)}
    assert ((210, 256), torch.float8_e4m3fn) in shapes
    assert ((210, 256), torch.float32) not in shapes


@pytest.mark.parametrize("deferred", [False, True])
def test_rows_kept_in_another_way_are_quantised_again(deferred):
    source, w, grad = leaves(torch.bfloat16)
    grouped_linear_fp8(source.sin(), w, OFFSETS).backward(grad)
    want, source.grad, w.grad = (source.grad, w.grad), None, None
    saved, store = [], WeightGradStore()
    x = source.sin()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = grouped_linear_fp8(x, w, OFFSETS, kept=recomputed(torch.sin, source))
    assert source.data_ptr() in [t.data_ptr() for t in saved]
    assert all(t.dtype != torch.float8_e4m3fn for t in saved)
    if deferred:
        with store.deferring(0):
            out.backward(grad)
        assert w.grad is None
        store.run(0)
    else:
        out.backward(grad)
    assert torch.equal(source.grad, want[0])
    assert torch.equal(w.grad, want[1])


def test_a_deferred_gradient_waits_with_the_least_memory():
    """Quantised rows, where what they are made from is larger."""
    source, w, grad = leaves(torch.bfloat16)
    calls = []

    def counted(x):
        calls.append(x)
        return x.sin()

    store = WeightGradStore()
    with store.deferring(0):
        x = source.sin()
        grouped_linear_fp8(x, w, OFFSETS, kept=recomputed(counted, source)).backward(grad)
    assert len(calls) == 1
    store.run(0)
    assert len(calls) == 1


def test_computed_and_frozen_weights():
    x, base, grad = leaves()
    store = WeightGradStore()
    with store.deferring(0):
        grouped_linear_fp8(x, base * 1, OFFSETS).backward(grad)
    assert len(store) == 0
    want, base.grad = base.grad, None
    grouped_linear_fp8(x.detach(), base, OFFSETS).backward(grad)
    assert torch.equal(base.grad, want)
    x.grad = None
    grouped_linear_fp8(x, base.detach(), OFFSETS).backward(grad)
    assert x.grad is not None


def test_activation_checkpointing_and_autocast():
    x, w, grad = leaves()
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped_linear_fp8(x, w, OFFSETS)
    assert out.dtype == torch.bfloat16
    out.backward(grad.bfloat16())
    assert (x.grad.dtype, w.grad.dtype) == (torch.float32, torch.float32)
    x.grad = w.grad = None
    grouped_linear_fp8(x, w, OFFSETS).backward(grad)
    want, x.grad, w.grad = (x.grad, w.grad), None, None
    checkpoint(grouped_linear_fp8, x, w, OFFSETS, use_reentrant=False).backward(grad)
    assert torch.equal(x.grad, want[0])
    assert torch.equal(w.grad, want[1])


def test_bad_sizes():
    x, w, _ = leaves()
    with pytest.raises(ValueError, match="multiple of 128 for FP8, got 250"):
        grouped_linear_fp8(x[:, :250], w, OFFSETS)
    with pytest.raises(ValueError, match="multiples of 128"):
        grouped_linear_fp8(x, w[..., :100], OFFSETS)
    with pytest.raises(ValueError, match="max_sms of at least 1"):
        grouped_linear_fp8(x, w, OFFSETS, max_sms=-1)


def test_a_limit_is_asked_for_at_every_product(monkeypatch):
    from dualpipe_ext.pipeline import fp8_linear

    limits, asked = [], iter((7, 8, 9))
    for name in ("grouped_mm_fp8", "grouped_mm_fp8_weight_grad"):
        real = getattr(fp8_linear, name)

        def limited(*args, real=real, max_sms, **how):
            limits.append(max_sms)
            return real(*args, **how)

        monkeypatch.setattr(fp8_linear, name, limited)
    x, w, grad = leaves()
    out = grouped_linear_fp8(x, w, OFFSETS, max_sms=lambda: next(asked))
    assert limits == [7]
    out.backward(grad)
    assert limits == [7, 8, 9]
