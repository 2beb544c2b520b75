"""Groups of experts and the nodes they live on, for hierarchical plans.

Here belongs which node each group goes to. What happens inside a node is the same as without nodes.

Shapes: L layers, E experts, N nodes, g groups (of E/g experts each, g/N to a node).
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations, islice

import torch
from torch import Tensor

from dualpipe_ext.eplb.pack import pack_apart
from dualpipe_ext.eplb.refine import fullest_load, refine
from dualpipe_ext.eplb.replicas import tree_sum

_MOST_PARTITIONS = 3000  # up to here all of them are compared
_TAKEN = 2**40  # more than things can have in common


def best_grouping(group_loads: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Share groups out to nodes, equally many to each, so that the fullest node has least.

    Up to 3000 ways are all compared (8 groups on 4 nodes: 105). With two groups to a node the
    heaviest beside the lightest is best. Otherwise a packing is refined by swaps.

    Args:
        group_loads: [L, g] float64 positive.
        num_nodes: N.

    Returns:
        node of every group [L, g] int64, and a load [L] that some node has under any grouping.
    """
    num_groups = group_loads.shape[1]
    room = num_groups // num_nodes
    at = _partitions(num_groups, room)
    if at is not None:
        at = at.to(group_loads.device)
        fullest = tree_sum(group_loads[:, at]).amax(2)  # [L, ways]
        best = fullest.argmin(1)
        return _invert(at[best].flatten(1)) // room, fullest.gather(1, best[:, None])[:, 0]
    mean = tree_sum(group_loads) / num_nodes
    slots = refine(_packed(group_loads, num_nodes), group_loads, num_nodes, target=mean)
    lightest = group_loads.sort(dim=1).values[:, : room - 1]
    bound = torch.maximum(mean, group_loads.amax(1) + tree_sum(lightest))
    if room == 2:  # the packing of pairs is optimal
        bound = fullest_load(slots, group_loads, num_nodes)
    return _invert(slots) // room, bound


def packed_grouping(group_loads: Tensor, num_nodes: int) -> Tensor:
    """The heaviest group first, each to the lightest node that has room: node of each, [L, g].

    What DeepSeek's rules do. The nodes are less even than :func:`best_grouping` makes them, but now
    and then what is inside packs better.
    """
    return _invert(_packed(group_loads, num_nodes)) // (group_loads.shape[1] // num_nodes)


def _packed(group_loads: Tensor, num_nodes: int) -> Tensor:
    ones = torch.ones_like(group_loads, dtype=torch.int64)
    return pack_apart(group_loads, ones, num_nodes)


def nodes_of_groups(phy2log: Tensor, num_experts: int, num_groups: int, num_nodes: int) -> Tensor:
    """The node that has most of each group's experts, [L, g]; -1 where the group is not whole.

    Args:
        phy2log: [L, S] the placement in force; slot s is on node ``s // (S / N)``.
    """
    num_layers, num_slots = phy2log.shape
    node = torch.arange(num_slots, device=phy2log.device) // (num_slots // num_nodes)
    cell = phy2log // (num_experts // num_groups) * num_nodes + node
    here = torch.zeros(num_layers, num_groups * num_nodes, dtype=torch.bool, device=phy2log.device)
    here = here.scatter_(1, cell, True).view(num_layers, num_groups, num_nodes)
    return here.to(torch.uint8).argmax(2).masked_fill(here.sum(2) != 1, -1)


def names_of_nodes(node: Tensor, now: Tensor, num_nodes: int) -> Tensor:
    """Other numbers for the nodes of a new grouping, so that many groups stay where they are.

    Args:
        node: [L, g] the new grouping.
        now: [L, g] the node of each group now, -1 where it has none.

    Returns:
        [L, N] the new number of every node.
    """
    num_layers = len(node)
    cell = (node * num_nodes + now).clamp(min=0)
    stays = (now >= 0).long()
    common = torch.zeros(num_layers, num_nodes**2, dtype=torch.int64, device=node.device)
    common = common.scatter_add_(1, cell, stays).view(num_layers, num_nodes, num_nodes)
    return best_names(common)


def best_names(common: Tensor) -> Tensor:
    """One-to-one names [B, n] for n new things, of old things they have much in common with.

    Each takes in turn the best free name, those first that have most to lose; then pairs exchange
    names as long as that gains something.

    Args:
        common: [B, n, n] integers, what new thing i has in common with the old thing j.
    """
    num_problems, size, _ = common.shape
    order = common.amax(2).argsort(dim=1, descending=True, stable=True)
    penalty = torch.zeros(num_problems, size, dtype=common.dtype, device=common.device)
    names = torch.empty_like(order)
    for i in range(size):
        new = order[:, i : i + 1]
        row = common.gather(1, new[..., None].expand(-1, 1, size))[:, 0]
        name = (row - penalty).argmax(1, keepdim=True)
        names.scatter_(1, new, name)
        penalty.scatter_(1, name, _TAKEN)
    live = torch.arange(num_problems, device=common.device)
    for _ in range(size):
        # as_named[i, j]: what i would have in common under the name that j has now.
        now = names[live]
        as_named = common[live].gather(2, now[:, None].expand(-1, size, -1))
        own = as_named.diagonal(dim1=1, dim2=2)
        gain = as_named + as_named.transpose(1, 2) - own[..., None] - own[:, None]
        best = gain.flatten(1).argmax(1, keepdim=True)
        gains = gain.flatten(1).gather(1, best)[:, 0] > 0
        if not bool(gains.any()):
            break
        one, other = best // size, best % size
        exchanged = now.scatter(1, one, now.gather(1, other)).scatter(1, other, now.gather(1, one))
        live = live[gains]
        names[live] = exchanged[gains]
    return names


@lru_cache(maxsize=64)
def _partitions(num_groups: int, room: int) -> Tensor | None:
    """All ways to part the groups, [ways, N, room]; ``None`` where there are too many."""
    ways: list[list[tuple[int, ...]]] = [[]]
    for _ in range(num_groups // room):
        longer = []
        for way in ways:
            used = {group for part in way for group in part}
            rest = [group for group in range(num_groups) if group not in used]
            # The first one that is left must be in some part: parts have no order.
            choices = islice(combinations(rest[1:], room - 1), _MOST_PARTITIONS + 1)
            longer += [[*way, (rest[0], *others)] for others in choices]
            if len(longer) > _MOST_PARTITIONS:
                return None
        ways = longer
    return torch.tensor(ways)


def _invert(order: Tensor) -> Tensor:
    positions = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, positions)
