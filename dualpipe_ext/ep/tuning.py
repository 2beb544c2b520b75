"""How the SMs of the EP kernels are divided among their roles.

What an SM can do was measured on an H200 (docs/LOG.md): it stores at most 48 GB/s beside its loads,
43 GB/s to a peer, in bulk copies of 4 KiB or more. The shares below make all roles end together.

Shapes: R ranks, K top-k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dualpipe_ext.ep.handle import Handle
from dualpipe_ext.ep.kernel_calls import CombineInput, DispatchInput
from dualpipe_ext.ep.transport import TransportConfig

# GB/s of one SM.
_TO_PEER = 43.0
_TO_MEMORY = 48.0
_FROM_MEMORY = 130.0
# What rows that arrive cost the SMs that take them in: less than their bytes, as measured.
_FROM_SLAB = 87.0
# The link is full with fewer SMs; more only bring a few percent. With several peers more of them
# meet at one receiver, and all are slower: on four GPUs 9 to 13 SMs take 470 us, 19 take 543; into
# an own tensor 10 take 481 and 9 take 475.
_MOST_SENDERS = 32
_MOST_SENDERS_TO_SEVERAL = 9
# With fewer SMs, a share of them for each role leaves too few for one: all do all.
_FEW_SMS = 16
# With more, rows that only have to stay in the slab go faster if all SMs do all.
_MANY_SMS = 48
# Shared memory that a CTA can have.
_SHARED_BYTES = 227 * 1024
# Warps of a CTA that the dispatch kernel is compiled for.
_MOST_WARPS = 16
# Pieces in flight of a warp; more bring nothing.
_MOST_STAGES = 8
# Bytes of a piece in a stage.
_PIECE = 7168
# Of the copy-engine path. Units of a segment (csrc/layout/segment.h) in which its parts end, by
# bytes of a segment, at least. A part costs two kernels, 3 to 5 us each, and two or three copies,
# 2.5 us each whatever they carry. The first is the smallest: the link stands idle until it is
# packed.
_PARTS = ((32 * 2**20, (2, 5, 8)), (12 * 2**20, (4, 8)), (0, (8,)))
# The same where rows go to one peer after the other. Ranks drift apart with every turn, so there
# are fewer and larger parts. Measured on four GPUs, segments of 59 MB: calls from Python are as
# fast in one part as in two (dispatch 686, 703 us; combine 561, 597), calls in a graph not always
# (675, 605; 555, 584).
_PARTS_IN_TURN = ((128 * 2**20, (4, 8)), (0, (8,)))
SEGMENT_UNITS = 8


@dataclass(frozen=True, slots=True)
class Tuning:
    """``Tuning`` of csrc/ep/tuning.h."""

    send_ctas: int
    send_warps: int = 0
    send_stages: int = 0
    own_warps: int = 0
    own_stages: int = 0
    receive_warps: int = 0
    receive_stages: int = 0
    send_piece: int = _PIECE
    receive_piece: int = _PIECE
    mixed: bool = False

    def as_core(self, core: Any) -> Any:
        """As the core takes it."""
        return core.Tuning(
            send_ctas=self.send_ctas,
            send_warps=self.send_warps,
            send_stages=self.send_stages,
            own_warps=self.own_warps,
            own_stages=self.own_stages,
            receive_warps=self.receive_warps,
            receive_stages=self.receive_stages,
            send_piece=self.send_piece,
            receive_piece=self.receive_piece,
            mixed=self.mixed,
        )


def for_dispatch(
    source: DispatchInput, handle: Handle, in_slab: bool, num_sms: int, config: TransportConfig
) -> Tuning:
    """Some SMs send, the others do what stays on the GPU; or all SMs do all."""
    fp8 = source.num_scales > 0
    several = config.num_ranks > 2
    if several:
        mixed = _quantises(source) or (fp8 and in_slab) or num_sms < _FEW_SMS
    else:
        mixed = fp8 or num_sms < _FEW_SMS or (in_slab and num_sms >= _MANY_SMS)
    if mixed:
        return _mixed_dispatch(source, in_slab, config, num_sms)
    reached = _ranks_reached(config)
    own = reached / config.num_ranks
    if handle.layout == "expert":
        local = config.top_k / _TO_MEMORY
    else:
        local = own / _TO_MEMORY + (0 if in_slab else (reached - own) / _FROM_SLAB)
    stage = _stage_bytes(source.out_bytes, _PIECE, source.num_scales, config)
    # Without rows to move, receiving is all waiting and small numbers: many warps, no stages.
    if in_slab:
        own_warps, own_stages = 8, _stages(_room(config), 8, stage)
        receive_warps, receive_stages = _MOST_WARPS - 8, 0
    elif several:
        own_warps, own_stages, receive_warps, receive_stages = _local_roles(
            own / reached, stage, config
        )
    else:
        own_warps, own_stages = 4, _stages(_room(config) // 2, 4, stage)
        receive_warps, receive_stages = 6, _stages(_room(config) // 2, 6, stage)
    return Tuning(
        _senders(
            num_sms,
            (reached - own) / _TO_PEER,
            local,
            config,
            most=_MOST_SENDERS_TO_SEVERAL if several else _MOST_SENDERS,
        ),
        8,
        _stages(_room(config), 8, stage),
        own_warps,
        own_stages,
        receive_warps,
        receive_stages,
    )


def _local_roles(own: float, stage: int, config: TransportConfig) -> tuple[int, int, int, int]:
    """Warps and stages of those that keep the share ``own`` of rows, and of those that receive.

    What bounds them is the number of pieces under way, one fewer than stages of each warp.
    """
    stages = max(2, min(3, _room(config) // (2 * stage)))
    warps = min(_MOST_WARPS, max(2, _room(config) // (stages * stage)))
    own_warps = max(1, min(warps - 1, round(warps * own)))
    return own_warps, stages, warps - own_warps, stages


def _mixed_dispatch(
    source: DispatchInput, in_slab: bool, config: TransportConfig, num_sms: int
) -> Tuning:
    """A row is read, and quantised, once: by the SM that sends it everywhere."""
    # Stages hold rows as they leave.
    stage = _stage_bytes(source.out_bytes, _PIECE, source.num_scales, config)
    receive_warps, receive_stages = (2, 0) if in_slab else (4, 2)
    most = _MOST_WARPS if _quantises(source) else 8 + receive_warps
    if config.num_ranks > 2:
        # Several times as many runs arrive as are sent, and each is a wait of microseconds.
        receive_warps, most = 8, 14
        if _quantises(source) and num_sms < _FEW_SMS and not in_slab:
            receive_warps = 6  # the few have to quantise everything
    # Receivers and senders with two stages each.
    fitting = _room(config) // (2 * stage)
    receive_warps = min(receive_warps, max(1, fitting * 4 // 7))
    room = _room(config) - receive_warps * receive_stages * stage
    warps = _fitting(most - receive_warps, stage, room)
    return Tuning(
        0,
        warps,
        _stages(room, warps, stage),
        receive_warps=receive_warps,
        receive_stages=receive_stages,
        send_piece=_send_piece(source),
        mixed=True,
    )


def for_combine(
    source: CombineInput, handle: Handle, num_sms: int, config: TransportConfig
) -> Tuning:
    """Some SMs send, the others sum; or all SMs do both."""
    stage = _stage_bytes(source.row_bytes, _PIECE, 0, config)
    expert = handle.layout == "expert"
    if num_sms < _FEW_SMS:
        if expert:
            return Tuning(0, send_warps=8, receive_warps=8, mixed=True)
        return Tuning(0, 4, _stages(_room(config), 4, stage), receive_warps=16, mixed=True)
    reached = _ranks_reached(config)
    own = reached / config.num_ranks
    send, local = (reached - own) / _TO_PEER, reached / _FROM_MEMORY + 1 / _TO_MEMORY
    if expert:
        own_experts = config.top_k / config.num_ranks
        send += (config.top_k - own_experts) / _FROM_MEMORY
        # Who has sent everything helps with the sums: rather too many senders than too few.
        local = (local + own_experts / _FROM_MEMORY) * 2 / 3
        senders = _senders(num_sms, send, local, config, most=num_sms)
        return Tuning(senders, send_warps=16, receive_warps=16)
    senders = _senders(num_sms, send, local, config, most=_MOST_SENDERS)
    return Tuning(senders, 8, _stages(_room(config), 8, stage), receive_warps=20)


def for_pack(source: DispatchInput, num_sms: int, config: TransportConfig) -> Tuning:
    """The copy-engine path: rows of peers into the staging slab, and own rows to their place."""
    stage = _stage_bytes(source.out_bytes, _PIECE, source.num_scales, config)
    warps = _fitting(_MOST_WARPS if _quantises(source) else 8, stage, _room(config))
    stages = _stages(_room(config), warps, stage)
    return Tuning(num_sms, warps, stages, send_piece=_send_piece(source))


def for_unpack(source: DispatchInput, config: TransportConfig) -> Tuning:
    """The copy-engine path: rows from the slab to their place."""
    stage = _stage_bytes(source.out_bytes, _PIECE, source.num_scales, config)
    return Tuning(0, receive_warps=8, receive_stages=_stages(_room(config), 8, stage))


def for_combine_pack(
    source: CombineInput, handle: Handle, num_sms: int, config: TransportConfig
) -> Tuning:
    """The copy-engine path: rows, or sums of rows, into the staging slab."""
    if handle.layout == "expert":
        return Tuning(num_sms, send_warps=16)
    stages = _stages(_room(config), 8, _stage_bytes(source.row_bytes, _PIECE, 0, config))
    return Tuning(num_sms, 8, stages)


def segment_parts(
    row_bytes: int,
    config: TransportConfig,
    wanted: tuple[int, ...] | None = None,
    *,
    in_turn: bool = False,
) -> tuple[int, ...]:
    """Where the parts of a segment end, in units; from sizes that all ranks share.

    A part that would hold no row of a full segment is left out: a flag each is all there is room
    for in small buffers.
    """
    max_tokens = max(config.max_tokens, 1)
    table = _PARTS_IN_TURN if in_turn else _PARTS
    ends = wanted or next(ends for least, ends in table if max_tokens * row_bytes >= least)
    unit = -(-max_tokens // SEGMENT_UNITS)
    return (*(end for end in ends if end * unit < max_tokens), SEGMENT_UNITS)


def for_reduce(handle: Handle) -> Tuning:
    """The copy-engine path: all SMs sum, with as many warps as the kernel is compiled for."""
    return Tuning(0, receive_warps=16 if handle.layout == "expert" else 20)


# The copy-engine path: a launch that only gives leave and waits for it.
PERMITS_ONLY = Tuning(0, receive_warps=1)


def _room(config: TransportConfig) -> int:
    """Bytes of shared memory for stages: what the lists beside them leave (``SharedLayout``)."""
    outboxes = 16 * 12 * config.num_ranks
    sources = 20 * 16 * (config.num_ranks + config.top_k)
    return min(216 * 1024, _SHARED_BYTES - 2048 - max(outboxes, sources))


def _fitting(warps: int, stage: int, room: int) -> int:
    """As many warps, or fewer, as have two stages each."""
    return max(1, min(warps, room // (2 * stage)))


def _ranks_reached(config: TransportConfig) -> float:
    """Ranks that a token goes to, on average, if its experts are drawn at random."""
    return config.num_ranks * (1 - (1 - 1 / config.num_ranks) ** config.top_k)


def _senders(num_sms: int, send: float, local: float, config: TransportConfig, most: int) -> int:
    """SMs that send, if a token costs them ``send`` and the others ``local``."""
    if config.num_ranks == 1:
        return 0
    return max(1, min(most, num_sms - 1, math.ceil(num_sms * send / (send + local))))


def _quantises(source: DispatchInput) -> bool:
    return source.payload != "as_is"


def _send_piece(source: DispatchInput) -> int:
    """Bytes of a row as it is read that make a piece in a stage."""
    return 2 * _PIECE if _quantises(source) else _PIECE


def _stage_bytes(row_bytes: int, piece: int, num_scales: int, config: TransportConfig) -> int:
    """Of a row's piece and the numbers behind it (``StageNumbers`` in csrc/ep), at most."""
    numbers = 4 + num_scales + config.num_ranks + 4 * config.top_k + 16
    return -(-min(row_bytes, piece) // 128) * 128 + -(-4 * numbers // 128) * 128


def _stages(num_bytes: int, warps: int, stage: int) -> int:
    return max(2, min(_MOST_STAGES, num_bytes // (warps * stage)))
