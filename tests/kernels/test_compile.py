"""Every Triton kernel compiled for Hopper, without a GPU: it must compile, and spill nothing.

Those that promise the bits of torch operations must also round with the same instructions.

Not in a process with ``TRITON_INTERPRET=1``: there ``triton.jit`` makes no compilable function.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from dualpipe_ext.kernels import (  # noqa: E402
    bf16_parts,
    fp8_cast,
    permute,
    rmsnorm,
    rotary,
    router,
    router_grad,
    swiglu,
    weighted_rows,
)

from dualpipe_ext.eplb.shares import SHARE_BITS  # noqa: E402

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="needs a process without the interpreter"
    ),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]

ROWS = ("*fp32", "*bf16")


def compile_for_hopper(kernel, signature, constexprs, *, any_value=(), **options):
    """``any_value`` names the integers that need not be multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Pointers come from torch's allocator, row strides are multiples of 16 elements in practice:
    # without saying so, the compiler would not use 16-byte accesses.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name not in any_value)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def cuobjdump(option: str, cubin: bytes, folder: Path) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    # nvdisasm, which lists the instructions, lies beside it.
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return subprocess.run(
        [str(tools / "cuobjdump"), option, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
    ).stdout


def resource_usage(cubin: bytes, folder: Path) -> str:
    """cuobjdump's line for the kernel: registers, stack and local memory."""
    output = cuobjdump("--dump-resource-usage", cubin, folder)
    return next(line for line in output.splitlines() if "REG:" in line)


def spills_nothing(compiled, folder: Path) -> bool:
    usage = resource_usage(compiled.asm["cubin"], folder)
    return re.search(r"STACK:0\b.* LOCAL:0\b", usage) is not None


def signature_of(kernel, rows, weighted):
    kinds = {}
    for name in kernel.arg_names:
        if name in ("HAS_WEIGHTS", "BLOCK"):
            kinds[name] = "constexpr"
        elif "weights" in name:
            kinds[name] = "*fp32" if weighted else "constexpr"
        else:
            kinds[name] = rows if name.endswith("_ptr") else "i32"
    return kinds


@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "plain"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ["_forward_kernel", "_backward_kernel"])
def test_swiglu_compiles_without_spills(name, rows, weighted, tmp_path):
    kernel = getattr(swiglu, name)
    signature = signature_of(kernel, rows, weighted)
    constexprs = {"HAS_WEIGHTS": weighted, "BLOCK": 1024}
    constexprs |= {k: None for k, kind in signature.items() if kind == "constexpr"} | constexprs
    compiled = compile_for_hopper(kernel, signature, constexprs)
    assert spills_nothing(compiled, tmp_path)
    # 16-byte global loads: the kernel is bound by memory.
    assert "ld.global.v4" in compiled.asm["ptx"], "expected vector loads"


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ["_forward_kernel", "_backward_kernel"])
def test_rotary_compiles_without_spills(name, rows, tmp_path):
    kernel, constexprs = getattr(rotary, name), {"HALF": 64, "BLOCK": 512}
    kinds = {**dict.fromkeys(constexprs, "constexpr"), "table_ptr": "*fp32"}
    signature = {
        argument: kinds.get(argument, rows if argument.endswith("_ptr") else "i32")
        for argument in kernel.arg_names
    }
    compiled = compile_for_hopper(kernel, signature, constexprs)
    assert spills_nothing(compiled, tmp_path)
    if "num_tokens" in kernel.arg_names:  # one token: Triton makes a constant of a 1
        one = constexprs | {"length": 1}
        assert compile_for_hopper(kernel, signature | {"length": "constexpr"}, one).asm["cubin"]
    wide = "v4" if rows == "*fp32" else "v2"  # 4 values of a thread
    assert f"ld.global.{wide}" in compiled.asm["ptx"], "expected vector loads"
    assert f"st.global.{wide}" in compiled.asm["ptx"], "expected vector stores"


@pytest.mark.parametrize("order", [(2, 1, 0), (2, 0, 1, 0)], ids=str)
def test_bf16_parts_compile_without_spills(order, tmp_path):
    constexprs = {"ORDER": order, "BLOCK": 1024}
    kinds = {**dict.fromkeys(constexprs, "constexpr"), "x_ptr": "*fp32", "out_ptr": "*bf16"}
    kernel = bf16_parts._kernel
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    compiled = compile_for_hopper(kernel, signature, constexprs)
    assert spills_nothing(compiled, tmp_path)
    assert "ld.global.v4" in compiled.asm["ptx"], "expected vector loads"
    # Rounded to nearest, and nothing flushed to zero: the parts sum to x exactly.
    assert "cvt.rn.bf16" in compiled.asm["ptx"]
    assert ".ftz" not in compiled.asm["ptx"]


@pytest.mark.parametrize("wanted", ["both", "rows", "weights"])
@pytest.mark.parametrize("rows", ROWS)
def test_weighted_rows_compile_without_spills(rows, wanted, tmp_path):
    kernel = weighted_rows._kernel
    signature = {k: rows if k.endswith("_ptr") else "i32" for k in kernel.arg_names}
    signature |= {"weights_ptr": "*fp32", "products_ptr": "*fp32"}
    signature |= {"offsets_ptr": "*i32", "counts_ptr": "*i64"}
    absent = {
        "rows": ("rows_ptr", "products_ptr", "offsets_ptr", "counts_ptr"),
        "weights": ("weights_ptr", "grad_rows_ptr"),
    }
    constexprs = {"BLOCK": 1024, "GROUPS": 128} | dict.fromkeys(absent.get(wanted, ()))
    signature |= dict.fromkeys(constexprs, "constexpr")
    compiled = compile_for_hopper(kernel, signature, constexprs)
    assert spills_nothing(compiled, tmp_path)
    assert "ld.global.v4" in compiled.asm["ptx"], "expected vector loads"


# Blocks of DeepSeek-V3's latent and hidden sizes; the wide kernel only ever has the largest.
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("_forward_kernel", 512),
        ("_forward_kernel", 7168),
        ("_backward_kernel", 512),
        ("_backward_kernel", 7168),
        ("_wide_backward_kernel", 20000),
    ],
)
def test_rmsnorm_compiles_without_spills(name, size, rows, tmp_path):
    kernel = getattr(rmsnorm, name)
    launch = rmsnorm._launch(size)
    signature = {k: rows if k.endswith("_ptr") else "i32" for k in kernel.arg_names}
    signature |= {"weight_ptr": "*fp32", "eps": "fp32", "BLOCK": "constexpr"}
    if "partial_ptr" in signature:
        signature["partial_ptr"] = "*fp32"
    constexprs = {"BLOCK": launch["BLOCK"]}
    compiled = compile_for_hopper(kernel, signature, constexprs, num_warps=launch["num_warps"])
    assert spills_nothing(compiled, tmp_path)
    # 16-byte loads where a thread has that many: 512 columns over 128 threads are 4 each.
    width = "v4" if size > 512 or rows == "*fp32" else "v2"
    assert f"ld.global.{width}" in compiled.asm["ptx"], "expected vector loads"


def compile_permute(kernel, dtype, *, weighted=False, block=1024, top_k=8, **options):
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= dict.fromkeys(("source_ptr", "target_ptr", "rows_ptr", "out_ptr"), f"*{dtype}")
    signature |= {"table_ptr": "*i64", "size": "i32", "rows_stride": "i32"}
    signature["weights_ptr"] = "*fp32" if weighted else "constexpr"
    signature = {name: signature[name] for name in kernel.arg_names}
    constexprs = {
        "TOP_K": top_k,
        "HAS_WEIGHTS": weighted,
        "SUM": triton.language.float64 if dtype == "fp64" else triton.language.float32,
        "BLOCK": block,
        "weights_ptr": None,
    }
    constexprs = {k: v for k, v in constexprs.items() if signature.get(k) == "constexpr"}
    return compile_for_hopper(kernel, signature, constexprs, **options)


def test_expand_compiles_to_wide_copies(tmp_path):
    compiled = compile_permute(permute._expand_kernel, "i64", block=512)
    assert spills_nothing(compiled, tmp_path)
    assert "ld.global.v2.b64" in compiled.asm["ptx"]
    assert "st.global.v2.b64" in compiled.asm["ptx"]


FUSED = re.compile(r"\b[FD]FMA\b|\bHFMA2\.BF16")


@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "plain"])
@pytest.mark.parametrize(("rows", "block"), [("bf16", 1024), ("fp32", 512), ("fp64", 256)])
def test_reduce_fuses_no_product_into_the_sum(rows, block, weighted, tmp_path):
    how = {"weighted": weighted, "block": block}
    compiled = compile_permute(permute._reduce_kernel, rows, enable_fp_fusion=False, **how)
    assert spills_nothing(compiled, tmp_path)
    assert re.search(r"ld\.global\.v[24]", compiled.asm["ptx"]), "expected vector loads"
    assert not re.search(r"\bfma\.|\.ftz", compiled.asm["ptx"])
    instructions = cuobjdump("-sass", compiled.asm["cubin"], tmp_path)
    assert re.search(r"\b[FD]ADD\b", instructions)
    assert not FUSED.search(instructions)
    if weighted:
        # What the option is for: this is what the same check finds without it.
        fused = compile_permute(permute._reduce_kernel, rows, enable_fp_fusion=True, **how)
        assert FUSED.search(cuobjdump("-sass", fused.asm["cubin"], tmp_path))


@pytest.mark.parametrize("pow2_scales", [False, True], ids=["plain", "pow2"])
@pytest.mark.parametrize("rows", ROWS)
def test_quantize_compiles_to_exact_instructions(rows, pow2_scales, tmp_path):
    signature = {"x_ptr": rows, "values_ptr": "*fp8e4nv", "scales_ptr": "*fp32"}
    signature["num_blocks"] = "i32"
    constexprs = {"POW2": pow2_scales, "SMALLEST_AMAX": 2.0**-100, "E4M3_MAX": 448.0}
    constexprs |= {"BLOCK": 128, "BLOCKS": fp8_cast._BLOCKS}
    signature |= dict.fromkeys(constexprs, "constexpr")
    kernel = fp8_cast._quantize_kernel
    compiled = compile_for_hopper(kernel, signature, constexprs, enable_fp_fusion=False)
    assert spills_nothing(compiled, tmp_path)
    ptx = compiled.asm["ptx"]
    assert "ld.global.v4" in ptx, "expected vector loads"
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
    assert ("div.rn.f32" in ptx) != pow2_scales
    assert not re.search(r"\bfma\.|\.ftz|\.approx|div\.full", ptx)


@pytest.mark.parametrize("rows", ROWS)
def test_dequantize_compiles_to_exact_instructions(rows, tmp_path):
    signature = {"values_ptr": "*fp8e4nv", "scales_ptr": "*fp32", "out_ptr": rows}
    signature["num_blocks"] = "i32"
    constexprs = {"BLOCK": 128, "BLOCKS": fp8_cast._BLOCKS}
    signature |= dict.fromkeys(constexprs, "constexpr")
    kernel = fp8_cast._dequantize_kernel
    compiled = compile_for_hopper(kernel, signature, constexprs, enable_fp_fusion=False)
    assert spills_nothing(compiled, tmp_path)
    assert "st.global.v4" in compiled.asm["ptx"], "expected vector stores"
    # One product, in float32; bf16 products would round twice.
    assert re.search(r"\bmul(\.rn)?\.f32", compiled.asm["ptx"])
    assert not re.search(r"\bfma\.|\.ftz|mul(\.rn)?\.bf16", compiled.asm["ptx"])


# (experts, groups, top-k): DeepSeek-V3's, the tiny model's, and the most experts and choices.
ROUTERS = [(256, 8, 8), (16, 4, 4), (4096, 16, 64)]


def compile_with_rest_int32(kernel, pointers, constexprs, **options):
    """Arguments that are neither pointers nor constants are 32-bit integers."""
    signature = {name: pointers.get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constexprs, "constexpr")
    return compile_for_hopper(kernel, signature, constexprs, **options)


@pytest.mark.parametrize("replicas", [False, True], ids=["plain", "replicas"])
@pytest.mark.parametrize("sizes", ROUTERS, ids=str)
def test_route_compiles_to_the_instructions_of_torch(sizes, replicas, tmp_path):
    pointers = dict.fromkeys(("logits_ptr", "bias_ptr", "scores_ptr", "weights_ptr"), "*fp32")
    pointers |= dict.fromkeys(("topk_idx_ptr", "counts_ptr"), "*i64")
    pointers |= {"block_counts_ptr": "*i32", "route_scale": "fp32"}
    constexprs = router._sizes(*sizes)
    constexprs |= {"NUM_GROUPS": sizes[1], "TOP_GROUPS": sizes[1] // 2}
    constexprs |= {"HAS_REPLICAS": replicas, "LIBDEVICE": True}
    if not replicas:
        constexprs["block_counts_ptr"] = None
    options = {"num_warps": router._num_warps(constexprs), "enable_fp_fusion": False}
    compiled = compile_with_rest_int32(router._route_kernel, pointers, constexprs, **options)
    assert spills_nothing(compiled, tmp_path)
    ptx = compiled.asm["ptx"]
    # torch.sigmoid rounds as CUDA's expf and IEEE division do; subnormal scores keep their bits.
    assert "div.rn.f32" in ptx
    assert not re.search(r"div\.(full|approx)|div\.rn\.ftz|rcp\.approx", ptx)
    if sizes[0] == 256:
        assert "ld.global.v4" in ptx, "expected vector loads"


@pytest.mark.parametrize("top_k", [1, 6, 8])
def test_router_grad_compiles_without_spills(top_k, tmp_path):
    pointers = dict.fromkeys(("grad_weights_ptr", "scores_ptr", "out_ptr"), "*fp32")
    pointers |= {"topk_idx_ptr": "*i64", "route_scale": "fp32"}
    constexprs = {"TOP_K": top_k, "TOP_K_PADDED": 8, "TOKENS": 8, "COLUMNS": 256}
    compiled = compile_with_rest_int32(router_grad._kernel, pointers, constexprs)
    assert spills_nothing(compiled, tmp_path)
    # All zeros are there before a gradient takes the place of one.
    ptx = compiled.asm["ptx"]
    barrier = ptx.rindex("bar.sync")
    assert "st.global.v4" in ptx[:barrier]
    assert "st.global" in ptx[barrier:]


def slot_arguments(sizes, *, has_split):
    """Pointers and constants of the slot kernel for what ``_sizes`` returned."""
    names = ("topk_idx_ptr", "up_to_block_ptr", "log2phy_ptr", "logcnt_ptr", "slot_idx_ptr")
    pointers = dict.fromkeys(names, "*i64")
    constexprs = {"TOKENS": sizes["TOKENS"], "TOP_K": sizes["TOP_K"], "HAS_SPLIT": has_split}
    constexprs |= {"PAIRS": sizes["TOKENS"] * sizes["TOP_K_PADDED"], "BITS": SHARE_BITS}
    if has_split:
        pointers["split_ptr"] = "*i32"
    else:
        constexprs["split_ptr"] = None
    return pointers, constexprs


@pytest.mark.parametrize("has_split", [False, True], ids=["even", "split"])
@pytest.mark.parametrize("sizes", ROUTERS, ids=str)
def test_slot_compiles_without_spills(sizes, has_split, tmp_path):
    arguments = slot_arguments(router._sizes(*sizes), has_split=has_split)
    compiled = compile_with_rest_int32(router._slot_kernel, *arguments)
    assert spills_nothing(compiled, tmp_path)


def test_router_compiles_for_one_of_everything():
    # Triton makes a constant of an argument that is 1.
    sizes = router._sizes(1, 1, 1)
    pointers = dict.fromkeys(("logits_ptr", "bias_ptr", "scores_ptr", "weights_ptr"), "*fp32")
    pointers |= dict.fromkeys(("topk_idx_ptr", "counts_ptr"), "*i64")
    pointers |= {"block_counts_ptr": "*i32", "route_scale": "fp32"}
    constexprs = sizes | {"NUM_GROUPS": 1, "TOP_GROUPS": 1, "num_tokens": 1, "logits_stride": 1}
    constexprs |= {"HAS_REPLICAS": True, "LIBDEVICE": True}
    assert compile_with_rest_int32(router._route_kernel, pointers, constexprs).asm["cubin"]

    ones = dict.fromkeys(("num_tokens", "max_replicas", "start"), 1)
    for has_split in (False, True):
        pointers, constexprs = slot_arguments(sizes, has_split=has_split)
        compiled = compile_with_rest_int32(router._slot_kernel, pointers, constexprs | ones)
        assert compiled.asm["cubin"]
