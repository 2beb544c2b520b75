"""Finding the CUDA toolkit, and the flags that every CUDA file of this project is compiled with.

Used when the package is built (``setup.py`` loads this file by its path, so it imports nothing but
the standard library), by ``dualpipe doctor``, and by the tests that compile single files.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

#: cudaGetDriverEntryPointByVersion appeared in 12.5.
MIN_VERSION = (12, 5)

#: Hopper with its own instructions (bulk copies, setmaxnreg, wgmma). The long form: with plain
#: ``-arch=sm_90a`` some toolkits also run an sm_90 pass, which rejects them.
ARCH_FLAGS = ("-gencode", "arch=compute_90a,code=sm_90a")

#: For every file, .cu or .cpp. Line tables cost nothing at run time and let profilers name lines.
COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
)

_STANDARD_HOME = Path("/usr/local/cuda")


class ToolkitError(RuntimeError):
    """No usable CUDA toolkit. The message says where it was looked for."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its folder, its compiler, its version as (major, minor)."""

    home: Path
    nvcc: Path
    version: tuple[int, int]
    found_by: str


def find_toolkit(environ: Mapping[str, str] | None = None) -> Toolkit:
    """Look in ``CUDA_HOME``, then in /usr/local/cuda, then where ``nvcc`` on PATH says it lives.

    Args:
        environ: instead of ``os.environ``.

    Raises:
        ToolkitError: none of the three has a compiler that runs and is new enough.
    """
    environ = os.environ if environ is None else environ
    tried = []
    for found_by, home in _candidates(environ):
        nvcc = home / "bin" / "nvcc"
        version = _version(nvcc)
        if version is None:
            tried.append(f"{found_by} ({home}) has no working bin/nvcc")
        elif version < MIN_VERSION:
            tried.append(f"{found_by} ({home}) is {_text(version)}")
        else:
            return Toolkit(home=home, nvcc=nvcc, version=version, found_by=found_by)
    if not environ.get("CUDA_HOME"):
        tried.insert(0, "CUDA_HOME is not set")
    if shutil.which("nvcc", path=environ.get("PATH")) is None:
        tried.append("there is no nvcc on PATH")
    raise ToolkitError(
        f"expected a CUDA toolkit of version {_text(MIN_VERSION)} or newer, got none: "
        + "; ".join(tried)
    )


def _candidates(environ: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    if environ.get("CUDA_HOME"):
        yield "CUDA_HOME", Path(environ["CUDA_HOME"])
    if _STANDARD_HOME.exists():
        yield "standard folder", _STANDARD_HOME
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    # The nvcc on PATH may be a wrapper script in a folder that holds nothing else; a dry run names
    # the folder of the real one.
    top = re.search(r"^#\$ TOP=(.+)$", _run(nvcc, "--dryrun", "-x", "cu", "/dev/null"), re.M)
    if top:
        yield "nvcc --dryrun", Path(top.group(1).strip()).resolve()


def _version(nvcc: Path) -> tuple[int, int] | None:
    release = re.search(r"release (\d+)\.(\d+)", _run(nvcc, "--version"))
    return (int(release.group(1)), int(release.group(2))) if release else None


def _run(program: str | Path | None, *args: str) -> str:
    """Output of a short command, both streams; empty if it cannot be run."""
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [str(program), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
