"""Building the package; metadata is in pyproject.toml, the toolkit and its flags in toolkit.py.

The CUDA core ``dualpipe_ext._C`` is compiled by nvcc through a generated ``build.ninja``: files are
compiled in parallel, and only those whose source, headers or flags have changed. It needs neither
torch nor a GPU. Without a CUDA toolkit the package installs without it (``DUALPIPE_CUDA=1`` makes
that an error, ``DUALPIPE_CUDA=0`` skips it always).
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def load_from_source(name: str) -> ModuleType:
    """A module of the package, without importing the package, which would import torch."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "dualpipe_ext" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Before it runs: dataclasses look their module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


env = load_from_source("env")
toolkit = load_from_source("toolkit")


def find_toolkit():
    """The toolkit to build with, or None if the core is to be left out."""
    try:
        wanted = env.read("DUALPIPE_CUDA")
    except ValueError as error:
        raise SystemExit(f"dualpipe_ext: {error}") from None
    if wanted == "0":
        print("dualpipe_ext: CUDA core left out (DUALPIPE_CUDA=0)", file=sys.stderr)
        return None
    try:
        return toolkit.find_toolkit()
    except toolkit.ToolkitError as error:
        if wanted == "1":
            raise SystemExit(f"dualpipe_ext: DUALPIPE_CUDA=1, but {error}") from None
        print(f"dualpipe_ext: CUDA core left out: {error}", file=sys.stderr)
        return None


class NinjaBuildExt(build_ext):
    """Compiles the one extension with ninja and nvcc instead of distutils' compiler."""

    def build_extension(self, ext: Extension) -> None:
        found = find_toolkit()
        if found is None:
            return
        # One folder per Python: objects of the bindings depend on its headers.
        folder = ROOT / "build" / f"core-{sysconfig.get_config_var('SOABI')}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(found.nvcc, ext.sources))
        if subprocess.run([ninja_program(), "-C", str(folder)]).returncode:
            raise SystemExit(
                "dualpipe_ext: the CUDA core does not compile, see above; "
                "DUALPIPE_CUDA=0 installs without it"
            )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "_C.so", target)


def ninja_program() -> str:
    """The ninja that pip installed for this build, or one on PATH."""
    try:
        import ninja
    except ImportError:
        program = shutil.which("ninja")
        if program is None:
            raise SystemExit("dualpipe_ext: expected ninja on PATH, got none") from None
        return program
    return str(Path(ninja.BIN_DIR) / "ninja")


def ninja_file(nvcc: Path, sources: list[str]) -> str:
    """Text of build.ninja: one rule to compile, one to link."""
    import pybind11

    includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    # Only the bindings see Python: the kernels' commands stay the same whichever temporary folder
    # pip keeps pybind11 in, so they are not compiled again.
    python_flags = " ".join(f"-isystem {shlex.quote(str(path))}" for path in includes[1:])
    host_compiler = f"-ccbin {shlex.quote(os.environ['CXX'])}" if os.environ.get("CXX") else ""
    flags = " ".join([*toolkit.ARCH_FLAGS, *toolkit.COMPILE_FLAGS, host_compiler])
    lines = [
        "ninja_required_version = 1.5",
        f"nvcc = {shlex.quote(str(nvcc))}",
        f"flags = {flags} -I{shlex.quote(str(includes[0]))}",
        "rule compile",
        "  command = $nvcc $flags $extra -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $in",
        "rule link",
        # The static runtime, and no driver library: the module imports where there is no driver.
        f"  command = $nvcc {' '.join(toolkit.ARCH_FLAGS)} {host_compiler} -shared -cudart=static "
        "$in -o $out",
        "  description = $out",
    ]
    objects = []
    for source in sources:
        name = str(Path(source).relative_to("csrc")).replace(os.sep, "_") + ".o"
        objects.append(name)
        lines.append(f"build {name}: compile {ninja_path(ROOT / source)}")
        if Path(source).name.endswith("bindings.cpp"):
            lines.append(f"  extra = {python_flags}")
    lines.append(f"build _C.so: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def ninja_path(path: Path) -> str:
    """A path as build.ninja spells it: dollars, blanks and colons escaped."""
    text = str(path)
    for special in "$ :":
        text = text.replace(special, "$" + special)
    return text


SOURCES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "csrc").rglob("*")
    if path.suffix in {".cu", ".cpp"}
)

setup(
    packages=[*find_packages(include=["dualpipe_ext", "dualpipe_ext.*"]), "dualpipe_ext.kernels"],
    # The Triton kernels live beside csrc/ in the tree and inside the package once installed.
    package_dir={"dualpipe_ext.kernels": "kernels"},
    # Optional for setuptools' own checks: whether it must exist is find_toolkit's decision.
    ext_modules=[Extension("dualpipe_ext._C", sources=SOURCES, optional=True)],
    cmdclass={"build_ext": NinjaBuildExt},
)
