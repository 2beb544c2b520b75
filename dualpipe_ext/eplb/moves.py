"""Fewest moves: new placements renamed to look like the one in force, and what still moves.

Here belongs the comparison of two placements. Moving the weights is ``migrate.py``.

Shapes: L layers, B problems, S slots, G GPUs, r = S/G slots of a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualpipe_ext.eplb.grouping import best_names


def experts_received(old: Tensor, new: Tensor, num_gpus: int) -> Tensor:
    """How many experts' weights each GPU must receive from others, [L, G] int64.

    An expert that a GPU has already costs nothing, and one that it wants twice comes once: it is
    what :func:`~dualpipe_ext.eplb.migrate` sends.

    Args:
        old: [L, S] int64 expert in every slot now.
        new: [L, S] int64 expert wanted there.
        num_gpus: G.
    """
    old, new = (x.view(len(x), num_gpus, -1) for x in (old, new))
    room = new.shape[2]
    earlier = torch.ones(room, room, dtype=torch.bool, device=new.device).tril(-1)
    known = (new[..., :, None] == old[..., None, :]).any(-1)
    again = ((new[..., :, None] == new[..., None, :]) & earlier).any(-1)
    return (~known & ~again).sum(2)


def rename_gpus(old: Tensor, new: Tensor, num_gpus: int, num_experts: int) -> Tensor:
    """``new`` [B, S] with its GPUs in another order, so that many experts are where they are now.

    Args:
        old: [B, S] int64 expert in every slot now.
        new: [B, S] int64 expert wanted there.
        num_gpus: G.
        num_experts: E; experts are in [0, E).
    """
    has = [_held(x, num_gpus, num_experts) for x in (new, old)]
    names = best_names((has[0] @ has[1].transpose(1, 2)).long())
    parts = new.view(len(new), num_gpus, -1)
    return torch.empty_like(parts).scatter_(1, names[..., None].expand_as(parts), parts).flatten(1)


def keep_slots(old: Tensor, new: Tensor, num_gpus: int) -> Tensor:
    """``new`` [B, S] with the slots of each GPU in another order: an expert that stays on a GPU
    stays in its slot, the others fill the gaps in order.

    Args:
        old: [B, S] int64 expert in every slot now.
        new: [B, S] int64 expert wanted there.
        num_gpus: G.
    """
    room = new.shape[1] // num_gpus
    old_rows, new_rows = old.view(-1, room), new.view(-1, room)
    same_turn = _turn(new_rows)[:, :, None] == _turn(old_rows)[:, None]
    match = (new_rows[:, :, None] == old_rows[:, None]) & same_turn  # [rows, new, old]
    # The k-th new one without a match goes to the k-th slot without one.
    gaps = match.any(1).long().argsort(dim=1, stable=True)
    nth = (~match.any(2)).long().cumsum(1) - 1
    slot = torch.where(
        match.any(2), match.to(torch.uint8).argmax(2), gaps.gather(1, nth.clamp(min=0))
    )
    return torch.empty_like(new_rows).scatter_(1, slot, new_rows).view_as(new)


def _turn(rows: Tensor) -> Tensor:
    """How often each entry has come before in its row."""
    room = rows.shape[1]
    earlier = torch.ones(room, room, dtype=torch.bool, device=rows.device).tril(-1)
    return ((rows[..., :, None] == rows[..., None, :]) & earlier).sum(-1)


def _held(slots: Tensor, num_gpus: int, num_experts: int) -> Tensor:
    """[B, G, E] float32: 1 where a GPU has an expert. Whole numbers, so products are exact."""
    by_gpu = slots.view(len(slots), num_gpus, -1)
    held = torch.zeros(*by_gpu.shape[:2], num_experts, device=slots.device)
    return held.scatter_(2, by_gpu, 1.0)
