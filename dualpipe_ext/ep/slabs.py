"""Slabs of the communication buffer that outputs live in: taken, and given back by themselves.

Shapes: N rows of an output, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class FreeSlabs:
    """Which slabs are free.

    Args:
        slabs: indices of the slabs.
        capture_id: tells which stream capture the current stream is in, 0 for none.
    """

    def __init__(self, slabs: range, capture_id: Callable[[], int]) -> None:
        self._free = list(slabs)
        self._capture_id = capture_id
        # A graph writes into its slabs at every replay, as long as it lives, and nobody can tell
        # how long that is: what a capture has taken, only the same capture can take again.
        self._free_in_capture: dict[int, list[int]] = {}

    def take(self) -> Lease | None:
        """A free slab, if there is one; it is free again when the lease is gone."""
        capture = self._capture_id()
        back_to = self._free_in_capture.setdefault(capture, []) if capture else self._free
        free = back_to or self._free
        return Lease(free.pop(), back_to) if free else None


class Lease:
    """A slab that is taken; given back when nothing refers to it any more."""

    __slots__ = ("_back_to", "index")

    def __init__(self, index: int, back_to: list[int]) -> None:
        self.index = index
        self._back_to = back_to

    def __del__(self) -> None:
        # Not weakref.finalize, which takes several microseconds to set up.
        self._back_to.append(self.index)


# Code and bits of a type in DLPack.
_DLPACK_TYPES = {
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.bfloat16: (4, 16),
    torch.float8_e4m3fn: (10, 8),
}


class SlabPool:
    """The slabs that zero-copy outputs can take, as tensors.

    Args:
        core: the compiled core.
        memory: uint8, the rank's communication memory.
        layout: how it is cut.
        free: those that can be taken.
    """

    def __init__(self, core: Any, memory: Tensor, layout: Any, free: FreeSlabs) -> None:
        self._core = core
        self._memory = memory
        self._free = free
        regions = layout.regions()
        self._first_rows = memory.data_ptr() + regions["rows"][0]
        self._first_scales = memory.data_ptr() + regions["scales"][0]
        self._slab_bytes = layout.slab_bytes
        self._scale_pitch = layout.scale_pitch
        self._device = tuple(int(number) for number in memory.__dlpack_device__())

    def take(
        self, num_rows: int, hidden: int, dtype: torch.dtype, num_scales: int
    ) -> SlabRows | None:
        """Rows of a free slab, if there is one; it is free again when they are gone.

        Args:
            num_rows: N.
            hidden: values of a row.
            dtype: theirs.
            num_scales: of a row, 0 for none.
        """
        lease = self._free.take()
        if lease is None:
            return None
        start = lease.index * self._slab_bytes
        pitch = -(-hidden * dtype.itemsize // 128) * 128 // dtype.itemsize
        rows = self._tensor(self._first_rows + start, num_rows, hidden, pitch, dtype, lease)
        scales = None
        if num_scales:
            first, pitch = self._first_scales + start, self._scale_pitch // 4
            scales = self._tensor(first, num_rows, num_scales, pitch, torch.float32, lease)
        return SlabRows(lease.index, rows, scales)

    def _tensor(
        self, address: int, rows: int, columns: int, pitch: int, dtype: torch.dtype, lease: Lease
    ) -> Tensor:
        """A tensor with a storage of its own, so that the lease ends with the last that shares it.

        Through DLPack, which takes our word for type, strides and device: of an object with
        ``__cuda_array_interface__`` torch makes bytes, and asks the driver where they are.
        """
        keep = (lease, self._memory)
        capsule = self._core.rows_capsule(
            address, rows, columns, pitch, *_DLPACK_TYPES[dtype], *self._device, keep
        )
        return torch.from_dlpack(capsule)


@dataclass(slots=True, eq=False)
class SlabRows:
    """Rows that stay in the communication buffer."""

    index: int
    rows: Tensor
    """[N, H]"""
    scales: Tensor | None
    """float32 [N, H/128]"""
