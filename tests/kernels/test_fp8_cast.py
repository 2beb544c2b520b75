"""The FP8 kernels in the interpreter, against what ``dualpipe_ext.ep.fp8`` defines.

The kernels run with ``TRITON_INTERPRET=1`` only; on CPU tensors ``ep.fp8`` never calls them. The
interpreter's own cast to FP8 is wrong where rounding carries into the exponent, so what is compared
is everything up to it: the definition's numbers before the cast go through the same cast. That the
compiled kernels use the hardware's cast is in test_compile.py, and its bits in tests/gpu.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from dualpipe_ext.kernels import fp8_cast

from dualpipe_ext.ep import fp8

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
pow2_or_not = pytest.mark.parametrize("pow2_scales", [False, True], ids=["plain", "pow2"])


@triton.jit
def _cast_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < size, other=0.0)
    tl.store(out_ptr + at, x.to(tl.float8e4nv), at < size)


def interpreters_cast(x):
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    _cast_kernel[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), BLOCK=1024)
    return out


def inverse_of(x, pow2_scales):
    """The definition's factor of each block, from its scales, by another way than the kernel's."""
    if pow2_scales:
        return 1.0 / fp8.quantize(x, pow2_scales=True).scales
    amax = x.view(*x.shape[:-1], -1, fp8.BLOCK).float().abs().amax(-1)
    return amax.clamp_min(fp8.SMALLEST_AMAX).reciprocal() * fp8.E4M3_MAX


def quantize(x, pow2_scales):
    return fp8_cast.quantize_blocks(x, smallest_amax=fp8.SMALLEST_AMAX, pow2_scales=pow2_scales)


def random_blocks(rows, hidden):
    """Blocks of very different size, from far below the smallest to near float32's largest."""
    gen = torch.Generator().manual_seed(0)
    num = rows * hidden // fp8.BLOCK
    size = 10.0 ** torch.linspace(-42, 37, num, dtype=torch.float64)
    return (torch.randn(num, fp8.BLOCK, generator=gen) * size[:, None]).float().view(rows, hidden)


def same_bits(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_constants_are_those_of_the_definition():
    assert (fp8_cast.BLOCK, fp8_cast.E4M3_MAX) == (fp8.BLOCK, fp8.E4M3_MAX)


# 1, 15 and 120 blocks: one program that is not full, and several.
@interpreted
@pow2_or_not
@pytest.mark.parametrize(("rows", "hidden"), [(1, 128), (5, 384), (60, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_quantize_equals_the_definition(pow2_scales, rows, hidden, dtype):
    x = random_blocks(rows, hidden)
    x = (x.clamp(-60000, 60000) if dtype == torch.float16 else x).to(dtype)
    want = fp8.quantize(x, pow2_scales=pow2_scales)
    values, scales = quantize(x, pow2_scales)
    assert torch.equal(scales, want.scales)
    blocks = x.float().view(rows, -1, fp8.BLOCK) * inverse_of(x, pow2_scales).unsqueeze(-1)
    # The numbers before the cast are the definition's: cast by torch, they give its values.
    assert same_bits(blocks.to(torch.float8_e4m3fn).view(rows, hidden), want.values)
    assert same_bits(values, interpreters_cast(blocks).view(rows, hidden))


@interpreted
@pow2_or_not
def test_every_fraction_of_the_largest_magnitude(pow2_scales):
    """Around 448, where a power of two is rounded up, and elsewhere: scales to the last bit."""
    everywhere = torch.arange(0x3F800000, 0x40000000, 4099)
    bits = torch.cat([torch.arange(0x43DFFF00, 0x43E00100), everywhere])
    x = torch.zeros(len(bits), fp8.BLOCK)
    x[:, 5] = -bits.to(torch.int32).view(torch.float32)
    _, scales = quantize(x, pow2_scales)
    assert torch.equal(scales, fp8.quantize(x, pow2_scales=pow2_scales).scales)


@interpreted
def test_example_of_the_docstrings():
    x = torch.zeros(1, 128)
    x[0, :3] = torch.tensor([1.0, -0.5, 0.3])
    values, scales = quantize(x, False)
    assert values.float()[0, :4].tolist() == [448, -224, 128, 0]
    assert scales.item() == torch.tensor(1 / 448).item()
    values, scales = quantize(x, True)
    assert values.float()[0, :4].tolist() == [256, -128, 80, 0]
    assert scales.item() == 1 / 256
    values = torch.zeros(1, 128)
    values[0, :3] = torch.tensor([448.0, -224.0, 128.0])
    out = fp8_cast.dequantize_blocks(values.to(torch.float8_e4m3fn), scales, torch.float32)
    assert out[0, :4].tolist() == [1.75, -0.875, 0.5, 0]


@interpreted
@pow2_or_not
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_infinity_and_nan_have_the_definitions_scales(pow2_scales):
    x = torch.ones(4, 128)
    x[0, 3], x[1, 4], x[2, 5] = math.inf, math.nan, -math.inf
    _, scales = quantize(x, pow2_scales)
    want = fp8.quantize(x, pow2_scales=pow2_scales).scales
    assert torch.equal(scales.nan_to_num(-1), want.nan_to_num(-1))
    assert scales.isnan().any() != pow2_scales


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dequantize_equals_the_definition(dtype):
    # Every code but the two of NaN, which the interpreter reads as 480.
    codes = torch.arange(256, dtype=torch.uint8)
    codes = torch.where(codes & 0x7F == 0x7F, 0, codes).repeat(33).view(33, 256)
    values = codes.view(torch.float8_e4m3fn)
    scales = torch.logspace(-38, 34, 66).view(33, 2)
    want = fp8.dequantize(fp8.Quantized(values, scales), dtype)
    assert torch.equal(fp8_cast.dequantize_blocks(values, scales, dtype), want)
    transposed = scales.t().contiguous().t()
    assert torch.equal(fp8_cast.dequantize_blocks(values, transposed, dtype), want)


@interpreted
def test_strided_rows_and_no_rows():
    x = random_blocks(6, 256)
    for got, want in zip(quantize(x[::2], False), quantize(x[::2].clone(), False), strict=True):
        assert same_bits(got, want)
    values, scales = quantize(torch.zeros(0, 256), True)
    assert (values.shape, scales.shape) == ((0, 256), (0, 2))
    assert fp8_cast.dequantize_blocks(values, scales, torch.float32).shape == (0, 256)


def test_bad_input():
    with pytest.raises(ValueError, match="hidden size that is a multiple of 128"):
        quantize(torch.zeros(2, 100), False)
    with pytest.raises(ValueError, match="expected x in one of"):
        quantize(torch.zeros(2, 128, dtype=torch.int32), False)
    values = torch.zeros(2, 128).to(torch.float8_e4m3fn)
    for scales in (torch.zeros(2), torch.zeros(2, 1).double()):
        with pytest.raises(ValueError, match="expected scales float32"):
            fp8_cast.dequantize_blocks(values, scales, torch.float32)
    with pytest.raises(ValueError, match="expected values float8_e4m3fn"):
        fp8_cast.dequantize_blocks(values, torch.zeros(2, 1), torch.int8)
