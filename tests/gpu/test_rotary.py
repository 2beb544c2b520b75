"""The rotary kernels on a GPU: 16 bits against float64, real sizes, graphs and streams."""

from __future__ import annotations

import pytest
import torch
from dualpipe_ext.kernels import rotary as module
from dualpipe_ext.kernels.rotary import rotary
from torch.autograd import DeviceType
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

BASE = 10_000.0


def both(qkv, num_heads, grads):
    qkv = qkv.detach().requires_grad_()
    found = rotary(qkv, num_heads, BASE)
    torch.autograd.backward(found, [g.to(qkv.dtype) for g in grads])
    return [x.detach().double() for x in (*found, qkv.grad)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("num_heads", "size"), [(56, 128), (16, 64), (3, 24)])
def test_matches_float64(dtype, num_heads, size):
    torch.manual_seed(0)
    qkv = torch.randn(2, 300, 3 * num_heads * size, device="cuda", dtype=dtype)
    grads = [torch.randn(2, num_heads, 300, size, device="cuda", dtype=dtype) for _ in range(3)]
    found, want = both(qkv, num_heads, grads), both(qkv.double(), num_heads, grads)
    # Rounded once from float32: half a unit in the last place, and float32's own error beside it.
    bound = {"rtol": torch.finfo(dtype).eps / 2 + 2e-6, "atol": 4e-6}
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected, **bound)


def test_attention_needs_no_copy_to_join_heads():
    qkv = torch.randn(2, 256, 3 * 1024, device="cuda", dtype=torch.bfloat16)
    mixed = scaled_dot_product_attention(*rotary(qkv, 16, BASE), is_causal=True)
    assert mixed.transpose(1, 2).is_contiguous()


def capture(qkv):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rotary(qkv, 1, BASE)
    return graph, captured


def kernels(act):
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        act()
        torch.cuda.synchronize()
    return {e.name for e in profiler.events() if e.device_type == DeviceType.CUDA}


def test_a_capture_leaves_no_table_that_only_replays_fill():
    module._TABLES.clear()
    rotary(torch.randn(1, 8, 3 * 64, device="cuda"), 1, BASE)  # compiles
    qkv = torch.randn(1, 33, 3 * 64, device="cuda")
    graph, captured = capture(qkv)
    want = rotary(qkv, 1, BASE)
    graph.replay()
    for got, expected in zip(captured, want, strict=True):
        assert torch.equal(got, expected)
    assert want[0][0, 0, 32].any()


def test_a_capture_takes_a_table_that_is_there_and_holds_on_to_it():
    module._TABLES.clear()
    qkv = torch.randn(1, 35, 3 * 64, device="cuda")
    want = rotary(qkv, 1, BASE)
    graph, captured = capture(qkv)
    module._TABLES.clear()
    others = [torch.full((2, 35, 32), 7.0, device="cuda") for _ in range(64)]  # where it might be
    graph.replay()
    for got, expected in zip(captured, want, strict=True):
        assert torch.equal(got, expected)
    assert kernels(graph.replay) == {"_forward_kernel"}
    del others


def test_every_stream_makes_its_own_table():
    module._TABLES.clear()
    qkv = torch.randn(1, 4096, 3 * 64, device="cuda")
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # the table of this stream comes late
    first = rotary(qkv, 1, BASE)
    with torch.cuda.stream(side):
        second = rotary(qkv, 1, BASE)
    torch.cuda.synchronize()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert len(module._TABLES) == 2


def test_more_than_2_to_31_elements():
    length = 2**19 + 3
    qkv = torch.zeros(1, length, 3 * 2048, device="cuda", dtype=torch.bfloat16)
    qkv[0, -1] = 1.0
    query, key, value = rotary(qkv, 16, BASE)
    assert (value[0, :, -1] == 1).all()
    assert query[0, :, -1].float().square().sum().item() == pytest.approx(2048, rel=0.01)
    for part in (query, key, value):
        assert not part[0, :, :-1].any()
