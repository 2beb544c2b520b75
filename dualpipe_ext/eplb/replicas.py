"""Replica counts: how many slots each expert gets, and the best that any placement could reach.

Here belongs what can be said from counts alone, before a replica has a GPU.

Shapes: B independent problems solved side by side, E experts, S slots, G GPUs of each problem.
Loads are float64, positive. Everything is elementwise or adds in a fixed order, so that the same
loads give the same bits on every machine.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The search over counts compares this many experts to take a replica from; more bring nothing.
_GIVERS = 4
_MAX_EXCHANGES = 64
# Loads at which the bound is tried, by how much they exceed the largest replica's.
_BOUND_EXCESS = tuple(0.002 * 1.4**i for i in range(16))
# Quotients are rounded: a share counts as at most a limit if it exceeds it by no more than this.
_ROUNDING = 1e-9


def tree_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, halving it each time: one order of additions on all machines."""
    while x.shape[-1] > 1:
        half = (x.shape[-1] + 1) // 2
        x = torch.cat(
            [x[..., : x.shape[-1] - half] + x[..., half:], x[..., x.shape[-1] - half : half]], -1
        )
    return x[..., 0]


def normalise(loads: Tensor) -> Tensor:
    """Loads relative to the layer's largest, float64 and positive: every layer is a sane one.

    An expert without load counts as 2**-40 of the largest one. So experts that nobody uses share
    what slots are left evenly, and a layer without any load is one in which all are alike.
    """
    loads = loads.double()
    most = loads.amax(1, keepdim=True)
    return torch.where(most > 0, loads / most.where(most > 0, 1.0), 1.0).clamp(min=2.0**-40)


def replica_counts(loads: Tensor, num_slots: int, most: int) -> Tensor:
    """Give every expert a slot and each further one to the expert whose replicas carry most.

    That makes the largest replica as small as it can be (each slot goes where any plan with a
    smaller largest replica needs one, too).

    Args:
        loads: [B, E].
        num_slots: S, at least E and at most ``most * E``.
        most: replicas that an expert can have.

    Returns:
        [B, E] int64, with a sum of S.
    """
    count = torch.ones_like(loads, dtype=torch.int64)
    share = loads.clone() if most > 1 else torch.full_like(loads, -torch.inf)
    for _ in range(num_slots - loads.shape[1]):
        pick = share.argmax(1, keepdim=True)  # the first of equal ones
        have = count.gather(1, pick) + 1
        count.scatter_(1, pick, have)
        after = loads.gather(1, pick) / have
        share.scatter_(1, pick, after.masked_fill_(have >= most, -torch.inf))
    return count


def expand(count: Tensor, num_slots: int) -> Tensor:
    """The expert of every replica, [B, S] int64: each expert as often as ``count`` [B, E] says."""
    num_problems, num_experts = count.shape
    cells = torch.arange(num_problems * num_experts, device=count.device)
    replicas = cells.repeat_interleave(count.flatten(), output_size=num_problems * num_slots)
    return replicas.view(num_problems, num_slots) % num_experts


def smallest_possible_load(loads: Tensor, num_slots: int, num_gpus: int) -> Tensor:
    """A load that the fullest GPU has in every placement: [B], a provable bound.

    It is the largest of

    - the mean load of a GPU;
    - for each expert its load over the most GPUs that it can be on;
    - the largest replica t under the best counts, plus what must lie beside it: S/G - 1 replicas.
      To find the least these can carry, suppose that no GPU has more than M. Then expert e needs at
      least ``k = ceil(load / M)`` replicas, at most ``S - sum(k)`` are left over, and no replica is
      smaller than ``min(load / (k + left over))``. So a plan has more than M on some GPU, or it has
      t and S/G - 1 times that. The best M of a few is taken.

    Args:
        loads: [B, E].
        num_slots: S.
        num_gpus: G.
    """
    spread = min(num_gpus, num_slots - loads.shape[1] + 1)
    bound = torch.maximum(tree_sum(loads) / num_gpus, loads.amax(1) / spread)
    counts = replica_counts(loads, num_slots, num_slots)
    largest = (loads / counts).amax(1)
    bound = torch.maximum(bound, largest)
    beside = num_slots // num_gpus - 1
    for excess in _BOUND_EXCESS if beside else ():
        limit = largest * (1 + excess)
        needed = (loads / limit[:, None] * (1 - _ROUNDING)).ceil()
        left_over = num_slots - needed.sum(1, keepdim=True)  # whole numbers: exact in any order
        least = (loads / (needed + left_over)).amin(1)
        bound = torch.maximum(bound, torch.minimum(limit, largest + beside * least))
    return bound


def pair_counts(loads: Tensor, count: Tensor, most: int) -> Tensor:
    """Better counts for GPUs of two slots each: [B, E] int64.

    There the best placement for given counts is known, the heaviest replica beside the lightest,
    the next ones next. So counts can be searched directly: as long as it lowers the heaviest pair,
    one of its experts gets a replica from an expert that can best do without one.

    Args:
        loads: [B, E].
        count: [B, E] int64 to begin with, with an even sum S.
        most: replicas that an expert can have.
    """
    num_slots = int(count[0].sum())
    count = count.clone()
    live = torch.arange(len(loads), device=loads.device)
    for _ in range(_MAX_EXCHANGES):
        load, have = loads[live], count[live]
        heaviest, pair = _heaviest_pair(load, have, num_slots)
        without = (load / (have - 1)).masked_fill(have < 2, torch.inf)
        givers = without.argsort(dim=1, stable=True)[:, :_GIVERS]
        taker = pair.repeat_interleave(givers.shape[1], 1)  # [n, 2 * givers]
        giver = givers.repeat(1, 2)
        tried = have[:, None].repeat(1, taker.shape[1], 1)
        one = torch.ones_like(taker)[..., None]
        tried.scatter_add_(2, taker[..., None], one).scatter_add_(2, giver[..., None], -one)
        impossible = (taker == giver) | (tried.amin(2) < 1) | (tried.amax(2) > most)
        tried = torch.where(impossible[..., None], have[:, None], tried)
        same_load = load[:, None].expand_as(tried).flatten(0, 1)
        after, _ = _heaviest_pair(same_load, tried.flatten(0, 1), num_slots)
        after = after.view_as(taker).masked_fill(impossible, torch.inf)
        best = after.argmin(1, keepdim=True)
        better = after.gather(1, best)[:, 0] < heaviest * (1 - _ROUNDING)
        if not bool(better.any()):
            break
        chosen = tried.gather(1, best[..., None].expand(-1, -1, tried.shape[2]))[:, 0]
        live = live[better]
        count[live] = chosen[better]
    return count


def _heaviest_pair(loads: Tensor, count: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Its load [n] and its two experts [n, 2], when the heaviest goes with the lightest."""
    expert = expand(count, num_slots)
    share, order = (loads / count).gather(1, expert).sort(dim=1, stable=True)
    expert = expert.gather(1, order)
    half = num_slots // 2
    load = share[:, :half] + share[:, half:].flip(1)
    worst = load.argmax(1, keepdim=True)
    pair = torch.cat([expert.gather(1, worst), expert.gather(1, num_slots - 1 - worst)], 1)
    return load.gather(1, worst)[:, 0], pair
