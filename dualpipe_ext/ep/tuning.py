"""How the SMs of the EP kernels are divided among their roles. Measured; see docs/LOG.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dualpipe_ext.ep.handle import Handle
from dualpipe_ext.ep.kernel_calls import CombineInput, DispatchInput
from dualpipe_ext.ep.transport import TransportConfig

# Rows longer than this are moved in pieces (csrc/ep/tuning.h).
MAX_PIECE_BYTES = 16384
# Shared memory of an SM that stages may take; the rest is for the lists beside them.
_STAGE_BYTES = 216 * 1024
# A stage of a sum (csrc/ep/combine_roles.cuh).
_SUM_STAGE_BYTES = 2048 + 128
# Stages in flight beyond this number bring nothing.
_MOST_STAGES = 8


@dataclass(frozen=True, slots=True)
class Tuning:
    """Warps of each role in a CTA, and rows that each keeps in flight."""

    send_warps: int
    send_stages: int
    receive_warps: int
    receive_stages: int
    receive_piece: int = MAX_PIECE_BYTES
    """Bytes of a row that a receiving stage holds, at most."""
    send_piece: int = MAX_PIECE_BYTES
    """The same of a sending stage."""

    def as_core(self, core_module: Any) -> Any:
        """``Tuning`` of csrc/ep/tuning.h."""
        return core_module.Tuning(
            self.send_warps,
            self.send_stages,
            self.receive_warps,
            self.receive_stages,
            self.receive_piece,
            self.send_piece,
        )


def _stage_bytes(row_bytes: int, piece: int, num_scales: int, config: TransportConfig) -> int:
    """Of a row's piece and the numbers behind it (``StageNumbers`` in csrc/ep), at most."""
    numbers = 4 + num_scales + config.num_ranks + 4 * config.top_k + 12
    return -(-min(row_bytes, piece) // 128) * 128 + -(-4 * numbers // 128) * 128


def for_dispatch(source: DispatchInput, in_slab: bool, config: TransportConfig) -> Tuning:
    """Half of the warps keep the link busy; quantising takes more, with small pieces."""
    quantises = source.payload != "as_is"
    warps, piece = (12, 4096) if quantises else (8, 7168)
    receive_warps, receive_piece = 4, 7168
    stage = _stage_bytes(source.in_bytes, piece, source.num_scales, config)
    receive_stage = _stage_bytes(source.out_bytes, receive_piece, source.num_scales, config)
    receive_stages = 0 if in_slab else 3
    left = _STAGE_BYTES - receive_warps * receive_stages * receive_stage
    while warps > 1 and 2 * warps * stage > left:
        warps -= 1
    stages = _stages(left, warps, stage)
    return Tuning(warps, stages, receive_warps, receive_stages, receive_piece, piece)


def for_combine(source: CombineInput, handle: Handle, config: TransportConfig) -> Tuning:
    """Token layout: few warps keep the link busy, the others sum. Expert layout: all sum."""
    if handle.layout == "expert":
        stages = _stages(_STAGE_BYTES // 2, 8, _SUM_STAGE_BYTES)
        return Tuning(8, stages, 8, stages)
    piece = 7168
    left = _STAGE_BYTES - 10 * 4 * _SUM_STAGE_BYTES
    return Tuning(
        6,
        _stages(left, 6, _stage_bytes(source.row_bytes, piece, 0, config)),
        10,
        4,
        send_piece=piece,
    )


def for_pack(source: DispatchInput, config: TransportConfig) -> Tuning:
    """The copy-engine path: all warps send, into the staging slab."""
    quantises = source.payload != "as_is"
    warps, piece = (14, 4096) if quantises else (10, 7168)
    stage = _stage_bytes(source.in_bytes, piece, source.num_scales, config)
    return Tuning(warps, _stages(_STAGE_BYTES, warps, stage), 0, 0, send_piece=piece)


def for_unpack(source: DispatchInput, config: TransportConfig) -> Tuning:
    """The copy-engine path: all warps move rows from the slab."""
    warps, piece = 10, 7168
    stage = _stage_bytes(source.out_bytes, piece, source.num_scales, config)
    return Tuning(0, 0, warps, _stages(_STAGE_BYTES, warps, stage), piece)


def for_combine_pack(source: CombineInput, handle: Handle, config: TransportConfig) -> Tuning:
    """The copy-engine path: all warps send, into the staging slab."""
    if handle.layout == "expert":
        return Tuning(12, _stages(_STAGE_BYTES, 12, _SUM_STAGE_BYTES), 0, 0)
    warps, piece = 10, 7168
    stages = _stages(_STAGE_BYTES, warps, _stage_bytes(source.row_bytes, piece, 0, config))
    return Tuning(warps, stages, 0, 0, send_piece=piece)


def for_reduce() -> Tuning:
    """The copy-engine path: all warps sum."""
    return Tuning(0, 0, 16, _stages(_STAGE_BYTES, 16, _SUM_STAGE_BYTES))


# A launch that only gives leave and waits for it.
PERMITS_ONLY = Tuning(0, 0, 1, 0)


def _stages(num_bytes: int, warps: int, stage: int) -> int:
    return max(2, min(_MOST_STAGES, num_bytes // (warps * stage)))
