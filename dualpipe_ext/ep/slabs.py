"""Slabs of the communication buffer that outputs live in: taken, and given back by themselves.

Shapes: N rows of an output.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

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

    def __init__(self, index: int, back_to: list[int]) -> None:
        self.index = index
        weakref.finalize(self, back_to.append, index).atexit = False


class SlabPool:
    """The slabs that zero-copy outputs can take, as tensors.

    Args:
        memory: uint8, the rank's communication memory.
        regions: name -> (offset of the region in slab 0, bytes).
        slab_bytes: from one slab to the next.
        scale_pitch: bytes from one row's scales to the next; 0 if there is no room for any.
        free: those that can be taken.
    """

    def __init__(
        self,
        memory: Tensor,
        regions: dict[str, tuple[int, int]],
        *,
        slab_bytes: int,
        scale_pitch: int,
        free: FreeSlabs,
    ) -> None:
        self._memory = memory
        self._regions = regions
        self._slab_bytes = slab_bytes
        self._scale_pitch = scale_pitch
        self._free = free

    def take(self, num_rows: int, row_bytes: int, *, with_scales: bool) -> SlabRows | None:
        """Rows of a free slab, if there is one; it is free again when they are gone."""
        lease = self._free.take()
        if lease is None:
            return None
        start = self._memory.data_ptr() + lease.index * self._slab_bytes

        def tensor(region: str, pitch: int) -> Tensor:
            address = start + self._regions[region][0]
            memory = _Region(address, num_rows * pitch, (lease, self._memory))
            return torch.as_tensor(memory, device=self._memory.device).view(num_rows, pitch)

        rows = tensor("rows", -(-row_bytes // 128) * 128)
        scales = tensor("scales", self._scale_pitch) if with_scales else None
        return SlabRows(lease.index, rows, scales)


@dataclass(frozen=True, slots=True, eq=False)
class SlabRows:
    """Rows that stay in the communication buffer."""

    index: int
    row_bytes: Tensor
    """uint8 [N, pitch]"""
    scale_bytes: Tensor | None
    """uint8 [N, pitch]"""

    def rows(self, dtype: torch.dtype, hidden: int) -> Tensor:
        return self.row_bytes.view(dtype)[:, :hidden]

    def scales(self, num_scales: int) -> Tensor:
        assert self.scale_bytes is not None
        return self.scale_bytes.view(torch.float32)[:, :num_scales]


class _Region:
    """Some bytes of GPU memory, for torch to make a tensor of; alive as long as its storage."""

    def __init__(self, address: int, num_bytes: int, keep: object) -> None:
        self._keep = keep
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
