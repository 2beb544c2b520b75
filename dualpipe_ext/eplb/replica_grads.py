"""Gradients of replicated experts: every replica ends with the sum over all of them.

Each replica has seen other tokens, so the expert's gradient is the sum over its replicas; and its
replicas stay equal only if all of them get the same bits. So the sum is always taken in slot order,
which no backend's all-reduce promises. Only replicated experts are communicated: each rank that
holds one sends its gradient to the other ranks that do, in one message per peer.

When experts are about to move, the sum over the slots that had seen the tokens goes to the slots
that will hold the expert (``onto``): in the same order, so that again all get the same bits.

Shapes: S slots in all, R ranks; rank r holds slots from ``r * S / R``. Gradients are [S/R, ...].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext.agreement import group_size_and_rank
from dualpipe_ext.eplb.checks import check_even_slots, check_one_device
from dualpipe_ext.eplb.exchange import (
    data_device,
    exchange,
    index_on,
    join,
    new_message,
    pack,
    sections,
)
from dualpipe_ext.eplb.move_plan import check_maps, map_ids

_TAG = 4104


@torch.no_grad()
def reduce_replica_grads(
    grads: Sequence[Tensor],
    phy2log: Tensor | Sequence[int],
    group: dist.ProcessGroup | None = None,
    *,
    onto: Tensor | Sequence[int] | None = None,
    timeout_s: float = 300.0,
) -> None:
    """Replace each replica's gradient by the sum over the replicas of its expert, in place.

    A collective call. The sum runs in slot order, in float32 (float64 for float64) and is rounded
    once: all replicas end with the same bits, whatever the backend. Experts with a single replica
    are neither read nor sent. CUDA gradients are exchanged in stream order, without waiting on the
    host.

    Args:
        grads: [S/R, ...] floating point each, on one device: gradients of the slots of this rank.
            Same number, shapes and dtypes on every rank.
        phy2log: [S] the expert in every slot. Keep it on the CPU: its values are needed there.
        group: the R ranks that hold the slots, by default the world.
        onto: [S] the expert that every slot will hold when the gradients are used, if that differs
            from ``phy2log``, by which they were computed. A slot gets the sum for the expert that
            it will hold; what it had computed for another one is in that one's sum only.
        timeout_s: longest wait for a peer, in seconds (CPU; on GPUs the group's own).

    Raises:
        ValueError: gradients that do not fit the map, or maps of different experts.
        CommTimeoutError: a peer did not answer; it is named.
    """
    num_ranks, rank = group_size_and_rank(group)
    experts = map_ids("old", phy2log)
    wanted = experts if onto is None else map_ids("new", onto)
    _check(grads, len(experts), num_ranks)
    if wanted is not experts:
        check_maps(experts, wanted, num_ranks)
    if not grads:
        return
    device = grads[0].device
    wire = data_device(group, device)
    join(group, wire)
    plan = _plan(experts, wanted, num_ranks, rank, device)
    sends = {peer: pack(grads, rows).to(wire) for peer, rows in plan.sends.items()}
    receives = {peer: new_message(grads, n, wire) for peer, n in plan.receives.items()}
    exchange(
        sends,
        receives,
        group,
        timeout_s=timeout_s,
        what="gradients of replicas",
        tag=_TAG,
        wait_on_host=False,
    )
    if plan.targets.numel() == 0:
        return
    received = [
        sections(message.to(device), grads, plan.receives[peer])
        for peer, message in sorted(receives.items())
    ]
    for i, grad in enumerate(grads):
        plan.sum(grad, [parts[i] for parts in received])


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """Who sends what, and what is added to what, on one rank.

    The shares of a rank are the rows that it has computed of experts that it will hold, followed by
    those that it receives, by peer. Its experts are ordered by falling number of shares, so that
    the experts with a j-th share are always the first ones.

    Attributes:
        sends: peer -> local rows that it needs.
        receives: peer -> number of rows that come from it.
        rows: [m] local rows that are shares.
        targets: [n] local rows that get a sum.
        which: [n] for each of them, the position of its expert.
        terms: terms[j] are the j-th shares in slot order, one for each expert that has so many.
    """

    sends: dict[int, tuple[int, ...]]
    receives: dict[int, int]
    rows: Tensor
    targets: Tensor
    which: Tensor
    terms: tuple[Tensor, ...]

    def sum(self, grad: Tensor, received: Sequence[Tensor]) -> None:
        """Put the sums into ``grad``, given the rows that have come, by peer."""
        shares = torch.cat([grad.index_select(0, self.rows), *received])
        shares = shares.to(torch.promote_types(grad.dtype, torch.float32))
        total = shares.index_select(0, self.terms[0])
        for term in self.terms[1:]:
            total[: len(term)] += shares.index_select(0, term)
        grad.index_copy_(0, self.targets, total.index_select(0, self.which).to(grad.dtype))


@lru_cache(maxsize=1024)  # a map stays for many steps, and there is one for each layer
def _plan(
    experts: tuple[int, ...],
    wanted: tuple[int, ...],
    num_ranks: int,
    rank: int,
    device: torch.device,
) -> _Plan:
    per_rank = len(experts) // num_ranks
    computed, held = _slots_by_expert(experts), _slots_by_expert(wanted)
    # All others have their sum already, and keep their slot.
    summed = [e for e in computed if len(computed[e]) > 1 or computed[e] != held[e]]
    here = [e for e in summed if any(slot // per_rank == rank for slot in held[e])]
    here.sort(key=lambda e: len(computed[e]), reverse=True)
    shares = sorted(slot for e in here for slot in computed[e])
    mine = [slot for slot in shares if slot // per_rank == rank]
    theirs = [slot for slot in shares if slot // per_rank != rank]
    share_of = {slot: share for share, slot in enumerate([*mine, *theirs])}

    sends: dict[int, list[int]] = {}
    for slot in sorted(s for e in summed for s in computed[e] if s // per_rank == rank):
        for peer in {s // per_rank for s in held[experts[slot]]} - {rank}:
            sends.setdefault(peer, []).append(slot % per_rank)
    receives: dict[int, int] = {}
    for slot in theirs:
        receives[slot // per_rank] = receives.get(slot // per_rank, 0) + 1

    targets = {
        slot % per_rank: position
        for position, e in enumerate(here)
        for slot in held[e]
        if slot // per_rank == rank
    }
    terms = [
        [share_of[computed[e][j]] for e in here if len(computed[e]) > j]
        for j in range(len(computed[here[0]]) if here else 0)
    ]
    return _Plan(
        sends={peer: tuple(rows) for peer, rows in sends.items()},
        receives=receives,
        rows=index_on([slot % per_rank for slot in mine], device),
        targets=index_on(list(targets), device),
        which=index_on(list(targets.values()), device),
        terms=tuple(index_on(term, device) for term in terms),
    )


def _slots_by_expert(phy2log: tuple[int, ...]) -> dict[int, list[int]]:
    slots: dict[int, list[int]] = {}
    for slot, expert in enumerate(phy2log):
        slots.setdefault(expert, []).append(slot)
    return slots


def _check(grads: Sequence[Tensor], num_slots: int, num_ranks: int) -> None:
    check_even_slots(num_slots, num_ranks)
    for grad in grads:
        if grad.dim() == 0 or len(grad) != num_slots // num_ranks or not grad.is_floating_point():
            raise ValueError(
                f"expected floating-point gradients with {num_slots // num_ranks} slots in the "
                f"first dimension, got {grad.dtype} {list(grad.shape)}"
            )
    check_one_device("gradients", grads)
