"""Refinement: a placement made better one swap, or one replica, at a time.

Here belongs local search over a placement. It starts from a fresh packing, or from the placement in
force, which it then changes as little as it can.

Shapes: B problems, E experts, S slots, G GPUs of each problem; GPU g has the r = S/G slots from
``g * r``. Loads are float64; all arithmetic is elementwise, so that every machine finds the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dualpipe_ext.eplb.replicas import tree_sum

_LEAST_GAIN = 1e-6  # relative; smaller steps are not worth their time
_STEPS_PER_SLOT = 4
# Candidates are looked at together for so many problems as stay within some 100 MB.
_MOST_CANDIDATES = 1_000_000


def refine(
    slots: Tensor, loads: Tensor, num_gpus: int, *, target: Tensor, frugal: bool = False
) -> Tensor:
    """Relieve the fullest GPU of each problem until it carries at most ``target``, or none can be.

    A step is one of two: a replica on the fullest GPU changes places with one elsewhere; or an
    expert of the fullest GPU gets one more replica, in a slot of an expert that has several. The
    step is made that leaves least on the GPUs it touches. None puts an expert twice on a GPU.

    Args:
        slots: [B, S] int64 expert in every slot; every expert has one.
        loads: [B, E] positive.
        num_gpus: G.
        target: [B] load of the fullest GPU at which to stop.
        frugal: prefer what relieves most per expert that moves: a swap moves two, a replica one.

    Returns:
        [B, S] int64.
    """
    candidates = slots.shape[1] * (slots.shape[1] // num_gpus)
    size = max(1, _MOST_CANDIDATES // candidates)
    parts = zip(slots.split(size), loads.split(size), target.split(size), strict=True)
    return torch.cat([_refine(*part, num_gpus, frugal) for part in parts])


def fullest_load(slots: Tensor, loads: Tensor, num_gpus: int) -> Tensor:
    """[B] load of the fullest GPU."""
    return _gpu_loads(_shares(slots, loads), num_gpus).amax(1)


def _refine(slots: Tensor, loads: Tensor, target: Tensor, num_gpus: int, frugal: bool) -> Tensor:
    slots = slots.clone()
    live = torch.arange(len(slots), device=slots.device)
    for _ in range(_STEPS_PER_SLOT * slots.shape[1]):
        state = _State.of(slots[live], loads[live], num_gpus)
        swap, swapped = state.best_swap()
        replica, replaced = state.best_replica()
        limit, full = target[live], state.fullest
        if frugal:
            gain_of_swap = (full - torch.maximum(swap, limit)) / 2
            by_swap = gain_of_swap > full - torch.maximum(replica, limit)
        else:
            by_swap = swap <= replica
        better = torch.where(by_swap, swap, replica) < full * (1 - _LEAST_GAIN)
        better &= full > limit
        if not bool(better.any()):
            break
        changed = torch.where(by_swap[:, None], swapped, replaced)
        live = live[better]
        slots[live] = changed[better]
    return slots


@dataclass(frozen=True, slots=True)
class _State:
    """Everything that both kinds of steps look at; n problems are left.

    A candidate is (a, s): replica a of the fullest GPU, slot s anywhere.

    Attributes:
        slots: [n, S] expert in every slot.
        count: [n, E] replicas of every expert.
        loads: [n, E].
        share: [n, S] load of every slot.
        beside: [n, S] load of the GPU that a slot is on.
        fullest: [n] the largest of these.
        first: [n, 1] first slot of the fullest GPU.
        own, own_share: [n, r] its experts and their shares.
        on_gpu: [n, r, S] whether expert a is on the GPU of slot s.
    """

    slots: Tensor
    count: Tensor
    loads: Tensor
    share: Tensor
    beside: Tensor
    fullest: Tensor
    first: Tensor
    own: Tensor
    own_share: Tensor
    on_gpu: Tensor

    @classmethod
    def of(cls, slots: Tensor, loads: Tensor, num_gpus: int) -> _State:
        num_problems, num_slots = slots.shape
        room = num_slots // num_gpus
        count = counts(slots, loads.shape[1])
        share = (loads / count).gather(1, slots)
        gpu_load = _gpu_loads(share, num_gpus)
        gpu = gpu_load.argmax(1, keepdim=True)  # the first of equal ones
        own_slots = gpu * room + torch.arange(room, device=slots.device)
        own = slots.gather(1, own_slots)
        same = slots[:, None] == own[..., None]
        on_gpu = same.view(num_problems, room, num_gpus, room).any(3).repeat_interleave(room, 2)
        return cls(
            slots=slots,
            count=count,
            loads=loads,
            share=share,
            beside=gpu_load.repeat_interleave(room, 1),
            fullest=gpu_load.gather(1, gpu)[:, 0],
            first=gpu * room,
            own=own,
            own_share=share.gather(1, own_slots),
            on_gpu=on_gpu,
        )

    def best_swap(self) -> tuple[Tensor, Tensor]:
        """The fuller of the two GPUs after the best swap [n], and the slots after it [n, S]."""
        difference = self.own_share[..., None] - self.share[:, None]
        after = torch.maximum(
            self.fullest[:, None, None] - difference, self.beside[:, None] + difference
        )
        there = (self.slots[:, None] == self.own[..., None]).any(1)  # experts of the fullest GPU
        after.masked_fill_(self.on_gpu | there[:, None], torch.inf)
        value, own, slot = _least(after)
        here = self.first + own
        leaving = self.slots.gather(1, here)
        slots = self.slots.scatter(1, here, self.slots.gather(1, slot)).scatter(1, slot, leaving)
        return value, slots

    def best_replica(self) -> tuple[Tensor, Tensor]:
        """The fullest GPU touched by the best new replica [n], and the slots after it [n, S]."""
        grown = self.loads.gather(1, self.own) / (self.count.gather(1, self.own) + 1)
        relieved = self.fullest[:, None] - self.own_share + grown
        # The expert that gives up slot s burdens the GPUs of its other replicas.
        count = self.count.gather(1, self.slots)
        burden = self.loads.gather(1, self.slots) / (count - 1) - self.share
        others = (self._fullest_other() + burden).masked_fill(count < 2, torch.inf)
        after = torch.maximum(
            others[:, None], (self.beside - self.share)[:, None] + grown[..., None]
        )
        after = torch.maximum(after, relieved[..., None]).masked_fill_(self.on_gpu, torch.inf)
        value, own, slot = _least(after)
        return value, self.slots.scatter(1, slot, self.own.gather(1, own))

    def _fullest_other(self) -> Tensor:
        """[n, S] load of the fullest GPU that another replica of the slot's expert is on."""
        most = torch.zeros_like(self.loads)
        most = most.scatter_reduce(1, self.slots, self.beside, "amax").gather(1, self.slots)
        at_most = self.beside == most
        num_at_most = torch.zeros_like(self.count).scatter_add_(1, self.slots, at_most.long())
        second = torch.zeros_like(self.loads)
        second.scatter_reduce_(1, self.slots, self.beside.masked_fill(at_most, 0.0), "amax")
        alone = at_most & (num_at_most.gather(1, self.slots) == 1)
        return torch.where(alone, second.gather(1, self.slots), most)


def _least(after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of candidates [n, r, S] the least value [n], its a [n, 1] and its s [n, 1]."""
    flat = after.flatten(1)
    best = flat.argmin(1, keepdim=True)
    return flat.gather(1, best)[:, 0], best // after.shape[2], best % after.shape[2]


def _shares(slots: Tensor, loads: Tensor) -> Tensor:
    return (loads / counts(slots, loads.shape[1])).gather(1, slots)


def counts(slots: Tensor, num_experts: int) -> Tensor:
    """[B, E] replicas of every expert."""
    zeros = torch.zeros(len(slots), num_experts, dtype=torch.int64, device=slots.device)
    return zeros.scatter_add_(1, slots, torch.ones_like(slots))


def _gpu_loads(share: Tensor, num_gpus: int) -> Tensor:
    return tree_sum(share.view(len(share), num_gpus, -1))
