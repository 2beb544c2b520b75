"""The host halves of csrc/: compiled with the C++ compiler alone, then run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("source", sorted(HERE.glob("test_*.cpp")), ids=lambda path: path.stem)
def test_host_code(source, tmp_path):
    program = tmp_path / source.stem
    # Undefined behaviour (signed overflow, misaligned access) ends the program.
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined"]
    flags += ["-fno-sanitize-recover", f"-I{CSRC}", f"-I{HERE}", f"-I{HERE / 'streams'}"]
    compiled = subprocess.run(
        [COMPILER, *flags, str(source), "-o", str(program)], capture_output=True, text=True
    )
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
