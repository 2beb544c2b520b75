"""The persistent grouped GEMMs on a GPU, in bfloat16: exact sums, limits, graphs, big tensors."""

from __future__ import annotations

import json

import pytest
import torch
from dualpipe_ext.kernels.grouped_gemm import SHORT_CTAS, grouped_mm, grouped_mm_weight_grad
from dualpipe_ext.kernels.persistent_gemm import multiply_columns, multiply_rows

from tests.kernels.gemm_cases import (
    ENDS,
    product_by_columns,
    product_by_rows,
    whole_numbers,
)

ends_and_rows = pytest.mark.parametrize(("ends", "num_rows"), ENDS, ids=str)
SMS = [1, 2, 7, 131, 132, 10_000, None, SHORT_CTAS]
BF16 = torch.bfloat16


def int32(ends):
    return torch.tensor(ends, dtype=torch.int32, device="cuda")


def on_gpu(x):
    """Whole numbers up to 8: exact in bfloat16, and so are their sums in float32."""
    return x.cuda().to(BF16)


@ends_and_rows
@pytest.mark.parametrize("size_k", [8, 72, 1000])
@pytest.mark.parametrize("transposed", [False, True], ids=["w", "w-transposed"])
def test_rows(ends, num_rows, size_k, transposed):
    x = whole_numbers((num_rows, size_k), 8, seed=0)
    w = whole_numbers((len(ends), size_k, 536), 8, seed=1)
    want = product_by_rows(x, w, ends).to(BF16)
    # What nothing is multiplied with would spoil whatever it came near.
    x[ends[-1] :] = float("nan")
    for group, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if start == end:
            w[group] = float("nan")
    x, w = on_gpu(x), on_gpu(w)
    if transposed:
        w = w.transpose(1, 2).contiguous().transpose(1, 2)
    for max_sms in SMS:
        out = multiply_rows(x, w, int32(ends), out_dtype=BF16, max_sms=max_sms)
        assert torch.equal(out.cpu(), want), max_sms


@ends_and_rows
@pytest.mark.parametrize(("size_k", "size_n"), [(8, 8), (136, 264), (2304, 520)])
def test_columns(ends, num_rows, size_k, size_n):
    x = whole_numbers((num_rows, size_k), 8, seed=0)
    grad = whole_numbers((num_rows, size_n), 8, seed=1)
    x[ends[-1] :], grad[ends[-1] :] = float("nan"), float("inf")
    want = product_by_columns(x, grad, ends).to(BF16)
    x, grad = on_gpu(x), on_gpu(grad)
    how = {"num_rows": num_rows, "out_dtype": BF16}
    for max_sms in SMS:
        out = multiply_columns(x, grad, int32(ends), **how, max_sms=max_sms)
        assert torch.equal(out.cpu(), want), max_sms
        total = torch.ones_like(out)
        multiply_columns(x, grad, int32(ends), **how, total=total, max_sms=max_sms)
        assert torch.equal(total, out + 1), max_sms


def random_layer(num_groups=16, size_k=7168, size_n=1024):
    torch.manual_seed(0)
    sizes = torch.randint(0, 400, (num_groups,))
    ends = sizes.cumsum(0).tolist()
    x = torch.randn(ends[-1] + 9, size_k, device="cuda", dtype=BF16)
    w = torch.randn(num_groups, size_k, size_n, device="cuda", dtype=BF16)
    grad = torch.randn(ends[-1] + 9, size_n, device="cuda", dtype=BF16)
    return x, w, grad, ends


def test_real_sizes_against_float64():
    x, w, grad, ends = random_layer()
    offsets = int32(ends)
    # bfloat16's half unit in the last place, and float32 sums of as many terms.
    for out, want, size, terms in [
        (
            grouped_mm(x, w, offsets, max_sms=100),
            product_by_rows(x, w, ends),
            product_by_rows(x.abs(), w.abs(), ends),
            x.shape[1],
        ),
        (
            grouped_mm_weight_grad(x, grad, offsets, max_sms=100),
            product_by_columns(x, grad, ends),
            product_by_columns(x.abs(), grad.abs(), ends),
            400,
        ),
    ]:
        assert ((out.double() - want).abs() <= 2**-8 * want.abs() + terms * 2**-23 * size).all()


def test_bits_do_not_depend_on_the_limit():
    x, w, grad, ends = random_layer(size_n=512)
    for _ in range(3):
        for product in (
            lambda sms: grouped_mm(x, w, int32(ends), max_sms=sms),
            lambda sms: grouped_mm(grad, w.transpose(1, 2), int32(ends), max_sms=sms),
            lambda sms: grouped_mm_weight_grad(x, grad, int32(ends), max_sms=sms),
        ):
            want = product(132)
            for sms in (1, 57, 108, SHORT_CTAS):
                assert torch.equal(product(sms), want)


@pytest.mark.parametrize("total_dtype", [BF16, torch.float32])
def test_a_total_gets_the_bits_of_adding(total_dtype):
    x, _, grad, ends = random_layer(size_n=1032)
    offsets = int32(ends)
    gradient = grouped_mm_weight_grad(x, grad, offsets, max_sms=132)
    for sms in (57, 132, SHORT_CTAS):
        total = torch.randn(gradient.shape, device="cuda").to(total_dtype)
        want = total.clone().add_(gradient)
        assert grouped_mm_weight_grad(x, grad, offsets, total=total, max_sms=sms) is total
        assert torch.equal(total, want)


def test_adding_to_a_total_takes_no_memory_for_the_gradient():
    x, w, grad, ends = random_layer()
    offsets, total = int32(ends), torch.zeros_like(w)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grouped_mm_weight_grad(x, grad, offsets, total=total, max_sms=SHORT_CTAS)
    assert torch.cuda.max_memory_allocated() - before < total.nbytes / 100


def test_operands_with_other_strides():
    x, w, grad, ends = random_layer(num_groups=3, size_k=256, size_n=128)
    want = grouped_mm(x, w, int32(ends), max_sms=8)
    wide = torch.randn(len(x), 512, device="cuda", dtype=BF16)
    wide[:, 128:384] = x
    assert torch.equal(grouped_mm(wide[:, 128:384], w, int32(ends), max_sms=8), want)
    assert torch.equal(grouped_mm(x.t().contiguous().t(), w, int32(ends), max_sms=8), want)
    by_k = w.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    assert torch.equal(grouped_mm(x, by_k, int32(ends), max_sms=8), want)
    # Nothing that TMA could read: torch's kernel multiplies, without a limit.
    narrow = x.t().contiguous()[:5].t()
    out = grouped_mm(narrow, w[:, :5].contiguous(), int32(ends), max_sms=8)
    assert torch.equal(out, grouped_mm(narrow, w[:, :5].contiguous(), int32(ends)))
    want = grouped_mm_weight_grad(x, grad, int32(ends), max_sms=8)
    one = grad[:1].expand_as(grad)
    assert torch.equal(grouped_mm_weight_grad(wide[:, 128:384], grad, int32(ends), max_sms=8), want)
    assert torch.equal(
        grouped_mm_weight_grad(x, one, int32(ends), max_sms=8),
        grouped_mm_weight_grad(x, one.contiguous(), int32(ends), max_sms=8),
    )


def test_no_more_ctas_than_sms(tmp_path):
    x, w, grad, ends = random_layer(num_groups=4, size_k=1024, size_n=2048)
    offsets = int32(ends)
    with torch.profiler.profile() as profile:
        grouped_mm(x, w, offsets, max_sms=24)
        grouped_mm_weight_grad(x, grad, offsets, max_sms=24)
        torch.cuda.synchronize()
    trace = tmp_path / "trace.json"
    profile.export_chrome_trace(str(trace))
    grids = {
        event["name"]: event["args"]["grid"]
        for event in json.loads(trace.read_text())["traceEvents"]
        if event.get("cat") == "kernel"
    }
    assert grids["_rows_kernel"] == [24, 1, 1]
    assert grids["_columns_kernel"] == [24, 1, 1]


def test_graph_reads_the_offsets_of_its_replay():
    x, w, grad, ends = random_layer(num_groups=4, size_k=256, size_n=256)
    offsets = int32(ends)
    products = lambda: (  # noqa: E731
        grouped_mm(x, w, offsets, max_sms=40),
        grouped_mm_weight_grad(x, grad, offsets, max_sms=40),
    )
    products()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = products()
    for end in (0, 1, ends[0] // 2):
        offsets.copy_(int32([end, end, *ends[2:]]))
        graph.replay()
        for got, want in zip(out, products(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("bad", [[20, 10], [5, 9999], [-7, 40], [2**31 - 1, -(2**31)]], ids=str)
def test_offsets_that_lie_touch_nothing_outside(bad):
    x = torch.ones(40, 64, device="cuda", dtype=BF16)
    w = torch.ones(2, 64, 64, device="cuda", dtype=BF16)
    around = [torch.full((2**20,), 7, device="cuda", dtype=BF16) for _ in range(2)]
    out = multiply_rows(x, w, int32(bad), out_dtype=BF16)
    columns = multiply_columns(x, x, int32(bad), num_rows=40, out_dtype=BF16)
    torch.cuda.synchronize()
    assert (out.shape, columns.shape) == ((40, 64), (2, 64, 64))
    assert all((t == 7).all() for t in around)


def test_more_than_2_to_31_elements():
    num_rows, size_n = 2**19 + 130, 4104
    x = torch.zeros(num_rows, 64, device="cuda", dtype=BF16)
    x[-1], x[0] = 1.0, 2.0
    w = torch.ones(1, 64, size_n, device="cuda", dtype=BF16)
    out = grouped_mm(x, w, int32([num_rows]), max_sms=132)
    assert (out[-1] == 64).all()
    assert (out[0] == 128).all()
    assert not out[1:-1].any()
    del out
    sparse = torch.zeros(num_rows, size_n, device="cuda", dtype=BF16)
    sparse[-1] = 3.0
    out = grouped_mm_weight_grad(x, sparse, int32([num_rows]), max_sms=132)
    assert (out == 3).all()
