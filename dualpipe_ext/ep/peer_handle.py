"""What a dispatch over peer memory leaves behind.

Shapes: R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dualpipe_ext.ep.handle import Handle


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PeerHandle(Handle):
    """A handle and the arrays that the kernels follow."""

    arrays: Any = field(repr=False)
    """``HandleArrays`` of csrc/api/handle_arrays.h: where they are, made once for all calls."""
    memory: Tensor = field(repr=False)
    """int64, where those are that only kernels read; cut by csrc/layout/handle_arrays.h."""
    sent: list[list[int]] | None = field(repr=False)
    """[R, R], tokens that rank s sends to rank d, where the host knows them."""
