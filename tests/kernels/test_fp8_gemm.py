"""FP8 products: the torch operations that define them, and the quantising kernels interpreted.

The interpreter's own cast to FP8 is wrong, so there the kernels write float32: the numbers before
the cast, which torch then casts. The products are interpreted in test_persistent_gemm.py; all of it
on the GPU's FP8 units is in tests/gpu.
"""

from __future__ import annotations

import os

import pytest
import torch
from dualpipe_ext.kernels import fp8_gemm
from dualpipe_ext.kernels.fp8_gemm import (
    QuantizedWeights,
    grouped_mm_fp8,
    grouped_mm_fp8_weight_grad,
    quantize_columns,
    quantize_weights,
)

from dualpipe_ext.ep.fp8 import Quantized, quantize
from tests.kernels.gemm_cases import (
    ENDS,
    padded_blocks,
    powers_of_two,
    product_by_columns,
    product_by_rows,
    spread,
    turned,
    whole_numbers,
)

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
ends_and_rows = pytest.mark.parametrize(("ends", "num_rows"), ENDS, ids=str)
E4M3 = torch.float8_e4m3fn


def int32(ends):
    return torch.tensor(ends, dtype=torch.int32)


def blocks_of_all_sizes(*shape):
    """Normal numbers times powers of ten that differ from 128 x 128 block to block."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    sizes = 10.0 ** torch.linspace(-30, 30, x.numel() // 2**14).view(
        *shape[:-2], shape[-2] // 128, shape[-1] // 128
    )
    return x * spread(sizes, -1, -2).float()


def rows_of(num_rows, size, seed):
    """Quantised rows with whole numbers as values: every product of them is exact."""
    values = whole_numbers((num_rows, size), 4, seed).to(E4M3)
    return Quantized(values, powers_of_two((num_rows, size // 128), seed + 100))


def weights_of(num_groups, size_k, size_n, seed):
    values = whole_numbers((num_groups, size_n, size_k), 4, seed).to(E4M3)
    scales = powers_of_two((num_groups, size_k // 128, size_n // 128), seed + 100)
    return QuantizedWeights(values.transpose(1, 2), scales)


def exact(x):
    return x.values.double() * spread(x.scales, 1)


def test_weights_are_near_and_the_same_in_both_directions():
    w = blocks_of_all_sizes(3, 256, 384)
    forward, backward = quantize_weights(w)
    assert forward.values.shape == w.shape
    assert forward.scales.shape == (3, 2, 3)
    assert forward.values.stride(1) == 1
    assert backward.values.stride(1) == 1
    assert torch.equal(backward.values.float(), forward.values.float().transpose(1, 2))
    assert torch.equal(backward.scales, forward.scales.transpose(1, 2))
    assert (torch.frexp(forward.scales).mantissa == 0.5).all()
    spread_scales = spread(forward.scales, 1, 2)
    error = (forward.values.double() * spread_scales - w.double()).abs()
    # Three bits of mantissa; below 2^-6 the steps are 2^-9.
    assert (error <= torch.maximum(w.abs().double() / 16, spread_scales * 2.0**-10)).all()
    # The largest value of a block is more than half of what its scale can hold.
    largest = forward.values.float().abs().view(3, 2, 128, 3, 128).amax(dim=(2, 4))
    assert ((largest >= 224) & (largest <= 448)).all()


def test_docstring_example():
    w = torch.zeros(1, 128, 128)
    w[0, 0, :3] = torch.tensor([1.0, -0.5, 0.3])
    forward, _ = quantize_weights(w)
    assert forward.scales.item() == 1 / 256
    assert forward.values[0, 0, :4].tolist() == [256, -128, 80, 0]


@ends_and_rows
def test_columns_hold_the_rows_group_by_group(ends, num_rows):
    x = quantize(blocks_of_all_sizes(384, 256)[:num_rows], pow2_scales=True)
    columns = quantize_columns(x, int32(ends))
    num_blocks = num_rows // 128 + len(ends)
    assert columns.values.shape == (256, 128 * num_blocks)
    assert columns.scales.shape == (num_blocks, 256)
    blocks = padded_blocks(ends)
    used = 128 * len(blocks)
    scales = spread(columns.scales.t(), 1)[:, :used]
    error = columns.values[:, :used].double() * scales
    error -= turned(exact(x), ends, num_blocks)[:, :used]
    # E4M3 values times a power of two are E4M3 values again, but for those that are too small.
    assert (error.abs() <= scales * 2.0**-10).all()
    assert (torch.frexp(columns.scales[: len(blocks)]).mantissa == 0.5).all()


@ends_and_rows
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_product(ends, num_rows, out_dtype):
    x, w = rows_of(num_rows, 256, seed=0), weights_of(len(ends), 256, 384, seed=1)
    out = grouped_mm_fp8(x, w, int32(ends), out_dtype=out_dtype)
    want = product_by_rows(exact(x), w.values.double() * spread(w.scales, 1, 2), ends)
    assert torch.equal(out, want.to(out_dtype))


@ends_and_rows
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float64], ids=str)
def test_weight_grad(ends, num_rows, out_dtype):
    # 0 and powers of two: quantised again in columns, they stay what they are.
    x, grad = (
        Quantized(powers_of_two((num_rows, n), n).to(E4M3), powers_of_two((num_rows, n // 128), n))
        for n in (256, 128)
    )
    out = grouped_mm_fp8_weight_grad(x, grad, int32(ends), out_dtype=out_dtype)
    assert torch.equal(out, product_by_columns(exact(x), exact(grad), ends).to(out_dtype))


def test_error_of_both_products_is_that_of_the_format():
    """Three bits of mantissa in either operand: 1/16 each at most, and their product."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(300, n, generator=generator) for n in (256, 128))
    w, ends = torch.randn(2, 256, 128, generator=generator), [170, 300]
    rows, grads = quantize(x, pow2_scales=True), quantize(grad, pow2_scales=True)
    # And what values lose that are too small for their scale: 2^-18 of the block's largest.
    relative = 2 / 16 + 1 / 256 + 2.0**-9
    out = grouped_mm_fp8(rows, quantize_weights(w)[0], int32(ends), out_dtype=torch.float64)
    error = (out - product_by_rows(x, w, ends)).abs()
    assert (error <= relative * product_by_rows(x.abs(), w.abs(), ends)).all()
    out = grouped_mm_fp8_weight_grad(rows, grads, int32(ends), out_dtype=torch.float64)
    error = (out - product_by_columns(x, grad, ends)).abs()
    assert (error <= relative * product_by_columns(x.abs(), grad.abs(), ends)).all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weights_kernel_equals_the_definition(dtype):
    w = blocks_of_all_sizes(3, 256, 384).clamp(-60000, 60000).to(dtype)
    values, turned_values = torch.empty(w.shape), torch.empty(3, 384, 256)
    scales = torch.empty(3, 2, 3)
    fp8_gemm.quantize_weights_into(w, values, turned_values, scales)
    forward, _ = quantize_weights(w)
    assert torch.equal(scales, forward.scales)
    assert torch.equal(values.to(E4M3).float(), forward.values.float())
    assert torch.equal(turned_values.to(E4M3).transpose(1, 2).float(), forward.values.float())
    assert torch.equal(values, w.float() / spread(scales, 1, 2).float())


@interpreted
@ends_and_rows
def test_columns_kernel_equals_the_definition(ends, num_rows):
    x = quantize(blocks_of_all_sizes(384, 256)[:num_rows], pow2_scales=True)
    num_blocks = num_rows // 128 + len(ends)
    values, scales = torch.full((256, 128 * num_blocks), -7.0), torch.full((num_blocks, 256), -7.0)
    fp8_gemm.quantize_columns_into(x.values, x.scales, int32(ends), values, scales)
    want, used = quantize_columns(x, int32(ends)), len(padded_blocks(ends))
    assert torch.equal(scales[:used], want.scales[:used])
    got = values[:, : 128 * used].to(E4M3).float()
    assert torch.equal(got, want.values[:, : 128 * used].float())
    assert (scales[used:] == -7).all()
    assert (values[:, 128 * used :] == -7).all()


def test_no_rows():
    offsets = int32([0, 0])
    x, grad = quantize(torch.zeros(0, 256)), quantize(torch.zeros(0, 128))
    w, _ = quantize_weights(torch.ones(2, 256, 128))
    assert grouped_mm_fp8(x, w, offsets).shape == (0, 128)
    assert torch.equal(
        grouped_mm_fp8_weight_grad(x, grad, offsets), torch.zeros(2, 256, 128).bfloat16()
    )


GOOD = {"x": rows_of(6, 256, 0), "w": weights_of(2, 256, 128, 0), "offsets": int32([2, 6])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": Quantized(torch.zeros(6, 256), GOOD["x"].scales)}, "values float8_e4m3fn"),
        ({"x": Quantized(GOOD["x"].values[:, :100], GOOD["x"].scales)}, "multiple of 128"),
        ({"x": Quantized(GOOD["x"].values, GOOD["x"].scales[:, :1])}, "expected scales float32"),
        ({"x": Quantized(GOOD["x"].values[::2], GOOD["x"].scales[::2])}, "contiguous values"),
        ({"w": weights_of(3, 256, 128, 0)}, "expected weights float8_e4m3fn .2, 256, N."),
        ({"w": weights_of(2, 128, 128, 0)}, "expected weights float8_e4m3fn .2, 256, N."),
        (
            {"w": QuantizedWeights(GOOD["w"].values.contiguous(), GOOD["w"].scales)},
            "transpose contiguous",
        ),
        ({"w": QuantizedWeights(GOOD["w"].values, GOOD["w"].scales[:1])}, "weights' scales"),
        ({"offsets": torch.tensor([2, 6])}, "offsets int32"),
        ({"max_sms": -1}, "max_sms of at least 1, or 0 for short CTAs, got -1"),
    ],
)
def test_bad_input(change, message):
    arguments = {**GOOD, **change}
    with pytest.raises(ValueError, match=message):
        grouped_mm_fp8(**arguments)
    if "w" not in change:
        del arguments["w"]
        grad = rows_of(6, 128, 1)
        with pytest.raises(ValueError, match=message):
            grouped_mm_fp8_weight_grad(grad=grad, **arguments)


def test_bad_weights_and_grad():
    for bad in (torch.zeros(2, 128, 100), torch.zeros(128, 128), torch.zeros(1, 128, 128).int()):
        with pytest.raises(ValueError, match="expected floating weights"):
            quantize_weights(bad)
    with pytest.raises(ValueError, match="expected grad with 6 rows, got 5"):
        grouped_mm_fp8_weight_grad(GOOD["x"], rows_of(5, 128, 1), GOOD["offsets"])
