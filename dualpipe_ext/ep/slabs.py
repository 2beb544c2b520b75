"""Slabs of the communication buffer that outputs live in: taken, and given back by themselves.

Shapes: N rows of an output.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor


class SlabPool:
    """The slabs that zero-copy outputs can take.

    Args:
        memory: uint8, the rank's communication memory.
        regions: name -> (offset of the region in slab 0, bytes).
        slab_bytes: from one slab to the next.
        scale_pitch: bytes from one row's scales to the next; 0 if there is no room for any.
        slabs: indices of the slabs.
    """

    def __init__(
        self,
        memory: Tensor,
        regions: dict[str, tuple[int, int]],
        *,
        slab_bytes: int,
        scale_pitch: int,
        slabs: range,
    ) -> None:
        self._memory = memory
        self._regions = regions
        self._slab_bytes = slab_bytes
        self._scale_pitch = scale_pitch
        self._free = list(slabs)
        self._captured: list[_Lease] = []

    def take(self, num_rows: int, row_bytes: int, *, with_scales: bool) -> SlabRows | None:
        """Rows of a free slab, if there is one; it is free again when they are gone."""
        if not self._free:
            return None
        index = self._free.pop()
        lease = _Lease(self._free, index, self._memory)
        if torch.cuda.is_current_stream_capturing():
            # A graph writes into this very slab at every replay, as long as it lives: nobody can
            # tell how long that is.
            self._captured.append(lease)

        def tensor(region: str, pitch: int) -> Tensor:
            address = self._memory.data_ptr() + index * self._slab_bytes + self._regions[region][0]
            memory = _Region(address, num_rows * pitch, lease)
            return torch.as_tensor(memory, device=self._memory.device).view(num_rows, pitch)

        rows = tensor("rows", -(-row_bytes // 128) * 128)
        scales = tensor("scales", self._scale_pitch) if with_scales else None
        return SlabRows(index, rows, scales)


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


class _Lease:
    """A slab that is taken; given back when nothing refers to it any more."""

    def __init__(self, free: list[int], index: int, keep: object) -> None:
        self._keep = keep
        weakref.finalize(self, free.append, index).atexit = False


class _Region:
    """Some bytes of GPU memory, for torch to make a tensor of; alive as long as its storage."""

    def __init__(self, address: int, num_bytes: int, lease: _Lease) -> None:
        self._lease = lease
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
