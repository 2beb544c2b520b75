"""Means of telling compute, on a GPU: what each limits, and that results stay.

G groups, K inputs, N outputs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dualpipe_ext.kernels.grouped_gemm import grouped_mm

from dualpipe_ext.pipeline.weight_grad import grouped_linear, linear
from dualpipe_ext.sms import MEANS, SMPartition
from dualpipe_ext.sms.means import SM_GROUP, has_same_bits

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.language.extra.cuda import globaltimer, smid  # noqa: E402

TAKEN = 24
BF16 = torch.bfloat16


def num_sms() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


def layers(partition: SMPartition) -> list[torch.Tensor]:
    """Forward and backward of a grouped and of a plain linear layer: results and gradients."""
    torch.manual_seed(0)
    ends = torch.tensor([500, 500, 1700, 2048], dtype=torch.int32, device="cuda")
    x = torch.randn(2048, 1024, device="cuda", dtype=BF16, requires_grad=True)
    w = torch.randn(4, 1024, 2048, device="cuda", dtype=BF16, requires_grad=True)
    dense = torch.randn(1024, 2048, device="cuda", dtype=BF16, requires_grad=True)
    grad = torch.randn(2048, 1024, device="cuda", dtype=BF16)
    with partition.step(), partition.beside():
        y = grouped_linear(x, w, ends, max_sms=partition.max_sms)
        z = linear(y * 2**-5, dense)
        z.backward(grad)
    return [y.detach(), z.detach(), x.grad, w.grad, dense.grad]


def ctas(fn: Callable[[], object], tmp_path: Path) -> dict[str, int]:
    """The largest grid of every kernel that ``fn`` launches, by name."""
    fn()
    with torch.profiler.profile() as profile:
        fn()
        torch.cuda.synchronize()
    trace = tmp_path / "trace.json"
    profile.export_chrome_trace(str(trace))
    found: dict[str, int] = {}
    for event in json.loads(trace.read_text())["traceEvents"]:
        if event.get("cat") == "kernel":
            x, y, z = event["args"]["grid"]
            found[event["name"]] = max(found.get(event["name"], 0), x * y * z)
    return found


@pytest.mark.parametrize("means", MEANS)
def test_results_stay(means):
    want = layers(SMPartition(0, means=means))
    plain = layers(SMPartition(0, means="none"))
    for number in (8, TAKEN):
        for got, alike, exact in zip(
            layers(SMPartition(number, means=means)), want, plain, strict=True
        ):
            assert not has_same_bits(means) or torch.equal(got, alike)
            # Sums of up to 2048 products in another order, rounded to bfloat16 like the first.
            assert (got.double() - exact.double()).norm() < 2**-7 * exact.double().norm()


def test_persistent_grids(tmp_path):
    partition = SMPartition(TAKEN, means="persistent")
    grids = ctas(lambda: layers(partition), tmp_path)
    assert grids["_rows_kernel"] == num_sms() - TAKEN
    assert grids["_columns_kernel"] <= num_sms() - TAKEN
    partition.set(0)
    assert ctas(lambda: layers(partition), tmp_path)["_rows_kernel"] == num_sms()


def test_yielding_products_let_a_kernel_of_high_priority_in():
    """It starts long before the product ends, and the product hardly ends later for it.

    torch's product of this size holds all SMs for milliseconds.
    """
    partition = SMPartition(8, means="yielding")
    x = torch.randn(16384, 4096, device="cuda", dtype=BF16)
    w = torch.randn(8, 4096, 8192, device="cuda", dtype=BF16)
    ends = torch.arange(2048, 16385, 2048, dtype=torch.int32, device="cuda")
    side = torch.cuda.Stream(priority=-1)

    def milliseconds(*, beside: bool) -> tuple[float, float]:
        """From the product's start to its end, and to that of eight CTAs that come meanwhile."""
        begin, end, other = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize()
        begin.record()
        grouped_mm(x, w, ends, max_sms=partition.max_sms())
        end.record()
        if beside:
            time.sleep(2e-4)  # the product has all SMs by now
            with torch.cuda.stream(side):
                _hold_kernel[(8,)](100_000, num_warps=32)
                other.record()
            other.synchronize()
        end.synchronize()
        return begin.elapsed_time(end), begin.elapsed_time(other) if beside else 0.0

    milliseconds(beside=True)
    alone = min(milliseconds(beside=False)[0] for _ in range(5))
    found = [milliseconds(beside=True) for _ in range(5)]
    assert alone > 1  # else this shows nothing
    assert min(other for _, other in found) < 0.6 * alone, (alone, found)
    assert min(product for product, _ in found) < 1.2 * alone, (alone, found)


def test_none_does_not_take_our_kernels(tmp_path):
    assert "_rows_kernel" not in ctas(lambda: layers(SMPartition(TAKEN, means="none")), tmp_path)


def test_carve_out_limits_torchs_grouped_product(tmp_path):
    partition = SMPartition(TAKEN, means="carve_out")
    x = torch.randn(4096, 1024, device="cuda", dtype=BF16)
    w = torch.randn(8, 1024, 4096, device="cuda", dtype=BF16)
    ends = torch.arange(512, 4097, 512, dtype=torch.int32, device="cuda")

    def product() -> None:
        with partition.beside():
            torch._grouped_mm(x, w, offs=ends)

    grids = {name: n for name, n in ctas(product, tmp_path).items() if "cutlass" in name.lower()}
    large = [n for n in grids.values() if n > 8]  # others prepare the problem sizes
    assert large, grids
    assert max(large) <= num_sms() - TAKEN
    assert torch._C._get_sm_carveout_experimental() is None


@triton.jit
def _where_kernel(out_ptr):
    """Every CTA writes down its SM, and stays for 50 us, so that none takes the place of others."""
    start = globaltimer()
    now = start
    while now - start < 50_000:
        now = globaltimer()
    tl.store(out_ptr + tl.program_id(0), smid())


@triton.jit
def _hold_kernel(duration):
    """Stay on an SM, with all its threads, for nanoseconds."""
    start = globaltimer()
    now = start
    while now - start < duration:
        now = globaltimer()


def sms_used() -> set[int]:
    out = torch.full((8 * num_sms(),), -1, dtype=torch.int32, device="cuda")
    _where_kernel[(len(out),)](out, num_warps=1)
    return set(out.tolist())


def test_a_green_context_has_so_many_sms_and_no_others():
    partition = SMPartition(TAKEN, means="green_context")
    everywhere = sms_used()
    assert len(everywhere) == num_sms()
    with partition.step():
        assert torch.cuda.current_stream() != torch.cuda.default_stream()
        inside = sms_used()
    left = (num_sms() - TAKEN) // SM_GROUP * SM_GROUP
    assert partition.compute_sms == left
    assert len(inside) == left
    assert inside < everywhere
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert len(sms_used()) == num_sms()


def test_a_backward_stays_in_the_green_context():
    """Autograd runs it on the stream of its forward, on a thread of its own."""
    seen: list[set[int]] = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(sms_used())
            return grad

    partition = SMPartition(TAKEN, means="green_context")
    x = torch.ones(4, device="cuda", requires_grad=True)
    with partition.step():
        Watch.apply(x).sum().backward()
    assert len(seen[0]) == partition.compute_sms


def test_a_step_on_green_streams_is_in_order_with_the_others():
    """What goes in is written just before, what comes out is read just after, and memory is used
    again at once."""
    partition = SMPartition(TAKEN, means="green_context")
    a = torch.randn(4096, 4096, device="cuda")
    for number in range(20):
        torch.cuda._sleep(100_000)
        x = torch.full((4096, 4096), float(number), device="cuda")
        with partition.step():
            torch.cuda._sleep(100_000)
            y = x * 2 + (a @ a).mul_(0)
        z = y + 1
        del x, y
        torch.full((4096, 4096), -1.0, device="cuda")
        with partition.step():
            torch.full((4096, 4096), -1.0, device="cuda")
        assert (z == 2 * number + 1).all()
