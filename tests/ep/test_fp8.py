"""1x128 block quantisation: exact scales, half-step errors, and its gradient."""

from __future__ import annotations

import pytest
import torch

from dualpipe_ext.ep.fp8 import BLOCK, Quantized, StraightThroughDequantize, dequantize, quantize


def _random(rows: int, hidden: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(0)
    # Blocks of very different size: each has its own scale.
    size = 10.0 ** torch.arange(-6, 6).repeat(rows * hidden)[: rows * hidden // BLOCK]
    blocks = torch.randn(rows * hidden // BLOCK, BLOCK, generator=gen) * size.unsqueeze(1)
    return blocks.view(rows, hidden)


@pytest.mark.parametrize("pow2_scales", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_half_a_step(pow2_scales: bool, dtype: torch.dtype) -> None:
    """E4M3 has 3 fraction bits: relative error 2^-4, or half the smallest step 2^-9 of the scale.

    A quarter of a per mille of each covers the float32 roundings of scale and product.
    """
    x = _random(6, 512).to(dtype)
    q = quantize(x, pow2_scales=pow2_scales)
    assert q.values.dtype == torch.float8_e4m3fn
    assert q.values.shape == x.shape
    assert q.scales.shape == (6, 4)
    error = (dequantize(q, torch.float32) - x.float()).abs()
    step = q.scales.repeat_interleave(BLOCK, dim=1) * 2.0**-10
    assert (error <= torch.maximum(x.float().abs() * 2.0**-4, step) * 1.00025).all()


def test_scales() -> None:
    x = _random(6, 512)
    amax = x.view(6, 4, BLOCK).abs().amax(-1)
    plain, pow2 = quantize(x).scales, quantize(x, pow2_scales=True).scales
    torch.testing.assert_close(plain, amax / 448, rtol=2.0**-22, atol=0)
    # A power of two, not below the plain scale and less than twice it.
    assert (torch.frexp(pow2).mantissa == 0.5).all()
    exact = amax.double() / 448
    assert ((pow2 >= exact) & (pow2 < 2 * exact)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("pow2_scales", [False, True])
def test_a_gpu_gives_the_same_bits(pow2_scales: bool) -> None:
    x = (_random(300, 512) * torch.logspace(-6, 6, 300)[:, None]).bfloat16()
    here, there = (quantize(t, pow2_scales=pow2_scales) for t in (x, x.cuda()))
    assert torch.equal(here.scales, there.scales.cpu())
    assert torch.equal(here.values.view(torch.uint8), there.values.view(torch.uint8).cpu())


def test_exact_powers_of_two_are_not_doubled() -> None:
    x = torch.zeros(1, BLOCK)
    x[0, 0] = 448.0 / 4
    assert quantize(x, pow2_scales=True).scales.item() == 0.25


@pytest.mark.parametrize("pow2_scales", [False, True])
def test_zero_and_tiny_blocks(pow2_scales: bool) -> None:
    x = torch.zeros(2, BLOCK)
    x[1] = 2.0**-130
    q = quantize(x, pow2_scales=pow2_scales)
    assert (q.scales > 0).all()
    assert not q.values.float().any()
    empty = quantize(torch.empty(0, 256))
    assert (empty.values.shape, empty.scales.shape) == ((0, 256), (0, 2))


def test_not_a_number_stays_visible() -> None:
    x = torch.zeros(1, BLOCK)
    x[0, 3] = float("nan")
    assert dequantize(quantize(x)).isnan().any()


def test_hidden_must_be_whole_blocks() -> None:
    with pytest.raises(ValueError, match="expected a hidden size that is a multiple of 128"):
        quantize(torch.zeros(1, 100))


def test_gradient_passes_the_quantisation_by() -> None:
    q = quantize(_random(2, 256))
    carrier = torch.zeros((), dtype=torch.bfloat16).expand(2, 256).requires_grad_()
    rows = StraightThroughDequantize.apply(carrier, *q, torch.float32)
    assert torch.equal(rows, dequantize(Quantized(*q), torch.float32))
    grad = _random(2, 256)
    rows.backward(grad)
    assert torch.equal(carrier.grad, grad.bfloat16())
