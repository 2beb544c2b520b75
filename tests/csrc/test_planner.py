"""The planner kernel's own source, run on the CPU by an emulator, against the planner in torch.

Whatever the order in which threads run, the maps must be the same bit for bit. That nvcc's kernel
does the same is tested on a GPU (tests/gpu/test_eplb_planner.py).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_ext.eplb import rebalance_experts
from tests.eplb.plan_cases import LOADS, make_loads, shapes

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
LARGEST = 1e38
GARBAGE = -77

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    library = tmp_path_factory.mktemp("emulator") / "libplanner.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-fPIC", "-shared", f"-I{HERE / 'emulator'}", f"-I{CSRC}"]
    command = [COMPILER, *flags, str(HERE / "emulated_planner.cpp"), "-o", str(library)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    return ctypes.CDLL(str(library)).plan


def run(kernel, loads, sizes, *, width=None, threads=128, seed=1, limits=(LARGEST, LARGEST)):
    """phy2log, replica, log2phy, logcnt and status as the kernel leaves them.

    Args:
        sizes: as ``rebalance_experts`` takes them; groups and nodes 1 for a global plan.
    """
    num_layers, num_experts = loads.shape
    num_slots, num_groups, num_nodes, num_gpus = sizes
    width = num_slots - num_experts + 1 if width is None else width
    shapes = [(num_layers, num_slots)] * 2
    shapes += [(num_layers, num_experts, width), (num_layers, num_experts)]
    maps = [torch.full(shape, GARBAGE) for shape in shapes]
    status = torch.full((num_layers, num_nodes), GARBAGE, dtype=torch.int32)
    words = (num_layers, num_experts, num_slots, num_groups, num_nodes, num_gpus)
    failed = kernel(
        (ctypes.c_uint32 * 6)(*words),
        ctypes.c_void_p(loads.data_ptr()),
        *(ctypes.c_float(limit) for limit in limits),
        ctypes.c_uint32(width),
        ctypes.c_uint32(threads),
        ctypes.c_uint64(seed),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in [*maps, status]),
    )
    assert not failed, "the kernel wrote behind its shared memory"
    return *maps, status


def assert_as_planned(kernel, loads, sizes, **options):
    num_slots, num_groups, num_nodes, num_gpus = sizes
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    got = run(kernel, loads, (num_slots, num_groups, num_nodes, num_gpus), **options)
    phy2log, replica, log2phy, logcnt, status = got
    want = rebalance_experts(loads, *sizes)
    assert torch.equal(phy2log, want[0])
    assert torch.equal(logcnt, want[2])
    width = want[1].shape[2]
    assert torch.equal(log2phy[..., :width], want[1])
    assert bool((log2phy[..., width:] == -1).all())
    slots = torch.arange(num_slots).expand_as(phy2log)
    cells = phy2log * log2phy.shape[2] + replica
    assert torch.equal(log2phy.flatten(1).gather(1, cells), slots)
    assert int(status.max()) == int(want[2].max())
    assert int(status.min()) >= 1


@settings(max_examples=2000)
@given(
    shape=shapes(max_nodes=4, max_gpus=12, max_experts=48, max_extra=3),
    kind=st.sampled_from(LOADS),
    seed=st.integers(1, 2**31),
    threads=st.sampled_from([64, 128]),
)
def test_any_shape_in_any_order_of_threads(kernel, shape, kind, seed, threads):
    num_layers, num_experts, *sizes = shape
    loads = make_loads(kind, num_layers, num_experts, seed)
    assert_as_planned(kernel, loads, sizes, threads=threads, seed=seed)


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.parametrize(
    ("num_experts", "sizes"),
    [
        (256, (288, 8, 4, 32)),  # DeepSeek-V3, by node
        (256, (288, 8, 18, 144)),  # pairs
        (256, (320, 8, 40, 320)),  # one slot to a GPU
        (256, (320, 1, 1, 64)),  # two packs in a lane
        (160, (480, 1, 1, 160)),  # sixteen packs in a lane
        (300, (320, 1, 1, 8)),  # 32 experts in a lane
        (64, (96, 64, 2, 16)),  # more groups than a warp has lanes
        (1, (2048, 1, 1, 1)),  # one expert everywhere
    ],
)
def test_real_shapes(kernel, num_experts, sizes, kind):
    loads = make_loads(kind, 2, num_experts, 3)
    assert_as_planned(kernel, loads, sizes, threads=128)


def test_the_limits(kernel):
    for sizes in ((2048, 1, 1, 512), (2048, 512, 512, 512), (2048, 1024, 2, 512)):
        loads = make_loads("lognormal", 1, 1024, 5)
        assert_as_planned(kernel, loads, sizes, threads=512)


def test_replicas_beyond_the_width_are_left_out(kernel):
    loads = make_loads("lognormal", 2, 16, 0)
    want = rebalance_experts(loads, 32, 1, 1, 8)
    _, _, log2phy, logcnt, _ = run(kernel, loads, (32, 1, 1, 8), width=2)
    assert int(logcnt.max()) > 2
    assert torch.equal(log2phy, want[1][..., :2])


@pytest.mark.parametrize("bad", [float("nan"), -1.0, float("inf"), float("-inf"), 1e38])
@pytest.mark.parametrize("sizes", [(24, 1, 1, 8), (24, 8, 2, 8), (24, 2, 2, 8)])
def test_bad_loads_are_reported_and_harmless(kernel, bad, sizes):
    loads = make_loads("lognormal", 3, 16, 0)
    clean = loads.clone()
    loads[1, 5] = bad
    clean[1, 5] = 1e36 if bad > 0 else 0.0
    *maps, status = run(kernel, loads, sizes, limits=(1e36, 1e37))
    *want, clean_status = run(kernel, clean, sizes, limits=(1e36, 1e37))
    for mine, theirs in zip(maps, want, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(status.abs(), clean_status)
    assert (status < 0).any(1).tolist() == [False, True, False]


def test_negative_zero_is_a_load_of_zero(kernel):
    loads = make_loads("few values", 2, 12, 1)
    loads[loads == 0] = -0.0
    assert bool((loads == 0).any())
    assert_as_planned(kernel, loads, (18, 1, 1, 6))
