"""Packing: a GPU for every replica, no two of one expert on the same GPU.

Here belongs the placement to begin with, from counts; ``refine.py`` makes it better.

Shapes: B problems, E experts, S slots, G GPUs of each problem; GPU g has the S/G slots from
``g * S / G``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualpipe_ext.eplb.replicas import expand


def pack_apart(
    loads: Tensor, count: Tensor, num_gpus: int, *, from_the_start: bool = True
) -> Tensor:
    """The heaviest replica first, each onto the lightest GPU that has room and not its expert.

    Args:
        loads: [B, E] float64.
        count: [B, E] int64 replicas of every expert, with a sum of S, a multiple of G.
        num_gpus: G. Where no expert has more replicas than GPUs, none is twice on one.
        from_the_start: ``False`` keeps replicas of an expert apart only at the end, by swaps.

    Returns:
        [B, S] int64, the expert in every slot.
    """
    num_problems = len(loads)
    num_slots = int(count[0].sum())
    room = num_slots // num_gpus
    share = loads / count
    order = share.argsort(dim=1, descending=True, stable=True)
    # Replicas of an expert stay together, so only the last expert's GPUs have to be remembered.
    expert = order.gather(1, expand(count.gather(1, order), num_slots))
    shares = share.gather(1, expert)
    again = expert[:, 1:] == expert[:, :-1]

    gpu_load = loads.new_zeros(num_problems, num_gpus)
    gpu_size = torch.zeros_like(gpu_load, dtype=torch.int64)
    taken = torch.zeros_like(gpu_load, dtype=torch.bool)
    slots = torch.empty_like(expert)
    for i in range(num_slots):
        if i:
            taken &= again[:, i - 1 : i]
        full = gpu_size == room
        # Among GPUs with room those without the expert come first, whatever their load.
        rank = gpu_load
        if from_the_start:
            rank = rank.masked_fill(taken, torch.finfo(torch.float64).max)
        gpu = rank.masked_fill(full, torch.inf).argmin(1, keepdim=True)
        place = gpu_size.gather(1, gpu)
        slots.scatter_(1, gpu * room + place, expert[:, i : i + 1])
        taken.scatter_(1, gpu, True)
        gpu_size.scatter_(1, gpu, place + 1)
        gpu_load.scatter_add_(1, gpu, shares[:, i : i + 1])
    return part_twins(slots, share, num_gpus) if num_slots <= num_gpus * loads.shape[1] else slots


def part_twins(slots: Tensor, share: Tensor, num_gpus: int) -> Tensor:
    """Swap until no expert is twice on a GPU; [B, S].

    A GPU g that has expert e twice leaves some GPU h without it. Either h has an expert that g has
    not, or it has one of g's twice itself: some swap between the two always leaves fewer twins. Of
    those that do, the one between the most similar replicas is made.
    """
    room = slots.shape[1] // num_gpus
    earlier = torch.ones(room, room, dtype=torch.bool, device=slots.device).tril(-1)
    while True:
        by_gpu = slots.view(len(slots), num_gpus, room)
        same = by_gpu[..., :, None] == by_gpu[..., None, :]
        twin = (same & earlier).any(-1).flatten(1)  # [B, S]: its expert is in a slot before it
        live = twin.any(1).nonzero()[:, 0]
        if not len(live):
            return slots
        here = twin[live].to(torch.uint8).argmax(1, keepdim=True)
        mine = slots[live]
        expert = mine.gather(1, here)
        gpu_of = torch.arange(slots.shape[1], device=slots.device) // room
        at_home = gpu_of == gpu_of[here]
        known = (mine[:, :, None] == mine.masked_fill(~at_home, -1)[:, None]).any(2)
        has_expert = (mine == expert).view(len(live), num_gpus, room).any(2)
        crowded = (same[live].sum(-1) > 1).flatten(1)
        possible = ~has_expert.repeat_interleave(room, 1) & (~known | crowded)
        value = share[live].gather(1, mine)
        distance = (value - value.gather(1, here)).abs().masked_fill(~possible, torch.inf)
        there = distance.argmin(1, keepdim=True)
        mine = mine.scatter(1, here, mine.gather(1, there)).scatter(1, there, expert)
        slots = slots.index_copy(0, live, mine)
