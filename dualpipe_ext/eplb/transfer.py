"""One wave of a migration: some layers' rows on their way into spare memory, then into place.

Here belongs the protocol; how a message travels is a :class:`Carrier`. A wave has four steps, and
only the last one writes to a tensor that anybody uses:

1. *Prepare*, on each rank alone: check the arguments, plan the moves, copy what leaves into
   messages, make room for what arrives.
2. *Agree*: every rank tells every other whether it is ready, and a digest of its maps and of its
   tensors' layout. If one is not, or they differ, all ranks raise and nothing has moved.
3. *Transfer* into spare memory, layer by layer.
4. *Confirm and commit*: every rank tells every other that it has received everything; then each
   copies the spare rows into place, which cannot fail any more.

So an error leaves every tensor on every rank as it was. (One window is left, as in any agreement
without a coordinator: if the very confirmation is lost, a rank raises where others commit. The
group is unusable then, so the run ends and goes on from its checkpoint.)

Shapes: S slots in all, R ranks; rank r holds slots from ``r * S / R``. Tensors are [S/R, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext.agreement import group_size_and_rank
from dualpipe_ext.eplb.agreement import Agreement
from dualpipe_ext.eplb.checks import check_one_device
from dualpipe_ext.eplb.exchange import (
    as_integers,
    data_device,
    exchange,
    index_on,
    join,
    message_bytes,
    new_message,
    pack,
    row_bytes,
    sections,
)
from dualpipe_ext.eplb.move_plan import (
    Move,
    RankMoves,
    map_ids,
    plan_moves,
    report_of,
)

_TAG = 4103

Deliver = Callable[[float], dict[int, Tensor]]
"""Takes the longest wait in seconds and returns the arriving messages by source rank, uint8 on the
tensors' device. They may be read once every rank has confirmed."""


class Carrier(Protocol):
    """A way for messages to reach other ranks; equal on all of them."""

    def begin(self) -> None:
        """A new wave: what earlier ones have brought is in place, and its memory free."""
        ...

    def stage(self, tensors: Sequence[Tensor], moves: Sequence[Move], mine: RankMoves) -> Deliver:
        """Make ready to move one layer: may fail, and must not talk to anybody."""
        ...


class PointToPoint:
    """Rows packed into one message per peer, by the group's own send and receive."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group

    def begin(self) -> None:
        """Every wave has messages of its own."""

    def stage(self, tensors: Sequence[Tensor], moves: Sequence[Move], mine: RankMoves) -> Deliver:
        _, rank = group_size_and_rank(self._group)
        device = tensors[0].device
        wire = data_device(self._group, device)
        sends = {peer: pack(tensors, rows).to(wire) for peer, rows in mine.leaving.items()}
        receives = {
            peer: new_message(tensors, len(rows), wire)
            for peer, rows in mine.targets.items()
            if peer != rank
        }

        def deliver(timeout_s: float) -> dict[int, Tensor]:
            join(self._group, wire)
            exchange(
                sends, receives, self._group, timeout_s=timeout_s, what="expert weights", tag=_TAG
            )
            return {peer: message.to(device) for peer, message in receives.items()}

        return deliver


@dataclass(frozen=True, slots=True)
class LayerChange:
    """What one layer's move needs.

    Attributes:
        tensors: [S/R, ...] each, any dtype: what belongs to the slots of this rank.
        old: [S] the expert in every slot now.
        new: [S] the expert wanted in every slot.
    """

    tensors: Sequence[Tensor]
    old: Tensor | Sequence[int]
    new: Tensor | Sequence[int]


def spare_bytes_of(
    tensors: Sequence[Tensor], moves: Sequence[Move], per_rank: int, num_ranks: int
) -> int:
    """Bytes of spare memory that a layer's moves take on the rank that takes most: for the rows
    that arrive, and for those that change their place within the rank."""
    rows: dict[tuple[int, int], int] = {}
    for move in moves:
        way = move.dst_slots[0] // per_rank, move.src_slot // per_rank
        rows[way] = rows.get(way, 0) + 1
    need = [0] * num_ranks
    for (destination, _), num_rows in rows.items():
        need[destination] += message_bytes(tensors, num_rows)
    return max(need)


def layers_that_fit(need: Mapping[int, int], spare_bytes: int) -> tuple[int, ...]:
    """The first layers, in the order given, that fit into the spare memory together.

    Args:
        need: bytes that each layer takes (:func:`spare_bytes_of`).
        spare_bytes: that there are.

    Raises:
        ValueError: not even the first one fits.
    """
    taken: list[int] = []
    for layer, size in need.items():
        if size > spare_bytes:
            if not taken:
                raise ValueError(
                    f"expected spare_bytes of at least {size}, which layer {layer} needs alone, "
                    f"got {spare_bytes}"
                )
            break
        spare_bytes -= size
        taken.append(layer)
    return tuple(taken)


class StagedLayer:
    """Spare copies of what changes in one layer on this rank, and the way they are filled."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        moves: Sequence[Move],
        carrier: Carrier,
        *,
        num_ranks: int,
        rank: int,
    ) -> None:
        per_rank = len(tensors[0])
        mine = RankMoves.of(moves, per_rank, rank)
        self._tensors, self._targets = tensors, mine.targets
        self._deliver = carrier.stage(tensors, moves, mine)
        self._copied = {rank: pack(tensors, mine.copied)} if mine.copied else {}
        self._messages: dict[int, Tensor] = {}
        self._writes: list[tuple[Tensor, Tensor, Tensor]] = []  # destination, rows, spare rows
        self.report = report_of(moves, per_rank, num_ranks, sum(row_bytes(t) for t in tensors))

    def transfer(self, timeout_s: float) -> None:
        """Fill the spare memory and make every write ready."""
        self._messages = {**self._deliver(timeout_s), **self._copied}
        device = self._tensors[0].device
        for peer, message in self._messages.items():
            targets = self._targets[peer]
            first = index_on([rows[0] for rows in targets], device)
            # Of a row that more than one slot wants, the further ones: nothing is allocated later.
            more = [
                (i, index_on([row], device)) for i, rows in enumerate(targets) for row in rows[1:]
            ]
            parts = sections(message, self._tensors, len(targets))
            for tensor, part in zip(self._tensors, parts, strict=True):
                destination, spare = as_integers(tensor), as_integers(part)
                self._writes.append((destination, first, spare))
                self._writes += [(destination, row, spare[i : i + 1]) for i, row in more]

    def commit(self) -> None:
        """Put the spare rows into place, in the order of the current stream."""
        for destination, rows, spare in self._writes:
            destination.index_copy_(0, rows, spare)
        if self._tensors[0].is_cuda:
            # They came from another stream, and would be handed out there again.
            stream = torch.cuda.current_stream()
            for tensor in (*self._messages.values(), *(rows for _, rows, _ in self._writes)):
                tensor.record_stream(stream)


def carry(
    collect: Callable[[], Mapping[int, LayerChange]],
    carrier: Carrier,
    group: dist.ProcessGroup | None,
    *,
    timeout_s: float,
    spare_bytes: int | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> dict[int, StagedLayer]:
    """Steps 1 to 4 of a wave but for the commit, which is left to the caller: a collective call.

    Args:
        collect: gives the layers; its ``ValueError`` is raised on all ranks.
        carrier: moves the messages.
        group: the R ranks that hold the slots, by default the world.
        timeout_s: longest wait for a peer in one of the steps, in seconds.
        spare_bytes: layers are taken as far as they fit; ``None`` for all of them.
        on_phase: told what comes next.

    Returns:
        The layers that have been taken, ready to commit on every rank.

    Raises:
        ValueError: maps or tensors that do not fit, on this rank or another, or that differ between
            ranks. The same message on every rank; the group stays usable.
        CommTimeoutError: a peer did not answer; it is named.
        DualPipeError: another rank failed or has gone away.
    """
    num_ranks, rank = group_size_and_rank(group)

    def prepare() -> tuple[dict[int, StagedLayer], dict[str, object]]:
        carrier.begin()
        tensors, moves, same = _planned(collect(), num_ranks)
        taken = _taken(tensors, moves, num_ranks, spare_bytes)
        staged = {
            layer: StagedLayer(
                tensors[layer], moves[layer], carrier, num_ranks=num_ranks, rank=rank
            )
            for layer in taken
        }
        return staged, {**same, "spare_bytes": spare_bytes}

    agreement = Agreement("the migration", group, timeout_s)
    on_phase("agreeing to begin")
    staged = agreement.prepare(prepare)

    def transfer() -> None:
        for layer, one in staged.items():
            on_phase(f"transferring layer {layer}")
            one.transfer(timeout_s)

    agreement.act(transfer)
    on_phase("confirming")
    agreement.confirm()
    return staged


def _planned(
    layers: Mapping[int, LayerChange], num_ranks: int
) -> tuple[dict[int, Sequence[Tensor]], dict[int, tuple[Move, ...]], dict[str, object]]:
    """Tensors and moves of every layer, and what must be the same on all ranks."""
    tensors: dict[int, Sequence[Tensor]] = {}
    moves: dict[int, tuple[Move, ...]] = {}
    maps: tuple[list[object], list[object]] = ([], [])
    layout = []
    for layer, change in layers.items():
        old, new = map_ids("old", change.old), map_ids("new", change.new)
        moves[layer] = plan_moves(old, new, num_ranks)
        _check_tensors(change.tensors, len(old) // num_ranks)
        tensors[layer] = change.tensors
        for kind, ids in zip(maps, (old, new), strict=True):
            kind.append((layer, ids))
        layout.append([(tensor.dtype, tensor.shape) for tensor in change.tensors])
    same = {"old map": maps[0], "new map": maps[1], "tensor shapes and dtypes": layout}
    return tensors, moves, same


def _taken(
    tensors: Mapping[int, Sequence[Tensor]],
    moves: Mapping[int, Sequence[Move]],
    num_ranks: int,
    spare_bytes: int | None,
) -> tuple[int, ...]:
    """The layers that this wave takes."""
    if spare_bytes is None:
        return tuple(moves)
    need = {
        layer: spare_bytes_of(tensors[layer], some, len(tensors[layer][0]), num_ranks)
        for layer, some in moves.items()
    }
    return layers_that_fit(need, spare_bytes)


def _check_tensors(tensors: Sequence[Tensor], per_rank: int) -> None:
    if not tensors:
        raise ValueError("expected at least one tensor to migrate, got none")
    for tensor in tensors:
        if tensor.dim() == 0 or len(tensor) != per_rank:
            raise ValueError(
                f"expected tensors with {per_rank} slots in the first dimension, "
                f"got one of shape {list(tensor.shape)}"
            )
        as_integers(tensor)  # raises on a dtype that cannot travel
    check_one_device("tensors", tensors)
