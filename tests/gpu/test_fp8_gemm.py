"""FP8 products on the FP8 units: exact where sums are exact, and within what the units round.

The matrix units bring the 32 products of an instruction and the running sum to the exponent of the
largest of them and keep 13 bits below it (DeepSeek-V3 report, section 3.5.2). The largest is at
most S, the sum of the magnitudes of all products; so the sum of 128 products, four steps of
33 terms, is off by 4 * 33 * 2^-13 * S at most.
"""

from __future__ import annotations

import pytest
import torch
from dualpipe_ext.kernels import persistent_gemm
from dualpipe_ext.kernels.fp8_gemm import (
    QuantizedWeights,
    grouped_mm_fp8,
    grouped_mm_fp8_weight_grad,
    quantize_columns,
    quantize_weights,
)

from dualpipe_ext.ep.fp8 import Quantized, quantize
from dualpipe_ext.pipeline.fp8_linear import grouped_linear_fp8
from dualpipe_ext.pipeline.weight_grad import WeightGradStore
from tests.kernels.gemm_cases import (
    ENDS,
    padded_blocks,
    powers_of_two,
    product_by_columns,
    product_by_rows,
    spread,
    whole_numbers,
)

# More groups than a warp has threads, and more rows than a sweep of tiles has.
MANY = [([3 * g for g in range(200)], 640), ([2, 2600, 2600], 2700)]
ends_and_rows = pytest.mark.parametrize(
    ("ends", "num_rows"), [*ENDS, *MANY], ids=lambda value: str(value)[:24]
)
SMS = [1, 2, 7, 131, 132, None]
OUT_DTYPES = [torch.bfloat16, torch.float16, torch.float32]
E4M3 = torch.float8_e4m3fn
UNIT_ERROR = 4 * 33 * 2.0**-13
NORM_ERROR = 2.0**-8


def int32(ends):
    return torch.tensor(ends, dtype=torch.int32)


def on_gpu(tensors):
    return type(tensors)(*(t.cuda() for t in tensors))


def same_bits(got, want):
    return torch.equal(got.cpu().view(torch.uint8), want.view(torch.uint8))


def exact(x):
    return x.values.double() * spread(x.scales, 1)


def exact_weights(w):
    return w.values.double() * spread(w.scales, 1, 2)


def blocks_of_all_sizes(*shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    sizes = 10.0 ** torch.linspace(-30, 30, x.numel() // 2**14)
    sizes = sizes.view(*shape[:-2], shape[-2] // 128, shape[-1] // 128)
    return x * spread(sizes, -1, -2).float()


@pytest.mark.parametrize("dtype", [*OUT_DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 128, 128), (3, 256, 384), (2, 7168, 256)], ids=str)
def test_weights_have_the_bits_of_the_definition(dtype, shape):
    w = blocks_of_all_sizes(*shape)
    w = (w.clamp(-60000, 60000) if dtype == torch.float16 else w).to(dtype)
    assert persistent_gemm.usable_on(torch.device("cuda"))
    for got, want in zip(quantize_weights(w.cuda()), quantize_weights(w), strict=True):
        assert same_bits(got.values.transpose(1, 2), want.values.transpose(1, 2))
        assert torch.equal(got.scales.cpu(), want.scales)


@ends_and_rows
def test_columns_have_the_bits_of_the_definition(ends, num_rows):
    x = quantize(blocks_of_all_sizes(2816, 384)[:num_rows], pow2_scales=True)
    want, used = quantize_columns(x, int32(ends)), len(padded_blocks(ends))
    got = quantize_columns(on_gpu(x), int32(ends).cuda())
    assert got.values.shape == want.values.shape
    assert torch.equal(got.scales[:used].cpu(), want.scales[:used])
    columns = slice(0, 128 * used)
    assert same_bits(got.values[:, columns].contiguous(), want.values[:, columns].contiguous())


@ends_and_rows
@pytest.mark.parametrize(("size_k", "size_n"), [(128, 128), (384, 640), (1024, 128)])
def test_exact_products(ends, num_rows, size_k, size_n):
    values = whole_numbers((num_rows, size_k), 4, seed=0)
    values[ends[-1] :] = float("nan")
    x = Quantized(values.to(E4M3), powers_of_two((num_rows, size_k // 128), 1))
    w_values = whole_numbers((len(ends), size_n, size_k), 4, seed=2).to(E4M3).transpose(1, 2)
    # Scales with other strides, as for the gradient of the input.
    scales = powers_of_two((len(ends), size_n // 128, size_k // 128), 3).transpose(1, 2)
    w = QuantizedWeights(w_values, scales)
    want = product_by_rows(exact(x), exact_weights(w), ends)
    offsets = int32(ends).cuda()
    for out_dtype in OUT_DTYPES:
        for max_sms in SMS if out_dtype == torch.bfloat16 else [None]:
            how = {"out_dtype": out_dtype, "max_sms": max_sms}
            out = grouped_mm_fp8(on_gpu(x), on_gpu(w), offsets, **how)
            assert torch.equal(out.cpu(), want.to(out_dtype)), how


@ends_and_rows
@pytest.mark.parametrize(("size_k", "size_n"), [(128, 128), (384, 256), (2176, 128)])
def test_exact_weight_grads(ends, num_rows, size_k, size_n):
    """Ones and scales of two, whatever their sign: exact, quantised again in columns too."""
    x, grad = (
        Quantized(
            whole_numbers((num_rows, n), 1, n).to(E4M3), powers_of_two((num_rows, n // 128), n)
        )
        for n in (size_k, size_n)
    )
    want = product_by_columns(exact(x), exact(grad), ends)
    offsets = int32(ends).cuda()
    for out_dtype in OUT_DTYPES:
        for max_sms in SMS if out_dtype == torch.bfloat16 else [None]:
            how = {"out_dtype": out_dtype, "max_sms": max_sms}
            out = grouped_mm_fp8_weight_grad(on_gpu(x), on_gpu(grad), offsets, **how)
            assert torch.equal(out.cpu(), want.to(out_dtype)), how


def random_layer(size_k=7168, size_n=512):
    torch.manual_seed(0)
    ends = torch.randint(0, 300, (12,)).cumsum(0).tolist()
    x = torch.randn(ends[-1] + 9, size_k, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(12, size_k, size_n, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(ends[-1] + 9, size_n, device="cuda", dtype=torch.bfloat16)
    return x, w, grad, ends


def test_real_sizes_are_within_what_the_units_round():
    x, w, grad, ends = random_layer()
    offsets = int32(ends).cuda()
    rows, grads = (quantize(t, pow2_scales=True) for t in (x, grad))
    forward, backward = quantize_weights(w)
    for operand, weights in ((rows, forward), (grads, backward)):
        out = grouped_mm_fp8(operand, weights, offsets, out_dtype=torch.float32)
        exact_x, exact_w = exact(operand), exact_weights(weights)
        error = (out - product_by_rows(exact_x, exact_w, ends)).abs()
        assert (error <= UNIT_ERROR * product_by_rows(exact_x.abs(), exact_w.abs(), ends)).all()
        # Truncations seldom agree: far from the bound, and small beside E4M3's own 2^-5.
        assert error.norm() < NORM_ERROR * out.norm()

    out = grouped_mm_fp8_weight_grad(rows, grads, offsets, out_dtype=torch.float32)
    on_cpu = [Quantized(t.values.cpu(), t.scales.cpu()) for t in (rows, grads)]
    # The definition, which the quantised columns equal bit for bit, multiplies in float64.
    want = grouped_mm_fp8_weight_grad(*on_cpu, int32(ends), out_dtype=torch.float64).cuda()
    size = product_by_columns(exact(rows).abs(), exact(grads).abs(), ends)
    # Quantised twice, a magnitude has grown by 1/16 at most.
    assert ((out - want).abs() <= UNIT_ERROR * (17 / 16) ** 2 * size).all()
    assert (out - want).norm() < NORM_ERROR * want.norm()


def test_bits_do_not_depend_on_the_limit():
    x, w, grad, ends = random_layer(size_k=1024)
    offsets = int32(ends).cuda()
    rows, grads = (quantize(t, pow2_scales=True) for t in (x, grad))
    forward, backward = quantize_weights(w)
    for product in (
        lambda sms: grouped_mm_fp8(rows, forward, offsets, max_sms=sms),
        lambda sms: grouped_mm_fp8(grads, backward, offsets, max_sms=sms),
        lambda sms: grouped_mm_fp8_weight_grad(rows, grads, offsets, max_sms=sms),
    ):
        want = product(None)
        for sms in (1, 57, 108, 108):
            assert torch.equal(product(sms), want)


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
def test_layer_equals_the_definition_on_the_cpu(dtype):
    *tensors, ends = random_layer(512)
    x, w, grad = (t.to(dtype) for t in tensors)
    found = {}
    for device in ("cuda", "cpu"):
        leaf_x, leaf_w = (t.detach().to(device).requires_grad_() for t in (x, w))
        store = WeightGradStore()
        out = grouped_linear_fp8(leaf_x, leaf_w, int32(ends).to(device), max_sms=100)
        with store.deferring(0):
            out.backward(grad.to(device))
        assert leaf_w.grad is None
        store.run(0)
        found[device] = [t.cpu().float() for t in (out, leaf_x.grad, leaf_w.grad)]
    for got, want in zip(found["cuda"], found["cpu"], strict=True):
        # As above, and the rounding of either result.
        assert (got - want).norm() < (NORM_ERROR + torch.finfo(dtype).eps) * want.norm()


def test_graph_sees_weights_and_offsets_of_its_replay():
    x, w, _, ends = random_layer(size_k=256)
    offsets = int32(ends).cuda()
    grouped_linear_fp8(x, w, offsets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = grouped_linear_fp8(x, w, offsets)
    w.copy_(torch.randn_like(w))
    offsets[:3] = 5
    graph.replay()
    assert torch.equal(out, grouped_linear_fp8(x, w, offsets))


def test_weights_of_another_stream_are_ready():
    """Quantised late on one stream, they must not be read early on another."""
    x, w, _, ends = random_layer(size_k=256)
    offsets = int32(ends).cuda()
    want = grouped_linear_fp8(x, w.clone(), offsets)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        grouped_linear_fp8(x, w, offsets)
    assert torch.equal(grouped_linear_fp8(x, w, offsets), want)
    torch.cuda.synchronize()


@pytest.mark.parametrize("bad", [[200, 10], [-7, 9999], [2**31 - 1, -(2**31)]], ids=str)
def test_offsets_that_lie_touch_nothing_outside(bad):
    rows = quantize(torch.ones(200, 256, device="cuda"))
    forward, _ = quantize_weights(torch.ones(2, 256, 128, device="cuda"))
    around = [torch.full((2**20,), 7.0, device="cuda") for _ in range(2)]
    grouped_mm_fp8(rows, forward, int32(bad).cuda())
    grouped_mm_fp8_weight_grad(rows, rows, int32(bad).cuda())
    torch.cuda.synchronize()
    assert all((t == 7).all() for t in around)


def test_more_than_2_to_31_elements():
    num_rows, size_n = 2**19 + 130, 4224
    x = Quantized(
        torch.zeros(num_rows, 128, device="cuda").to(E4M3), torch.ones(num_rows, 1, device="cuda")
    )
    x.values[-1], x.values[0] = 1.0, 2.0
    w, _ = quantize_weights(torch.ones(1, 128, size_n, device="cuda"))
    out = grouped_mm_fp8(x, w, torch.tensor([num_rows], dtype=torch.int32, device="cuda"))
    assert (out[-1] == 128).all()
    assert (out[0] == 256).all()
    assert not out[1:-1].any()


def test_bad_out_dtype():
    x, w, _, ends = random_layer(size_k=128)
    rows, (forward, _) = quantize(x), quantize_weights(w)
    with pytest.raises(ValueError, match="expected out_dtype in"):
        grouped_mm_fp8(rows, forward, int32(ends).cuda(), out_dtype=torch.float64)
