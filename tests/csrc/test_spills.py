"""Every CUDA kernel compiled by nvcc for Hopper: nothing may be spilled to local memory."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from dualpipe_ext import toolkit

CSRC = Path(__file__).parents[2] / "csrc"
KERNELS = sorted(CSRC.rglob("*.cu"))


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: str(path.relative_to(CSRC)))
def test_no_spills(source, tmp_path):
    try:
        nvcc = toolkit.find_toolkit().nvcc
    except toolkit.ToolkitError as error:
        pytest.skip(str(error))
    command = [str(nvcc), *toolkit.ARCH_FLAGS, *toolkit.COMPILE_FLAGS, f"-I{CSRC}"]
    command += ["-Xptxas", "-v", "-cubin", str(source), "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    )
    assert spills, f"expected ptxas to report on each kernel, got {done.stderr}"
    assert set(spills) == {("0", "0", "0")}, done.stderr
