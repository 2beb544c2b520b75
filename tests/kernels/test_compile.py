"""Every Triton kernel compiled for Hopper, without a GPU: it must compile, and spill nothing.

Not in a process with ``TRITON_INTERPRET=1``: there ``triton.jit`` makes no compilable function.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from dualpipe_ext.kernels import swiglu  # noqa: E402

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="needs a process without the interpreter"
    ),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]

ROWS = ("*fp32", "*bf16")


def compile_for_hopper(kernel, signature, constexprs):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Pointers come from torch's allocator, row strides are multiples of 16 elements in practice:
    # without saying so, the compiler would not use 16-byte accesses.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*") or kind == "i32"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))


def resource_usage(cubin: bytes, folder: Path) -> str:
    """cuobjdump's line for the kernel: registers, stack and local memory."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    output = subprocess.run(
        [str(tool), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
    ).stdout
    return next(line for line in output.splitlines() if "REG:" in line)


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
    usage = resource_usage(compiled.asm["cubin"], tmp_path)
    assert re.search(r"STACK:0\b.* LOCAL:0\b", usage), usage
    # 16-byte global loads: the kernel is bound by memory.
    assert "ld.global.v4" in compiled.asm["ptx"], "expected vector loads"
