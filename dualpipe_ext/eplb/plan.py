"""Planning: how many replicas every expert gets and which slot each of them occupies.

Here belongs what turns loads into maps. Using the maps is ``placement.py``, moving weights to where
they say is ``migrate.py``.

Shapes: L layers, E logical experts, S slots (physical experts) in all, X most replicas of one
expert, B independent problems solved side by side (layers, or layers x nodes).

The reference policy is the algorithm of DeepSeek's EPLB (https://github.com/deepseek-ai/EPLB), with
every tie settled, so that the same loads give the same maps on every machine:

1. Loads are float32. If ``num_groups % num_nodes == 0`` the plan is hierarchical: whole groups are
   packed onto nodes, replicas are made and packed inside each node. Otherwise it is global, which
   is the same with one group and one node.
2. A group's load is the float32 sum of its experts' loads, added in expert order.
3. Packing n items into m packs of n/m: if n == m, item i is pack i. Otherwise the heaviest item
   first (the lower index first on a tie), each into the lightest pack that has room (the lower
   index on a tie). Pack loads add up in float32 in that order.
4. Replication: S - E rounds, each gives one more replica to the expert with the largest
   ``load / replicas`` (the lower index on a tie).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualpipe_ext.eplb import on_device
from dualpipe_ext.eplb.balanced import Sizes, balanced_phy2log
from dualpipe_ext.eplb.checks import checked_loads, checked_sizes, float_loads
from dualpipe_ext.eplb.placement import Placement

POLICIES = ("reference", "balanced")


def rebalance_experts(
    weight: Tensor,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    policy: str = "reference",
    sync: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plan replicas and their slots from loads, with DeepSeek's signature, order and result.

    The maps are on the device of ``weight``, and the same whatever that is. With the CUDA core, the
    reference policy plans on a Hopper GPU in one launch: at most 1024 experts, 2048 slots and 512
    GPUs. Otherwise loads on a GPU are copied to the CPU and the maps back, except with
    ``sync=False``, which stays on the device, one small launch after the other. The balanced policy
    plans on the CPU.

    Args:
        weight: [L, E] load of every logical expert (tokens, say), any real dtype, not negative.
        num_replicas: S, slots in all, redundant ones included; a multiple of ``num_gpus``.
        num_groups: expert groups of group-limited routing; E is a multiple of it.
        num_nodes: hosts. Where it divides ``num_groups`` the groups stay whole on their node.
        num_gpus: GPUs in all; slot s lives on GPU ``s // (S / num_gpus)``.
        policy: "reference" gives DeepSeek's result; "balanced" a better one (``balanced.py``). To
            start from a placement in force, and to know how good a plan is, use
            :func:`~dualpipe_ext.eplb.plan_placement`.
        sync: ``False`` reads nothing back from the device, and can be captured into a CUDA graph:
            loads are clamped into the valid range instead of being checked (NaN and negative ones
            to 0, an infinite one to 1e38 / E), and X is ``S - E + 1``, the most it can be. Only
            for the reference policy: refinement must know when it is done.

    Returns:
        - phy2log [L, S] int64: the expert in every slot.
        - log2phy [L, E, X] int64: the slots of every expert in the order in which its replicas were
          made (balanced: in slot order), padded with -1. X is the largest number of replicas in the
          plan (see ``sync``).
        - logcnt [L, E] int64: the number of replicas of every expert, at least 1.

    Raises:
        ValueError: sizes that do not divide, fewer slots than experts, loads that are negative,
            NaN or infinite in float32, or an unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"expected a policy of {', '.join(POLICIES)}, got {policy!r}")
    if policy == "balanced" and not sync:
        raise ValueError("expected sync=True with policy='balanced', got sync=False")
    loads = float_loads(weight)
    num_experts = loads.shape[1]
    groups_and_nodes = checked_sizes(num_experts, num_replicas, num_groups, num_nodes, num_gpus)
    sizes = Sizes(num_replicas, *groups_and_nodes, num_gpus)
    if policy == "balanced":
        loads = checked_loads(weight, sync=True)
        placement = Placement.from_phy2log(balanced_phy2log(loads, sizes), num_experts)
        return placement.phy2log, placement.log2phy, placement.logcnt
    if on_device.usable(loads.device, num_experts, sizes):
        return _plan_by_kernel(weight, loads, sizes, sync)
    loads = checked_loads(weight, sync=sync)
    if loads.is_cuda and sync:
        maps = _plan(loads.cpu(), sizes, sync=True)
        return tuple(tensor.to(loads.device) for tensor in maps)
    return _plan(loads, sizes, sync=sync)


def _plan_by_kernel(
    weight: Tensor, loads: Tensor, sizes: Sizes, sync: bool
) -> tuple[Tensor, Tensor, Tensor]:
    num_experts = loads.shape[1]
    if not sync:
        maps = on_device.plan_clamped(loads, sizes, sizes.num_slots - num_experts + 1)
        return maps.phy2log, maps.log2phy, maps.logcnt
    maps, width = on_device.plan_checked(weight, loads, sizes)
    return maps.phy2log, _invert(maps.phy2log, maps.replica, num_experts, width), maps.logcnt


def _plan(loads: Tensor, sizes: Sizes, *, sync: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The reference policy in torch: all layers at once, one round of the rules at a time."""
    num_layers, num_experts = loads.shape
    num_replicas, num_groups = sizes.num_slots, sizes.num_groups
    num_nodes, num_gpus = sizes.num_nodes, sizes.num_gpus
    expert_at = _pack_groups_to_nodes(loads, num_groups, num_nodes)  # [L, E], node by node
    node_loads = loads.gather(1, expert_at).view(num_layers * num_nodes, -1)
    member, replica, count = _replicate(node_loads, num_replicas // num_nodes)

    replica_loads = (node_loads / count).gather(1, member)
    gpu, place = _pack(replica_loads, num_gpus // num_nodes)
    slot = gpu * (num_replicas // num_gpus) + place
    member = torch.empty_like(member).scatter_(1, slot, member)  # now by slot of the node
    replica = torch.empty_like(replica).scatter_(1, slot, replica).view(num_layers, num_replicas)

    first_member = torch.arange(num_nodes, device=loads.device) * (num_experts // num_nodes)
    position = member.view(num_layers, num_nodes, -1) + first_member[:, None]
    phy2log = expert_at.gather(1, position.view(num_layers, num_replicas))
    logcnt = torch.empty_like(expert_at).scatter_(1, expert_at, count.view(num_layers, num_experts))
    width = int(logcnt.max()) if sync else num_replicas - num_experts + 1
    return phy2log, _invert(phy2log, replica, num_experts, width), logcnt


def _pack_groups_to_nodes(loads: Tensor, num_groups: int, num_nodes: int) -> Tensor:
    """Order the experts by node: [L, E] int64, the expert at every position, node 0's first."""
    num_layers, num_experts = loads.shape
    experts = torch.arange(num_experts, device=loads.device)
    if num_groups == num_nodes:  # a group for each node: packing is the identity
        return experts.repeat(num_layers, 1)
    by_group = loads.view(num_layers, num_groups, -1)
    # One addition at a time: Tensor.sum() picks an order that depends on the machine.
    group_loads = by_group[..., 0].clone()
    for column in by_group.unbind(-1)[1:]:
        group_loads += column
    node, place = _pack(group_loads, num_nodes)
    position = node * (num_groups // num_nodes) + place  # [L, groups]
    group_at = torch.empty_like(position).scatter_(
        1, position, torch.arange(num_groups, device=loads.device).expand_as(position)
    )
    return experts.view(num_groups, -1)[group_at].flatten(1)


def _replicate(loads: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hand out ``num_slots`` slots, one at a time, to the experts whose replicas carry most.

    Args:
        loads: [B, E] float32.
        num_slots: at least E.

    Returns:
        expert [B, num_slots] of each replica, its replica number [B, num_slots] (0 for the first of
        its expert), replicas of each expert [B, E]; int64.
    """
    num_problems, num_experts = loads.shape
    expert = torch.arange(num_experts, device=loads.device).repeat(num_problems, 1)
    count = torch.ones_like(expert)
    share = loads.clone()  # load / count, kept up to date
    chosen, number = [expert], [torch.zeros_like(expert)]
    for _ in range(num_slots - num_experts):
        pick = share.argmax(1, keepdim=True)  # the first of equal ones
        have = count.gather(1, pick)
        chosen.append(pick)
        number.append(have)
        have = have + 1
        count.scatter_(1, pick, have)
        share.scatter_(1, pick, loads.gather(1, pick) / have)
    return torch.cat(chosen, 1), torch.cat(number, 1), count


def _pack(loads: Tensor, num_packs: int) -> tuple[Tensor, Tensor]:
    """Pack n items into packs of equal size: the heaviest first, into the lightest with room.

    Args:
        loads: [B, n] float32, n a multiple of ``num_packs``.

    Returns:
        pack [B, n] and place inside the pack [B, n] (order of arrival) of every item; int64.
    """
    num_problems, num_items = loads.shape
    room = num_items // num_packs
    if room == 1:
        pack = torch.arange(num_packs, device=loads.device).repeat(num_problems, 1)
        return pack, torch.zeros_like(pack)
    sorted_loads, order = loads.sort(dim=1, descending=True, stable=True)
    pack_load = loads.new_zeros(num_problems, num_packs)  # infinite once a pack is full
    pack_size = torch.zeros_like(pack_load, dtype=torch.int64)
    packs, places = [], []
    for item in sorted_loads.unsqueeze(-1).unbind(1):  # [B, 1]
        pack = pack_load.argmin(1, keepdim=True)  # the first of equal ones
        place = pack_size.gather(1, pack)
        packs.append(pack)
        places.append(place)
        place = place + 1
        load = pack_load.gather(1, pack).add_(item)
        pack_size.scatter_(1, pack, place)
        pack_load.scatter_(1, pack, load.masked_fill_(place == room, torch.inf))
    back = torch.empty_like(order)
    return (
        back.scatter(1, order, torch.cat(packs, 1)),
        back.scatter(1, order, torch.cat(places, 1)),
    )


def _invert(phy2log: Tensor, replica: Tensor, num_experts: int, width: int) -> Tensor:
    """log2phy [L, E, width] from the expert and the replica number [L, S] of every slot."""
    num_layers, num_slots = phy2log.shape
    log2phy = phy2log.new_full((num_layers, num_experts * width), -1)
    slots = torch.arange(num_slots, device=phy2log.device).expand(num_layers, -1)
    log2phy.scatter_(1, phy2log * width + replica, slots)
    return log2phy.view(num_layers, num_experts, width)
