"""What the driver's management library (NVML) says of GPUs and NVLink, without CUDA.

NVML is loaded with ctypes: it comes with every NVIDIA driver, starts no CUDA context, and answers
where neither the compiled core nor a CUDA build of torch is installed.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

# Names and numbers are those of nvml.h.
_SUCCESS = 0
_MAX_LINKS = 18
_FEATURE_ENABLED = 1
_P2P_CAPS_INDEX_NVLINK = 2
_NAME_BYTES = 96


@dataclass(frozen=True)
class Gpu:
    """One GPU as NVML numbers them (by PCI bus, whatever ``CUDA_VISIBLE_DEVICES`` says)."""

    index: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    active_nvlinks: int


@dataclass(frozen=True)
class Machine:
    """The driver's release (``"580.159.04"``), the GPUs, and which pairs NVLink connects."""

    driver: str
    gpus: tuple[Gpu, ...]
    nvlink: tuple[tuple[bool, ...], ...]


class _Memory(ctypes.Structure):
    _fields_ = [
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


def query() -> Machine | None:
    """Ask NVML; ``None`` where there is no driver or it does not answer."""
    with _library() as nvml:
        if nvml is None:
            return None
        driver = ctypes.create_string_buffer(_NAME_BYTES)
        nvml.nvmlSystemGetDriverVersion(driver, _NAME_BYTES)
        count = ctypes.c_uint()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        handles = []
        for index in range(count.value):
            handle = ctypes.c_void_p()
            if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == _SUCCESS:
                handles.append(handle)
        return Machine(
            driver=driver.value.decode(),
            gpus=tuple(_gpu(nvml, index, handle) for index, handle in enumerate(handles)),
            nvlink=tuple(
                tuple(a is not b and _nvlink(nvml, a, b) for b in handles) for a in handles
            ),
        )


@contextlib.contextmanager
def _library() -> Iterator[ctypes.CDLL | None]:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        yield None
        return
    if nvml.nvmlInit_v2() != _SUCCESS:
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: ctypes.CDLL, index: int, handle: ctypes.c_void_p) -> Gpu:
    name = ctypes.create_string_buffer(_NAME_BYTES)
    major, minor, memory = ctypes.c_int(), ctypes.c_int(), _Memory()
    nvml.nvmlDeviceGetName(handle, name, _NAME_BYTES)
    nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    active = 0
    for link in range(_MAX_LINKS):
        state = ctypes.c_uint()
        # Fails for links that the board does not have.
        if nvml.nvmlDeviceGetNvLinkState(handle, link, ctypes.byref(state)) == _SUCCESS:
            active += state.value == _FEATURE_ENABLED
    return Gpu(index, name.value.decode(), (major.value, minor.value), memory.total, active)


def _nvlink(nvml: ctypes.CDLL, a: ctypes.c_void_p, b: ctypes.c_void_p) -> bool:
    status = ctypes.c_uint()
    answer = nvml.nvmlDeviceGetP2PStatus(a, b, _P2P_CAPS_INDEX_NVLINK, ctypes.byref(status))
    return answer == _SUCCESS and status.value == 0  # NVML_P2P_STATUS_OK
