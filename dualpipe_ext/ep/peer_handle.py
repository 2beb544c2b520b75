"""What a dispatch over peer memory leaves behind.

Shapes: T tokens of this rank, R ranks, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from dualpipe_ext.ep.handle import Handle


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PeerHandle(Handle):
    """A handle and the arrays that the kernels follow; described in csrc/ep/route.h."""

    slots: Tensor = field(repr=False)
    """int32 [T, R]"""
    ids: Tensor = field(repr=False)
    """int16 [T, K rounded up to 8]"""
    matrix: Tensor = field(repr=False)
    """int32 [R + 1, R]"""
    run_starts: Tensor = field(repr=False)
    """int32 [R, runs + 1]"""
    unit_tokens: Tensor | None = field(repr=False)
    """int32 [8, R]; only of the copy engines' transport."""
    positions: Tensor | None = field(repr=False)
    """int32 [R * max_tokens, K rounded up to 4]; expert layout only."""
    sent: list[list[int]] | None = field(repr=False)
    """[R, R], tokens that rank s sends to rank d, where the host knows them."""
