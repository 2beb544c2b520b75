"""Live migration: experts' weights and optimizer state move to where a new map wants them.

Here belongs moving what a slot holds. Summing replica gradients is ``replica_grads.py``, the
messages themselves are ``exchange.py``.

A migration has four steps, and only the last one writes to a tensor that anybody uses:

1. *Prepare*, on each rank alone: check the arguments, plan the moves, copy what leaves into
   messages, make room for what arrives.
2. *Agree*: every rank tells every other whether it is ready, and a digest of its maps and of its
   tensors' layout. If one is not, or they differ, all ranks raise and nothing has moved.
3. *Transfer* into spare buffers.
4. *Confirm and commit*: every rank tells every other that it has received everything; then each
   copies the spare rows into place, which cannot fail any more.

So an error leaves every tensor on every rank as it was. (One window is left, as in any agreement
without a coordinator: if the very confirmation is lost, a rank raises where others commit. The
group is unusable then, so the run ends and goes on from its checkpoint.)

Shapes: S slots in all, R ranks; rank r holds slots from ``r * S / R``. Tensors are [S/R, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext.eplb.agreement import Agreement
from dualpipe_ext.eplb.checks import check_even_slots, check_one_device
from dualpipe_ext.eplb.exchange import (
    as_integers,
    data_device,
    exchange,
    group_size_and_rank,
    join,
    new_message,
    pack,
    row_bytes,
    sections,
)

_TAG = 4103


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
    per_rank = _checked_maps(old_phy2log, new_phy2log, num_ranks)
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


def migrate(
    tensors: Sequence[Tensor],
    old_phy2log: Tensor | Sequence[int],
    new_phy2log: Tensor | Sequence[int],
    group: dist.ProcessGroup | None = None,
    *,
    timeout_s: float = 60.0,
) -> MigrationReport:
    """Move the rows of slot tensors to where a new map wants them: in place, all or nothing.

    A collective call, between steps: no gradient or activation may depend on the old contents. All
    replicas of an expert must hold the same bits (as :func:`reduce_replica_grads` keeps them), for
    any of them may serve as the source.

    Args:
        tensors: [S/R, ...] each, any dtype, all on one device: what belongs to the slots of this
            rank. Same number, shapes and dtypes on every rank.
        old_phy2log: [S] the expert in every slot now.
        new_phy2log: [S] the expert wanted in every slot.
        group: the R ranks that hold the slots, by default the world.
        timeout_s: longest wait for a peer in one of the steps, in seconds.

    Returns:
        Bytes moved, for every rank.

    Raises:
        ValueError: maps or tensors that do not fit, on this rank or another, or that differ between
            ranks. The same message on every rank; the group stays usable.
        CommTimeoutError: a peer did not answer; it is named.
        DualPipeError: another rank failed or has gone away.
    """
    return _migrate(lambda: tensors, old_phy2log, new_phy2log, group, timeout_s)


def migrate_optimizer(
    optimizer: torch.optim.Optimizer,
    params: Sequence[Tensor],
    old_phy2log: Tensor | Sequence[int],
    new_phy2log: Tensor | Sequence[int],
    group: dist.ProcessGroup | None = None,
    *,
    timeout_s: float = 60.0,
) -> MigrationReport:
    """Move parameters together with their optimizer state: :func:`migrate` on both, as one.

    Args:
        optimizer: the optimizer that updates ``params``.
        params: [S/R, ...] each, parameters whose first dimension is the slots of this rank. Their
            ``.grad`` does not move: call this after ``zero_grad``.
        old_phy2log, new_phy2log, group, timeout_s: as in :func:`migrate`.

    Raises:
        ValueError: also on state that is neither a scalar nor of its parameter's shape.
    """
    return _migrate(
        lambda: [*params, *slot_state(optimizer, params)],
        old_phy2log,
        new_phy2log,
        group,
        timeout_s,
    )


def slot_state(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    """The optimizer's tensors that belong to slots (``exp_avg``, ...), in the order of their names.

    Scalars such as ``step`` are the same for every slot of a parameter and stay where they are. A
    parameter that has not been stepped yet has no state.

    Raises:
        ValueError: a state tensor that is neither a scalar nor of its parameter's shape: nobody
            could say which part of it belongs to a slot.
    """
    found = []
    for param in params:
        for name, value in sorted(optimizer.state.get(param, {}).items()):
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if value.shape != param.shape:
                raise ValueError(
                    f"expected optimizer state '{name}' of its parameter's shape "
                    f"{list(param.shape)}, got {list(value.shape)}"
                )
            found.append(value)
    return found


def _migrate(
    collect: Callable[[], Sequence[Tensor]],
    old_phy2log: Tensor | Sequence[int],
    new_phy2log: Tensor | Sequence[int],
    group: dist.ProcessGroup | None,
    timeout_s: float,
) -> MigrationReport:
    num_ranks, _ = group_size_and_rank(group)

    def prepare() -> tuple[_Staged, dict[str, object]]:
        old, new = _ids("old", old_phy2log), _ids("new", new_phy2log)
        moves = plan_moves(old, new, num_ranks)
        tensors = collect()
        _check_tensors(tensors, len(old) // num_ranks)
        layout = [(tensor.dtype, tensor.shape) for tensor in tensors]
        same = {"old map": old, "new map": new, "tensor shapes and dtypes": layout}
        return _Staged(tensors, moves, group), same

    agreement = Agreement("the migration", group, timeout_s)
    staged = agreement.prepare(prepare)
    agreement.act(lambda: staged.transfer(timeout_s))
    agreement.confirm()
    staged.commit()
    return staged.report


class _Staged:
    """Spare copies of everything that changes on this rank, and the way they are filled."""

    def __init__(
        self, tensors: Sequence[Tensor], moves: Sequence[Move], group: dist.ProcessGroup | None
    ) -> None:
        num_ranks, rank = group_size_and_rank(group)
        per_rank = len(tensors[0])
        leaving: dict[int, list[int]] = {}  # peer -> the rows that it gets
        # Peer (this rank for copies) -> for each row that it gives, the rows that this becomes.
        self._targets: dict[int, list[tuple[int, ...]]] = {}
        copied = []
        for move in moves:
            source, row = divmod(move.src_slot, per_rank)
            destination = move.dst_slots[0] // per_rank
            if destination == rank:
                rows = tuple(slot % per_rank for slot in move.dst_slots)
                self._targets.setdefault(source, []).append(rows)
            if source == rank:
                rows_out = copied if destination == rank else leaving.setdefault(destination, [])
                rows_out.append(row)

        self._tensors, self._group = tensors, group
        self._wire = data_device(group, tensors[0].device)
        self._sends = {peer: pack(tensors, rows).to(self._wire) for peer, rows in leaving.items()}
        self._receives = {
            peer: new_message(tensors, len(rows), self._wire)
            for peer, rows in self._targets.items()
            if peer != rank
        }
        self._copied = {rank: pack(tensors, copied)} if copied else {}
        self._writes: list[tuple[Tensor, Tensor, Tensor]] = []  # destination, rows, spare rows
        self.report = _report(moves, per_rank, num_ranks, sum(row_bytes(t) for t in tensors))

    def transfer(self, timeout_s: float) -> None:
        """Fill the spare buffers and make every write ready."""
        join(self._group, self._wire)
        exchange(
            self._sends,
            self._receives,
            self._group,
            timeout_s=timeout_s,
            what="expert weights",
            tag=_TAG,
        )
        device = self._tensors[0].device
        for peer, message in (*self._receives.items(), *self._copied.items()):
            rows = self._targets[peer]
            target = torch.tensor([row for some in rows for row in some], device=device)
            source = torch.tensor([i for i, some in enumerate(rows) for _ in some], device=device)
            parts = sections(message.to(device), self._tensors, len(rows))
            for tensor, part in zip(self._tensors, parts, strict=True):
                spare = as_integers(part)
                if len(source) > len(rows):  # a row that more than one slot wants
                    spare = spare.index_select(0, source)
                self._writes.append((as_integers(tensor), target, spare))

    def commit(self) -> None:
        for destination, rows, spare in self._writes:
            destination.index_copy_(0, rows, spare)


def _report(
    moves: Sequence[Move], per_rank: int, num_ranks: int, slot_bytes: int
) -> MigrationReport:
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


def _checked_maps(old: Sequence[int], new: Sequence[int], num_ranks: int) -> int:
    """Slots per rank."""
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


def _ids(name: str, phy2log: Tensor | Sequence[int]) -> tuple[int, ...]:
    if not isinstance(phy2log, Tensor):
        return tuple(int(expert) for expert in phy2log)
    if phy2log.dim() != 1 or phy2log.is_floating_point():
        raise ValueError(
            f"expected the {name} map as integers [S], one layer's phy2log, "
            f"got {phy2log.dtype} {list(phy2log.shape)}"
        )
    return tuple(phy2log.tolist())


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
