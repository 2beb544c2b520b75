"""What is installed and what is shipped."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import dualpipe_ext

ROOT = Path(__file__).parents[1]


def test_public_names():
    assert sorted(dualpipe_ext.__all__) == [
        "Buffer",
        "DualPipe",
        "DualPipeV",
        "LoadMonitor",
        "__version__",
        "build_plan",
        "rebalance_experts",
        "simulate",
    ]
    for name in dualpipe_ext.__all__:
        assert getattr(dualpipe_ext, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        dualpipe_ext.nonsense  # noqa: B018


def test_import_loads_no_torch():
    program = "import sys, dualpipe_ext; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_kernels_are_part_of_the_package():
    # From anywhere, not only from the root of the tree.
    program = "import dualpipe_ext.kernels.swiglu as s; print(s.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd="/", capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).name == "swiglu.py"


@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="needs setuptools")
def test_source_distribution_can_be_built_from(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path)]
    command += ["sdist", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        shipped = {name.partition("/")[2] for name in tar.getnames()}
    missing = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "kernels", "dualpipe_ext")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".h", ".cuh", ".cu", ".cpp", ".py"}
    } - shipped
    assert not missing
    assert {"setup.py", "pyproject.toml", "LICENSE"} <= shipped
    assert not [name for name in shipped if name.endswith(".so")]
