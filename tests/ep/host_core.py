"""The EP transports over peer memory on a machine without a GPU: everything but the kernels.

``tests/csrc/host_core.cpp`` stands for the kernels and for the CUDA runtime behind the bindings;
tensors are CPU tensors, the stream is number 7. What the host does for a call is all real: for
tests of what kernels are given, and for ``benchmarks/ep_host.py``.

Shapes: R ranks.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch

from dualpipe_ext import core, toolkit
from dualpipe_ext.ep import buffer, memory
from dualpipe_ext.ep.transport import Ranks

ROOT = Path(__file__).resolve().parents[2]
STREAM = 7
_STAND_IN = ROOT / "tests" / "csrc" / "host_core.cpp"
_LEFT_OUT = ("driver.cpp",)  # the stand-in has it


def why_unavailable() -> str:
    """Why it cannot be compiled here; empty if it can."""
    try:
        toolkit.find_toolkit()
    except toolkit.ToolkitError as error:
        return str(error)
    if _compiler() is None:
        return "no C++ compiler"
    return "" if importlib.util.find_spec("pybind11") else "no pybind11"


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def build() -> Path:
    """Compile what has changed; returns the module's file. One process at a time."""
    folder = ROOT / "build" / f"host_core-{sysconfig.get_config_var('SOABI')}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build_in(folder)


def _build_in(folder: Path) -> Path:
    import pybind11

    headers = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.h"))
    includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    includes.append(toolkit.find_toolkit().home / "include")
    compiler = _compiler()
    command = [compiler, "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden"]
    # Types have names of their own: the real core may be in the same process.
    command.append("-Ddualpipe=dualpipe_stand_in")
    command += [f"-I{include}" for include in includes]
    sources = [p for p in sorted((ROOT / "csrc" / "api").glob("*.cpp")) if p.name not in _LEFT_OUT]
    objects, running = [], []
    for source in (*sources, _STAND_IN):
        target = folder / f"{source.stem}.o"
        objects.append(str(target))
        newest = max(source.stat().st_mtime, headers)
        if not target.exists() or target.stat().st_mtime < newest:
            running.append(subprocess.Popen([*command, "-c", str(source), "-o", str(target)]))
    codes = [process.wait() for process in running]
    if any(codes):
        raise RuntimeError("expected the bindings to compile, see above")
    library = folder / "_C.so"
    if running or not library.exists():
        # Functions of the runtime that nobody calls here stay undefined.
        subprocess.run([compiler, "-shared", "-Wl,-z,lazy", *objects, "-o", library], check=True)
    return library


def _load(name: str, library: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_loader(name, loader)
    # Undefined functions are looked up when they are called.
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    finally:
        sys.setdlopenflags(flags)
    return module


def _allocate(num_bytes: int, config: Ranks) -> memory.PeerMemory:
    def aligned() -> torch.Tensor:
        room = torch.zeros(num_bytes + 128, dtype=torch.uint8)
        start = -room.data_ptr() % 128
        return room[start : start + num_bytes]

    own = aligned()
    if config.local is not None:
        everyone = config.local.gather(own)
    else:
        everyone = [own if rank == config.rank else aligned() for rank in range(config.num_ranks)]
    return memory.PeerMemory(own, [one.data_ptr() for one in everyone], everyone, None)


def _meet(config: Ranks) -> None:
    """The other ranks of a group need not be there."""
    if config.local is not None:
        config.local.gather(None)


class _Stream:
    """The one stream there is."""

    cuda_stream = STREAM


class _Event:
    """What it stands behind has been done."""

    def record(self) -> None: ...

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def host_core() -> Iterator[ModuleType]:
    """In the body, transports use the stand-in; yields what tells its launches."""
    library = build()
    stand_in, launches = _load("_C", library), _load("host_core", library)
    stand_in.capture_id = lambda stream: 0
    stream, device = _Stream(), SimpleNamespace(multi_processor_count=132)
    # Functions, not mocks: those would cost more than what is measured.
    ours = {"module": lambda: stand_in}
    shared = {"allocate": _allocate, "unavailable": lambda config: None, "meet": _meet}
    cuda = {
        "current_stream": lambda: stream,
        "get_device_properties": lambda of: device,
        "stream": lambda chosen: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "Event": _Event,
    }
    raw = {
        # CPU tensors are on a device without an index.
        "_cuda_getDevice": lambda: None,
        "_cuda_getCurrentRawStream": lambda index: STREAM,
    }
    with contextlib.ExitStack() as patches:
        enter = patches.enter_context
        for place, fakes in {core: ours, memory: shared, torch.cuda: cuda, torch._C: raw}.items():
            for name, fake in fakes.items():
                enter(mock.patch.object(place, name, fake, create=place is torch._C))
        yield launches


@contextlib.contextmanager
def as_rank(rank: int, num_ranks: int) -> Iterator[None]:
    """Buffers made in the body belong to that rank; the others need not be there."""
    place = mock.Mock(return_value=(rank, num_ranks, None))
    with mock.patch.object(buffer, "_place", place):
        yield
