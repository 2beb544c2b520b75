"""The balanced policy: better plans than DeepSeek's rules give, and plans that move little.

Here belongs how the steps go together; each has a file of its own (``grouping``, ``replicas``,
``pack``, ``refine``, ``moves``).

1. *Groups to nodes* (hierarchical plans): the best of all ways where they can be counted.
2. *Replicas*: greedily, which makes the largest replica as small as possible. An expert gets no
   more replicas than it has GPUs to be on. Experts without load share what is left evenly.
3. *Packing*: the heaviest replica first, onto the lightest GPU that has not got its expert.
4. *Refinement*: swaps and changes of replicas, until the fullest GPU is at the provable bound or
   nothing helps.

With a placement in force, 4. is also done from there, with as few moves as possible and only until
the balance is as good as a fresh plan's up to a tolerance. Where that does not get there, the fresh
plan is used, with its nodes, GPUs and slots numbered as they fit the placement in force best.

Shapes: L layers, E experts, S slots, N nodes, G GPUs in all, B = L x N problems: a layer's share of
one node, in which its E/N experts are numbered from 0.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from dualpipe_ext.eplb.grouping import (
    best_grouping,
    names_of_nodes,
    nodes_of_groups,
    packed_grouping,
)
from dualpipe_ext.eplb.moves import keep_slots, rename_gpus
from dualpipe_ext.eplb.pack import pack_apart, part_twins
from dualpipe_ext.eplb.refine import counts, fullest_load, refine
from dualpipe_ext.eplb.replicas import (
    normalise,
    pair_counts,
    replica_counts,
    smallest_possible_load,
    tree_sum,
)

_CLOSE_ENOUGH = 5e-4  # to the bound: refinement stops
_FEWER_REPLICAS = (0.75, 0.5)  # of the most that an expert can have: further starts


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a plan is made for; ``num_groups`` and ``num_nodes`` are 1 for a global one."""

    num_slots: int
    num_groups: int
    num_nodes: int
    num_gpus: int


def balanced_phy2log(
    loads: Tensor, sizes: Sizes, *, current: Tensor | None = None, tolerance: float = 0.0
) -> Tensor:
    """Plan all layers; on the CPU, wherever the loads are.

    A step of the search is dozens of small operations whose outcome decides about the next one: a
    GPU would launch and wait. So loads are copied from there and the plan back.

    Args:
        loads: [L, E] float32, finite and not negative.
        sizes: checked to fit.
        current: [L, S] int64, the expert in every slot now, if there is a placement in force.
        tolerance: how much of a fresh plan's balancedness may be given up to move less.

    Returns:
        [L, S] int64, the expert in every slot.
    """
    if loads.device.type != "cpu":
        now = None if current is None else current.cpu()
        plan = balanced_phy2log(loads.cpu(), sizes, current=now, tolerance=tolerance)
        return plan.to(loads.device)
    loads = normalise(loads)
    plan = _fresh(loads, sizes)
    if current is None:
        return plan.to_experts()
    allowed = plan.fullest() / (1 - tolerance)
    if sizes.num_nodes > 1:
        plan = _same_nodes(plan, current, allowed)
    return _closest(plan, current, allowed)


def lowest_load(loads: Tensor, sizes: Sizes) -> Tensor:
    """A provable bound: some GPU has at least so much in any plan, [L] float64.

    It is relative to the layer's largest load, as ``normalise`` makes them. Found on the CPU, as
    the plan is.
    """
    if loads.device.type != "cpu":
        return lowest_load(loads.cpu(), sizes).to(loads.device)
    loads = normalise(loads)
    _, bound = best_grouping(_group_loads(loads, sizes.num_groups), sizes.num_nodes)
    return _lowest(loads, bound, sizes)


def _lowest(loads: Tensor, node_bound: Tensor, sizes: Sizes) -> Tensor:
    """Nodes only restrict a plan: what holds without them holds with them."""
    anywhere = smallest_possible_load(loads, sizes.num_slots, sizes.num_gpus)
    gpus = sizes.num_gpus // sizes.num_nodes
    slots = sizes.num_slots // sizes.num_nodes
    spread = min(gpus, slots - loads.shape[1] // sizes.num_nodes + 1)
    inside = torch.maximum(node_bound / gpus, loads.amax(1) / spread)
    return torch.maximum(anywhere, inside)


def _group_loads(loads: Tensor, num_groups: int) -> Tensor:
    return tree_sum(loads.view(len(loads), num_groups, -1))


def _experts_by_node(node: Tensor, num_experts: int) -> Tensor:
    """[L, E]: node 0's experts, then node 1's; inside a node in the order of their ids."""
    num_layers, num_groups = node.shape
    groups = node.argsort(dim=1, stable=True)
    experts = torch.arange(num_experts, device=node.device).view(num_groups, -1)
    return experts[groups].view(num_layers, num_experts)


@dataclass(frozen=True, slots=True)
class _Plan:
    """A plan of all layers in terms of its B problems, and the way to the model's numbers.

    Attributes:
        sizes: of the whole plan.
        node: [L, g] the node of every group.
        expert_at: [L, E] the experts of node 0, of node 1, and so on.
        loads: [B, E/N] of the experts of each problem.
        slots: [B, S/N] expert, as the problem numbers it, in every slot.
    """

    sizes: Sizes
    node: Tensor
    expert_at: Tensor
    loads: Tensor
    slots: Tensor

    @classmethod
    def of(cls, node: Tensor, loads: Tensor, bound: Tensor, sizes: Sizes) -> _Plan:
        """The best plan from nothing, given the nodes of the groups [L, g].

        Args:
            loads: [L, E].
            bound: [L] load of the fullest GPU with which to be content.
        """
        expert_at = _experts_by_node(node, loads.shape[1])
        inside = loads.gather(1, expert_at).view(len(loads) * sizes.num_nodes, -1)
        target = (bound * (1 + _CLOSE_ENOUGH)).repeat_interleave(sizes.num_nodes)
        return cls(sizes, node, expert_at, inside, _best_slots(inside, target, sizes))

    def fullest(self) -> Tensor:
        """[L] load of the fullest GPU."""
        num_gpus = self.sizes.num_gpus // self.sizes.num_nodes
        return fullest_load(self.slots, self.loads, num_gpus).view(len(self.node), -1).amax(1)

    def where(self, mask: Tensor, other: _Plan) -> _Plan:
        """This plan in the layers of ``mask`` [L], the other one elsewhere."""
        by_problem = mask.repeat_interleave(self.sizes.num_nodes)[:, None]
        return _Plan(
            self.sizes,
            torch.where(mask[:, None], self.node, other.node),
            torch.where(mask[:, None], self.expert_at, other.expert_at),
            torch.where(by_problem, self.loads, other.loads),
            torch.where(by_problem, self.slots, other.slots),
        )

    def to_experts(self) -> Tensor:
        """[L, S] the expert in every slot."""
        num_layers, num_experts = self.expert_at.shape
        node = torch.arange(self.sizes.num_nodes, device=self.slots.device)[:, None]
        position = self.slots.view(num_layers, self.sizes.num_nodes, -1)
        position = position + node * (num_experts // self.sizes.num_nodes)
        return self.expert_at.gather(1, position.flatten(1))

    def from_experts(self, phy2log: Tensor) -> tuple[Tensor, Tensor]:
        """[L, S] experts as the problems number them, [B, S/N], and whether they are a plan [B].

        Where they are none (an expert is on another node, or nowhere), the plan's own are given.
        """
        num_layers, num_experts = self.expert_at.shape
        per_node = num_experts // self.sizes.num_nodes
        positions = torch.arange(num_experts, device=phy2log.device).expand_as(self.expert_at)
        position = torch.empty_like(self.expert_at).scatter_(1, self.expert_at, positions)
        position = position.gather(1, phy2log).view(num_layers, self.sizes.num_nodes, -1)
        node = torch.arange(self.sizes.num_nodes, device=phy2log.device)[:, None]
        number = (position - node * per_node).view_as(self.slots)
        mine = (number >= 0) & (number < per_node)
        held = torch.zeros_like(self.loads, dtype=torch.bool)
        held.scatter_reduce_(1, number.clamp(0, per_node - 1), mine, "amax")
        usable = mine.all(1) & held.all(1)
        return torch.where(usable[:, None], number, self.slots), usable


def _fresh(loads: Tensor, sizes: Sizes) -> _Plan:
    """The better one, in each layer, of what two groupings lead to."""
    group_loads = _group_loads(loads, sizes.num_groups)
    node, node_bound = best_grouping(group_loads, sizes.num_nodes)
    bound = _lowest(loads, node_bound, sizes)
    best = _Plan.of(node, loads, bound, sizes)
    if sizes.num_nodes in (1, sizes.num_groups):
        return best
    other = _Plan.of(packed_grouping(group_loads, sizes.num_nodes), loads, bound, sizes)
    return other.where(other.fullest() < best.fullest(), best)


def _best_slots(loads: Tensor, target: Tensor, sizes: Sizes) -> Tensor:
    """[B, S/N] replicas, packed and refined, for ``loads`` [B, E/N]."""
    num_slots, num_gpus = sizes.num_slots // sizes.num_nodes, sizes.num_gpus // sizes.num_nodes
    most = _most_replicas(loads.shape[1], num_slots, num_gpus)
    greedy = replica_counts(loads, num_slots, most)

    def searched(load: Tensor, limit: int) -> Tensor:
        count = replica_counts(load, num_slots, limit)
        if num_slots == 2 * num_gpus:
            count = pair_counts(load, count, limit)
        return pack_apart(load, count, num_gpus)

    def plain(load: Tensor, limit: int) -> Tensor:
        count = replica_counts(load, num_slots, limit)
        return pack_apart(load, count, num_gpus, from_the_start=False)

    slots = refine(searched(loads, most), loads, num_gpus, target=target)
    # DeepSeek's own start, so that the plan is not worse than theirs; and fewer replicas for an
    # expert that would otherwise be on every GPU, where it leaves no room for another large one.
    starts = [(plain, most)]
    for share in _FEWER_REPLICAS:
        limit = int(most * share)
        if limit >= 2 and loads.shape[1] * limit >= num_slots:
            starts.append((searched, limit))
    for start, limit in starts:
        another = (greedy.amax(1) > limit) | (start is plain)
        left = fullest_load(slots, loads, num_gpus) > target
        left = (left & another).nonzero()[:, 0]
        if not len(left):
            continue
        load, mine = loads[left], slots[left]
        theirs = refine(start(load, limit), load, num_gpus, target=target[left])
        better = fullest_load(theirs, load, num_gpus) < fullest_load(mine, load, num_gpus)
        slots[left] = torch.where(better[:, None], theirs, mine)
    return slots


def _most_replicas(num_experts: int, num_slots: int, num_gpus: int) -> int:
    """Of one expert: one for each GPU, more only where there are slots for more."""
    return max(num_gpus, -(-num_slots // num_experts))


def _same_nodes(plan: _Plan, current: Tensor, allowed: Tensor) -> _Plan:
    """The plan with its groups where they are now, or as far as that keeps it good enough.

    Args:
        current: [L, S] the expert in every slot now.
        allowed: [L] load of the fullest GPU that is still good enough.
    """
    sizes, num_experts = plan.sizes, plan.expert_at.shape[1]
    now = nodes_of_groups(current, num_experts, sizes.num_groups, sizes.num_nodes)
    names = names_of_nodes(plan.node, now, sizes.num_nodes)
    num_layers = len(names)
    old_number = torch.empty_like(names).scatter_(
        1, names, torch.arange(sizes.num_nodes, device=names.device).expand_as(names)
    )
    rows = torch.arange(num_layers, device=names.device)[:, None]
    order = (rows * sizes.num_nodes + old_number).flatten()
    node = names.gather(1, plan.node)
    renamed = _Plan(
        sizes,
        node,
        _experts_by_node(node, num_experts),
        plan.loads[order],
        plan.slots[order],
    )
    # As many groups on every node as there should be, and all whole.
    nodes = torch.arange(sizes.num_nodes, device=now.device)[:, None]
    full = (now[:, None] == nodes).sum(2) == sizes.num_groups // sizes.num_nodes
    whole = full.all(1)
    node = torch.where(whole[:, None], now, node)
    loads = plan.loads.new_empty(num_layers, num_experts)
    loads.scatter_(1, plan.expert_at, plan.loads.view(num_layers, -1))
    staying = _Plan.of(node, loads, allowed / (1 + _CLOSE_ENOUGH), sizes)
    return staying.where(whole & (staying.fullest() <= allowed), renamed)


def _closest(plan: _Plan, current: Tensor, allowed: Tensor) -> Tensor:
    """[L, S] a plan that leaves no GPU with more than ``allowed`` [L] and moves little."""
    sizes = plan.sizes
    num_gpus = sizes.num_gpus // sizes.num_nodes
    num_experts, num_slots = plan.loads.shape[1], plan.slots.shape[1]
    most = _most_replicas(num_experts, num_slots, num_gpus)
    start, usable = plan.from_experts(current)
    usable &= counts(start, num_experts).amax(1) <= most
    start = torch.where(usable[:, None], start, plan.slots)
    if most <= num_gpus:
        start = part_twins(start, plan.loads / counts(start, num_experts), num_gpus)
    target = allowed.repeat_interleave(sizes.num_nodes)
    kept = refine(start, plan.loads, num_gpus, target=target, frugal=True)
    good = usable & (fullest_load(kept, plan.loads, num_gpus) <= target)

    now = current.reshape(len(kept), -1)
    slots = torch.where(good[:, None], kept, plan.slots)
    new = dataclasses.replace(plan, slots=slots).to_experts().view_as(now)
    renumber = (~good).nonzero()[:, 0]
    if len(renumber):
        args = (num_gpus, plan.expert_at.shape[1])
        new[renumber] = rename_gpus(now[renumber], new[renumber], *args)
    return keep_slots(now, new, num_gpus).view_as(current)
