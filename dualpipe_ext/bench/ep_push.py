"""What the link gives to the rows of a dispatch: a plain push of them, as a variant of its own.

The kernel (``csrc/bench/push.cu``) stores the rows that a dispatch sends, to the places where it
stores them, with as many SMs: no routing weights, no flags, no rows that stay, nothing that waits.
A dispatch, or a combine, which moves as many bytes the other way, cannot be faster. FP8 values and
scales are one run of bytes, quantised before.

How the warps share an SM is tried out, and the fastest way taken: a limit must not be low because
it was set up badly.

Shapes: R ranks, T tokens of a rank, E experts, L = E / R, K top-k, B bytes of a row.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext import core
from dualpipe_ext.bench import timing
from dualpipe_ext.bench.ep_cases import Case, EpOptions, Inputs, push_cases, wire_rows
from dualpipe_ext.bench.ep_variants import Prepared, Runner, Variant
from dualpipe_ext.bench.ranks import Ranks
from dualpipe_ext.ep import memory, transport
from dualpipe_ext.ep.device_arrays import current_stream

PUSH = "push_kernel"
"""Its rows are by this transport."""

# Warps of a CTA, and the largest piece of a row in one of their stages, in bytes.
_SHAPES = ((4, 16 << 10), (8, 16 << 10), (8, 8 << 10))
# Pieces of a row begin at whole lines.
_LINE = 128
_TRY_ROUNDS, _TRY_CALLS = 3, 10


def with_pushes(found: Sequence[Variant]) -> list[Variant]:
    """``found``, and behind each that takes SMs a plain push with as many.

    Side by side: what drifts over a run meets both alike.
    """
    everything: list[Variant] = []
    for variant in found:
        everything.append(variant)
        if variant.num_sms is not None:
            everything.append(Variant(PUSH, variant.num_sms))
    return everything


@dataclass(frozen=True, slots=True, eq=False)
class _Push:
    """One launch of this rank, as a call of the benchmark."""

    args: Any
    reads: tuple[Tensor, Tensor]
    """Rows and places, which ``args`` only has the addresses of."""
    arrived: Tensor
    """uint8 [R * T, B]: what the pushes of the other ranks bring."""

    def __call__(self) -> Tensor:
        core.module().push(self.args, current_stream())
        return self.arrived


class PushRunner(Runner):
    """Rows go straight into the memory of the ranks that they are for."""

    def __init__(self, variant: Variant, options: EpOptions, inputs: Inputs, ranks: Ranks) -> None:
        if ranks.device.type != "cuda":
            raise ValueError(f"expected --device cuda for a plain push, got {ranks.device.type}")
        if ranks.num_ranks == 1:
            raise ValueError("expected two ranks or more for a plain push, got 1")
        assert variant.num_sms is not None
        self._inputs, self._ranks = inputs, ranks
        self._num_local = options.experts // ranks.num_ranks
        sms = torch.cuda.get_device_properties(ranks.device).multi_processor_count
        self._num_sms = min(variant.num_sms, sms)
        config = transport.Ranks(
            group=None if ranks.local is not None else dist.group.WORLD,
            rank=ranks.rank,
            num_ranks=ranks.num_ranks,
            timeout_s=options.timeout_s,
            local=ranks.local,
        )
        reason = memory.unavailable(config)
        if reason is not None:
            raise ValueError(reason)
        self._core = core.module()
        widest = max(
            (self._layout(_case_rows(inputs, case)) for case in push_cases(options.cases)),
            key=lambda layout: layout.bytes,
        )
        self._memory = memory.allocate(widest.bytes, config)
        self._table = self._core.PeerTable(self._memory.addresses, bytes=widest.bytes)
        # Virtual ranks share a stream: no thread could capture the others' calls.
        self.capturable = ranks.local is None

    def supports(self, case: Case) -> bool:
        return case.op == "push"

    def prepare(self, case: Case, num_rows: int) -> Prepared:
        rows = _case_rows(self._inputs, case)
        layout = self._layout(rows)
        # Rows where the kernel expects them: from whole lines on.
        x = rows.new_zeros(len(rows), layout.row_pitch)
        x[:, : layout.row_bytes] = rows
        all_places = slots(self._inputs.all_idx, self._ranks.num_ranks, self._num_local)
        places = all_places.split(len(rows))[self._ranks.rank].contiguous()
        self._clear()
        calls = {
            shape: self._push(layout, x, places, shape)
            for shape in shapes(layout.row_bytes, self._ranks.num_ranks, self._core.push_stages)
        }
        shape = self._fastest(calls)
        # What was tried out must not stand for what is checked.
        self._clear()
        return Prepared(calls[shape], note=_describe(shape, self._ranks.num_ranks, self._core))

    def finish(self) -> None:
        torch.cuda.synchronize()

    def _layout(self, rows: Tensor) -> Any:
        """Of memory for all rows that could come. ``rows``: uint8 [T, B]."""
        num_rows = self._ranks.num_ranks * len(rows)
        return self._core.PushLayout(num_rows=num_rows, row_bytes=rows.shape[1])

    def _clear(self) -> None:
        """Zero this rank's memory; nobody writes to it meanwhile."""
        torch.cuda.synchronize()
        self._ranks.gather_object(None)
        self._memory.own.zero_()
        torch.cuda.synchronize()
        self._ranks.gather_object(None)

    def _push(self, layout: Any, x: Tensor, places: Tensor, shape: tuple[int, int]) -> _Push:
        warps, piece_bytes = shape
        args = self._core.PushArgs(
            self._table,
            layout,
            rank=self._ranks.rank,
            x=x.data_ptr(),
            num_tokens=len(x),
            slots=places.data_ptr(),
            ctas=self._num_sms,
            warps=warps,
            piece_bytes=piece_bytes,
        )
        arrived = self._memory.own[layout.rows_offset :][: layout.num_rows * layout.row_pitch]
        arrived = arrived.view(layout.num_rows, layout.row_pitch)[:, : layout.row_bytes]
        return _Push(args, (x, places), arrived)

    def _fastest(self, calls: dict[tuple[int, int], _Push]) -> tuple[int, int]:
        """The same on all ranks: times are the slowest rank's."""
        found = timing.interleaved(calls, self._ranks, rounds=_TRY_ROUNDS, num_calls=_TRY_CALLS)
        return min(found, key=lambda shape: statistics.median(found[shape]))


def _case_rows(inputs: Inputs, case: Case) -> Tensor:
    return wire_rows(inputs.quantised if case.fp8 else inputs.x)


def slots(all_idx: Tensor, num_ranks: int, num_local: int) -> Tensor:
    """int32 [R * T, R]: every token's row at every rank, -1 where it does not go.

    Args:
        all_idx: int64 [R * T, K], every rank's choices, -1 where dropped.
        num_ranks: R.
        num_local: L.

    Example: two ranks with two experts each, tokens a, b of rank 0 and c of rank 1.

    >>> slots(torch.tensor([[2, 3], [0, 2], [1, -1]]), 2, 2).tolist()
    [[-1, 0], [0, 1], [1, -1]]
    """
    to_rank = all_idx.div(num_local, rounding_mode="floor")
    goes = torch.stack([(to_rank == rank).any(1) for rank in range(num_ranks)], dim=1)
    return torch.where(goes, goes.cumsum(0) - 1, -1).int()


def shapes(
    row_bytes: int, num_ranks: int, push_stages: Callable[..., int]
) -> list[tuple[int, int]]:
    """Ways to share an SM: warps of a CTA, and bytes of a piece; each once.

    Args:
        row_bytes: of a whole row.
        num_ranks: R.
        push_stages: of the core; tells how many stages a warp has.

    A row of 14336 bytes goes whole or in halves, one of 7392 whole:

    >>> shapes(14336, 2, lambda **shape: 2)
    [(4, 14336), (8, 14336), (8, 7168)]
    >>> shapes(7392, 2, lambda **shape: 2)
    [(4, 7392), (8, 7392)]
    """
    found = []
    for warps, most in _SHAPES:
        num_pieces = -(-row_bytes // most)
        piece = -(-row_bytes // num_pieces // _LINE) * _LINE if num_pieces > 1 else row_bytes
        stages = push_stages(warps=warps, piece_bytes=piece, num_ranks=num_ranks)
        if stages >= 2 and (warps, piece) not in found:
            found.append((warps, piece))
    return found


def _describe(shape: tuple[int, int], num_ranks: int, core_module: Any) -> str:
    warps, piece = shape
    stages = core_module.push_stages(warps=warps, piece_bytes=piece, num_ranks=num_ranks)
    return f"fastest with {warps} warps of {stages} stages of {piece} bytes"
