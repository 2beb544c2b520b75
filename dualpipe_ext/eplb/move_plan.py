"""Which rows go where: the moves that turn one map into another, and what they add up to.

Here belongs what is known before anything moves: pure functions of the maps, the same on every
rank. Moving is ``transfer.py``.

Shapes: S slots in all, R ranks; rank r holds slots from ``r * S / R``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dualpipe_ext.eplb.checks import check_even_slots


@dataclass(frozen=True, slots=True)
class Move:
    """One expert goes from one slot to one or more slots of one rank."""

    src_slot: int
    dst_slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """What a migration moved; the same on every rank.

    Attributes:
        bytes_sent: [R] bytes that each rank sent to others.
        bytes_received: [R] bytes that each rank received from others.
        bytes_copied: [R] bytes that each rank copied between its own slots.
        slots_changed: slots that hold another expert now, over all ranks.
    """

    bytes_sent: tuple[int, ...]
    bytes_received: tuple[int, ...]
    bytes_copied: tuple[int, ...]
    slots_changed: int


def plan_moves(
    old_phy2log: Sequence[int], new_phy2log: Sequence[int], num_ranks: int
) -> tuple[Move, ...]:
    """The moves that turn one map into another; a pure function, the same on every rank.

    A slot that keeps its expert does not appear. A rank that has the expert already copies it from
    its lowest slot; otherwise it receives it once, however many of its slots want it, from the
    holder that has sent least so far (the lowest slot on a tie).

    Args:
        old_phy2log: [S] expert in every slot.
        new_phy2log: [S] expert wanted there.
        num_ranks: R; S is a multiple of it.

    Returns:
        Moves, ordered by destination rank and by the first slot that wants the expert.

    Raises:
        ValueError: lengths that differ or do not divide, or maps of different sets of experts.
    """
    per_rank = check_maps(old_phy2log, new_phy2log, num_ranks)
    holders: dict[int, list[int]] = {}  # expert -> its slots, ascending
    for slot, expert in enumerate(old_phy2log):
        holders.setdefault(expert, []).append(slot)
    num_sent = [0] * num_ranks
    moves = []
    for rank in range(num_ranks):
        wanted: dict[int, list[int]] = {}
        for slot in range(rank * per_rank, (rank + 1) * per_rank):
            if new_phy2log[slot] != old_phy2log[slot]:
                wanted.setdefault(new_phy2log[slot], []).append(slot)
        for expert, slots in wanted.items():
            here = [s for s in holders[expert] if s // per_rank == rank]
            if here:
                source = here[0]
            else:
                source = min(holders[expert], key=lambda s: (num_sent[s // per_rank], s))
                num_sent[source // per_rank] += 1
            moves.append(Move(source, tuple(slots)))
    return tuple(moves)


@dataclass(frozen=True, slots=True)
class RankMoves:
    """One rank's part of a layer's moves, in rows of its own tensors.

    Attributes:
        leaving: peer -> the rows that go there, in the order in which they lie in the message.
        targets: source rank (the rank itself for copies) -> for each row that comes from there, the
            rows that it becomes.
        copied: the rows that are copied within the rank.
    """

    leaving: dict[int, list[int]]
    targets: dict[int, list[tuple[int, ...]]]
    copied: list[int]

    @classmethod
    def of(cls, moves: Sequence[Move], per_rank: int, rank: int) -> RankMoves:
        """Pick out of all ``moves`` those that concern ``rank``, which has ``per_rank`` slots."""
        part = cls({}, {}, [])
        for move in moves:
            source, row = divmod(move.src_slot, per_rank)
            destination = move.dst_slots[0] // per_rank
            if destination == rank:
                rows = tuple(slot % per_rank for slot in move.dst_slots)
                part.targets.setdefault(source, []).append(rows)
            if source == rank:
                local = destination == rank
                (part.copied if local else part.leaving.setdefault(destination, [])).append(row)
        return part


def report_of(
    moves: Sequence[Move], per_rank: int, num_ranks: int, slot_bytes: int
) -> MigrationReport:
    """What ``moves`` amount to when a slot holds ``slot_bytes``."""
    sent, received, copied = [0] * num_ranks, [0] * num_ranks, [0] * num_ranks
    for move in moves:
        source, destination = move.src_slot // per_rank, move.dst_slots[0] // per_rank
        copies = len(move.dst_slots)
        if source != destination:
            sent[source] += slot_bytes
            received[destination] += slot_bytes
            copies -= 1
        copied[destination] += slot_bytes * copies
    changed = sum(len(move.dst_slots) for move in moves)
    return MigrationReport(tuple(sent), tuple(received), tuple(copied), changed)


def check_maps(old: Sequence[int], new: Sequence[int], num_ranks: int) -> int:
    """Slots per rank; raises ``ValueError`` on maps that no moves could turn into one another."""
    if len(old) != len(new):
        raise ValueError(
            f"expected old and new maps of the same length, got {len(old)} and {len(new)} slots"
        )
    check_even_slots(len(old), num_ranks)
    if set(old) != set(new):
        lost, added = sorted(set(old) - set(new)), sorted(set(new) - set(old))
        raise ValueError(
            f"expected the old and the new map to hold the same experts, "
            f"got experts {lost} only in the old and {added} only in the new one"
        )
    return len(old) // num_ranks


def map_ids(name: str, phy2log: Tensor | Sequence[int]) -> tuple[int, ...]:
    """One layer's map [S] as numbers; raises ``ValueError`` on anything else."""
    if not isinstance(phy2log, Tensor):
        return tuple(int(expert) for expert in phy2log)
    if phy2log.dim() != 1 or phy2log.is_floating_point():
        raise ValueError(
            f"expected the {name} map as integers [S], one layer's phy2log, "
            f"got {phy2log.dtype} {list(phy2log.shape)}"
        )
    return tuple(phy2log.tolist())
