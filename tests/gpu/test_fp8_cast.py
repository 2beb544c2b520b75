"""The FP8 kernels on a GPU: the bits that the torch operations give on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from dualpipe_ext.kernels import fp8_cast

from dualpipe_ext.ep import fp8

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
pow2_or_not = pytest.mark.parametrize("pow2_scales", [False, True], ids=["plain", "pow2"])


def random_blocks(rows, hidden):
    """Blocks of very different size, from far below the smallest to near float32's largest."""
    gen = torch.Generator().manual_seed(0)
    num = rows * hidden // fp8.BLOCK
    size = 10.0 ** torch.linspace(-42, 37, num, dtype=torch.float64)
    return (torch.randn(num, fp8.BLOCK, generator=gen) * size[:, None]).float().view(rows, hidden)


def same_bits(got, want):
    return torch.equal(got.cpu().view(torch.uint8), want.view(torch.uint8))


@pow2_or_not
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 128), (77, 384), (256, 7168)])
def test_quantize(pow2_scales, dtype, rows, hidden):
    x = random_blocks(rows, hidden)
    x = (x.clamp(-60000, 60000) if dtype == torch.float16 else x).to(dtype)
    assert fp8._kernels_for(x.cuda()) is fp8_cast
    want = fp8.quantize(x, pow2_scales=pow2_scales)
    got = fp8.quantize(x.cuda(), pow2_scales=pow2_scales)
    assert torch.equal(got.scales.cpu(), want.scales)
    assert same_bits(got.values, want.values)


@pow2_or_not
def test_every_rounding_of_the_largest_magnitude(pow2_scales):
    """Around 448, where a power of two is rounded up, and elsewhere; values on and off the ties."""
    everywhere = torch.arange(0x3F800000, 0x40000000, 997)
    bits = torch.cat([torch.arange(0x43DFFF00, 0x43E00100), everywhere])
    amax = bits.to(torch.int32).view(torch.float32)[:, None]
    # Ties of E4M3 and numbers between them, whole multiples of its steps, and its subnormals.
    steps = torch.arange(-63, 65) / torch.tensor([64.0, 448.0, 448.0 * 512])[:, None, None]
    x = (amax * steps).reshape(-1, fp8.BLOCK)
    want = fp8.quantize(x, pow2_scales=pow2_scales)
    got = fp8.quantize(x.cuda(), pow2_scales=pow2_scales)
    assert torch.equal(got.scales.cpu(), want.scales)
    assert same_bits(got.values, want.values)


@pow2_or_not
def test_infinity_and_nan(pow2_scales):
    x = torch.ones(4, 128)
    x[0, 3], x[1, 4], x[2, 5] = math.inf, math.nan, -math.inf
    want = fp8.quantize(x, pow2_scales=pow2_scales)
    got = fp8.quantize(x.cuda(), pow2_scales=pow2_scales)
    assert torch.equal(got.scales.cpu().nan_to_num(-1), want.scales.nan_to_num(-1))
    assert got.values.float().isnan().any(1).tolist()[1::2] == [True, False]
    assert same_bits(got.values[3], want.values[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(dtype):
    values = torch.arange(256, dtype=torch.uint8).repeat(99).view(33, 768)
    values = values.view(torch.float8_e4m3fn)
    scales = torch.logspace(-38, 34, 198).view(33, 6)
    want = fp8.dequantize(fp8.Quantized(values, scales), dtype)
    quantized = fp8.Quantized(values.cuda(), scales.cuda())
    assert fp8._kernels_for(*quantized) is fp8_cast
    got = fp8.dequantize(quantized, dtype).cpu()
    assert torch.equal(got.isnan(), want.isnan())
    number = ~want.isnan()
    assert same_bits(got[number], want[number])


def test_rows_of_a_larger_tensor():
    x = random_blocks(40, 512).bfloat16()
    part = x[::2, 128:384]
    want = fp8.quantize(part)
    got = fp8.quantize(x.cuda()[::2, 128:384])
    assert torch.equal(got.scales.cpu(), want.scales)
    assert same_bits(got.values, want.values)


def test_no_rows_and_bad_hidden():
    values, scales = fp8.quantize(torch.empty(0, 256, device="cuda"))
    assert (values.shape, scales.shape) == ((0, 256), (0, 2))
    assert fp8.dequantize(fp8.Quantized(values, scales)).shape == (0, 256)
    with pytest.raises(ValueError, match="expected a hidden size that is a multiple of 128"):
        fp8.quantize(torch.zeros(1, 100, device="cuda"))


def test_more_than_2_to_31_elements():
    x = torch.zeros(2**19 + 3, 4096, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.arange(-2048, 2048, device="cuda")
    want = fp8.quantize(x[-1:].cpu())
    values, scales = fp8.quantize(x)
    assert same_bits(values[-1:], want.values)
    assert torch.equal(scales[-1:].cpu(), want.scales)
    assert not values[:-1].view(torch.uint8).any()
    del x
    back = fp8.dequantize(fp8.Quantized(values, scales))
    assert same_bits(back[-1:], fp8.dequantize(want))
    assert not back[:-1].any()
