"""The GEMM and FP8 quantising kernels compiled for Hopper, without a GPU.

They must spill nothing, feed the warp-group matrix instructions of their dtype by TMA, and fill the
shared memory so that one CTA has an SM to itself, which is what ``max_sms`` counts.
"""

from __future__ import annotations

import os
import re

import pytest

triton = pytest.importorskip("triton")

from dualpipe_ext.kernels import fp8_gemm, persistent_gemm  # noqa: E402

from tests.kernels.test_compile import (  # noqa: E402
    compile_for_hopper,
    cuobjdump,
    resource_usage,
    spills_nothing,
)

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="needs a process without the interpreter"
    ),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]

SM_REGISTERS = 64 * 1024
SM_SHARED = 228 * 1024  # of an H100 or H200 SM, of which a CTA may have 1 KiB less
FP8, BF16 = "fp8e4nv", "bf16"
# Sizes of the model are multiples of 16; other sizes spill, and are no sizes of models.
ANY_VALUE = ("num_rows", "num_groups", "tiles_each", "w_scales_group", "w_scales_k", "w_scales_n")


def compile_gemm(kernel, tile, descriptors, pointers, constants):
    """``descriptors`` by argument: dtype and box; ``pointers`` by argument: their type."""
    tile = dict(tile)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    constants = {**tile, **constants}
    kinds = {name: f"tensordesc<{dtype}{box}>" for name, (dtype, box) in descriptors.items()}
    kinds |= dict.fromkeys(constants, "constexpr") | pointers
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    return compile_for_hopper(kernel, signature, constants, any_value=ANY_VALUE, **options)


def queue(pointers, constants, short):
    """Short CTAs have no queue."""
    if short:
        constants["queue_ptr"] = None
    else:
        pointers["queue_ptr"] = "*i32"


def compile_rows(dtype, *, w_transposed, out, groups=256, short=False):
    scaled = dtype == FP8
    tile = persistent_gemm.rows_tile(scaled=scaled, itemsize=1 if scaled else 2)
    m, n, k = (tile[f"BLOCK_{side}"] for side in "MNK")
    constants = {"W_TRANSPOSED": w_transposed, "GROUPS": groups}
    pointers = {"out_ptr": out, "offsets_ptr": "*i32"}
    queue(pointers, constants, short)
    if scaled:
        pointers |= {"x_scales_ptr": "*fp32", "w_scales_ptr": "*fp32"}
    else:
        absent = ("x_scales_ptr", "w_scales_ptr")
        constants |= dict.fromkeys(absent) | {f"w_scales_{of}": 0 for of in ("group", "k", "n")}
    boxes = {"x_desc": (dtype, [m, k]), "w_desc": (dtype, [1, n, k] if w_transposed else [1, k, n])}
    return compile_gemm(persistent_gemm._rows_kernel, tile, boxes, pointers, constants)


def compile_columns(dtype, *, out, short=False, add=False, narrow=False):
    scaled = dtype == FP8
    tile = persistent_gemm.columns_tile(scaled=scaled, itemsize=1 if scaled else 2, narrow=narrow)
    m, n, k = (tile[f"BLOCK_{side}"] for side in "MNK")
    constants = {"GROUPS": 256, "ADD": add}
    pointers = {"x_ptr": f"*{dtype}", "grad_ptr": f"*{dtype}", "out_ptr": out}
    pointers |= {"offsets_ptr": "*i32"}
    queue(pointers, constants, short)
    if scaled:
        pointers |= {"x_scales_ptr": "*fp32", "grad_scales_ptr": "*fp32"}
        boxes = {"x_desc": (dtype, [m, k]), "grad_desc": (dtype, [n, k])}
    else:
        constants |= dict.fromkeys(("x_scales_ptr", "grad_scales_ptr"))
        boxes = {"x_desc": (dtype, [k, m]), "grad_desc": (dtype, [k, n])}
    return compile_gemm(persistent_gemm._columns_kernel, tile, boxes, pointers, constants)


def expect_one_cta_of_wgmma_and_tma(compiled, instruction, folder):
    assert spills_nothing(compiled, folder)
    assert SM_SHARED / 2 < compiled.metadata.shared <= SM_SHARED - 1024
    ptx = compiled.asm["ptx"]
    assert set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(\S+)", ptx)) == {instruction}
    assert "cp.async.bulk.tensor" in ptx
    assert "cp.async.cg" not in ptx


both_grids = pytest.mark.parametrize("short", [False, True], ids=["persistent", "short-ctas"])


@pytest.mark.parametrize("groups", [32, 256])
@pytest.mark.parametrize("out", ["*bf16", "*fp16", "*fp32"])
@both_grids
def test_fp8_rows(out, groups, short, tmp_path):
    compiled = compile_rows(FP8, w_transposed=True, out=out, groups=groups, short=short)
    expect_one_cta_of_wgmma_and_tma(compiled, "m64n128k32.f32.e4m3.e4m3", tmp_path)
    # The products of the left half join their sums before those of the right half are asked for:
    # both waiting is more than the registers hold.
    order = re.findall(r"QGMMA|FFMA", cuobjdump("-sass", compiled.asm["cubin"], tmp_path))
    assert order.index("FFMA") < len(order) - 1 - order[::-1].index("QGMMA")


@pytest.mark.parametrize("w_transposed", [False, True], ids=["w", "w-transposed"])
@both_grids
def test_bf16_rows(w_transposed, short, tmp_path):
    compiled = compile_rows(BF16, w_transposed=w_transposed, out="*bf16", short=short)
    expect_one_cta_of_wgmma_and_tma(compiled, "m64n256k16.f32.bf16.bf16", tmp_path)
    # The next product is asked for before the last one has ended.
    assert re.search(r"wgmma\.wait_group\S*\s+1;", compiled.asm["ptx"])


added = pytest.mark.parametrize("add", [False, True], ids=["stored", "added"])


@pytest.mark.parametrize("out", ["*bf16", "*fp16", "*fp32"])
@both_grids
@added
def test_fp8_columns(out, short, add, tmp_path):
    compiled = compile_columns(FP8, out=out, short=short, add=add)
    expect_one_cta_of_wgmma_and_tma(compiled, "m64n128k32.f32.e4m3.e4m3", tmp_path)


@both_grids
@added
def test_bf16_columns(short, add, tmp_path):
    compiled = compile_columns(BF16, out="*bf16", short=short, add=add)
    expect_one_cta_of_wgmma_and_tma(compiled, "m64n256k16.f32.bf16.bf16", tmp_path)


@pytest.mark.parametrize("dtype", [FP8, BF16])
@added
def test_narrow_columns_leave_room_for_a_second_cta(dtype, add, tmp_path):
    compiled = compile_columns(dtype, out="*bf16", short=True, add=add, narrow=True)
    usage = resource_usage(compiled.asm["cubin"], tmp_path)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    # Of BF16, at most two numbers of the launch, which are read once for a tile.
    assert found["STACK"] <= (8 if dtype == BF16 and add else 0)
    assert found["LOCAL"] == 0
    threads = 32 * compiled.metadata.num_warps
    assert 2 * threads * -(-found["REG"] // 8) * 8 <= SM_REGISTERS
    assert 2 * (compiled.metadata.shared + 1024) <= SM_SHARED


CASTS = {"SMALLEST_AMAX": 2.0**-100, "BLOCK": 128}


def compile_cast(kernel, pointers, constants):
    constants = {**CASTS, **constants}
    kinds = {**pointers, **dict.fromkeys(constants, "constexpr")}
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    options = {"num_warps": 8, "enable_fp_fusion": False, "any_value": ANY_VALUE[:2]}
    return compile_for_hopper(kernel, signature, constants, **options)


@pytest.mark.parametrize("w", ["*bf16", "*fp16"])
def test_quantize_weights(w, tmp_path):
    fp8 = dict.fromkeys(("values_ptr", "turned_ptr"), f"*{FP8}")
    kernel = fp8_gemm._weights_kernel
    compiled = compile_cast(kernel, {"w_ptr": w, **fp8, "scales_ptr": "*fp32"}, {})
    expect_exact_cast(compiled, tmp_path)
    # Both copies are written 16 bytes at a time.
    assert len(re.findall(r"st\.global\.v4\.b32", compiled.asm["ptx"])) == 8


def test_quantize_columns(tmp_path):
    pointers = dict.fromkeys(("x_ptr", "values_ptr"), f"*{FP8}")
    pointers |= dict.fromkeys(("x_scales_ptr", "scales_ptr"), "*fp32") | {"offsets_ptr": "*i32"}
    compiled = compile_cast(fp8_gemm._columns_kernel, pointers, {"GROUPS": 128})
    expect_exact_cast(compiled, tmp_path)
    assert len(re.findall(r"st\.global\.v4\.b32", compiled.asm["ptx"])) == 4


def expect_exact_cast(compiled, folder):
    assert spills_nothing(compiled, folder)
    ptx = compiled.asm["ptx"]
    assert "ld.global.v4" in ptx, "expected vector loads"
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
    assert not re.search(r"\bfma\.|\.ftz|\.approx", ptx)
