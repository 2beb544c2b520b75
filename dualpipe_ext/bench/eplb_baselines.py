"""What the planner kernel is measured against: the same rules on the CPU, in two ways.

Both give the maps of ``rebalance_experts`` bit for bit (its file has the rules), from and to NumPy
arrays: one a round of the rules at a time for all layers and nodes together, one layer after the
other with lists and loops, as the rules read.

Shapes: L layers, E experts, S slots, X most replicas of an expert, B = L x N problems: a layer's
share of one node.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray
Maps = tuple[Array, Array, Array]


def plan_with_numpy(
    weight: Array, num_slots: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Maps:
    """All layers and nodes together; as many NumPy calls as rounds.

    Args:
        weight: [L, E] loads, not negative.
        num_slots, num_groups, num_nodes, num_gpus: as ``rebalance_experts`` takes them; checked
            there.

    Returns:
        phy2log [L, S], log2phy [L, E, X], logcnt [L, E], int64.
    """
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    loads = np.ascontiguousarray(weight, dtype=np.float32)
    num_layers, num_experts = loads.shape
    expert_at = _groups_to_nodes(loads, num_groups, num_nodes)
    inside = np.take_along_axis(loads, expert_at, 1).reshape(num_layers * num_nodes, -1)
    member, number, count = _replicate(inside, num_slots // num_nodes)
    shares = np.take_along_axis(inside / count.astype(np.float32), member, 1)
    slot = _pack(shares, num_gpus // num_nodes)

    first_slot = np.tile(np.arange(num_nodes), num_layers)[:, None] * (num_slots // num_nodes)
    first_member = np.tile(np.arange(num_nodes), num_layers)[:, None] * inside.shape[1]
    slot = (slot + first_slot).reshape(num_layers, num_slots)
    expert = np.take_along_axis(expert_at, (member + first_member).reshape(num_layers, -1), 1)
    number = number.reshape(num_layers, num_slots)
    rows = np.arange(num_layers)[:, None]
    phy2log = np.empty((num_layers, num_slots), dtype=np.int64)
    phy2log[rows, slot] = expert
    logcnt = np.empty((num_layers, num_experts), dtype=np.int64)
    logcnt[rows, expert_at] = count.reshape(num_layers, num_experts)
    log2phy = np.full((num_layers, num_experts, int(count.max())), -1, dtype=np.int64)
    log2phy[rows, expert, number] = slot
    return phy2log, log2phy, logcnt


def _groups_to_nodes(loads: Array, num_groups: int, num_nodes: int) -> Array:
    """[L, E] the experts of node 0, of node 1, and so on."""
    num_layers, num_experts = loads.shape
    experts = np.arange(num_experts)
    if num_groups == num_nodes:
        return np.tile(experts, (num_layers, 1))
    by_group = loads.reshape(num_layers, num_groups, -1)
    sums = by_group[..., 0].copy()
    for i in range(1, by_group.shape[2]):
        sums += by_group[..., i]
    group_at = np.empty((num_layers, num_groups), dtype=np.int64)
    np.put_along_axis(group_at, _pack(sums, num_nodes), np.arange(num_groups)[None], 1)
    return experts.reshape(num_groups, -1)[group_at].reshape(num_layers, num_experts)


def _replicate(loads: Array, num_slots: int) -> tuple[Array, Array, Array]:
    """Expert and replica number of every item, [B, num_slots], and the replicas [B, E]."""
    num_problems, num_experts = loads.shape
    member = np.empty((num_problems, num_slots), dtype=np.int64)
    number = np.zeros_like(member)
    member[:, :num_experts] = np.arange(num_experts)
    count = np.ones((num_problems, num_experts), dtype=np.int64)
    share = loads.copy()
    # Cells of the flattened arrays: taking and putting by them is what NumPy does fastest.
    first_cell = np.arange(num_problems) * num_experts
    flat_share, flat_count, flat_loads = share.ravel(), count.ravel(), loads.ravel()
    for item in range(num_experts, num_slots):
        pick = share.argmax(1)
        cell = first_cell + pick
        have = flat_count[cell]
        member[:, item] = pick
        number[:, item] = have
        have += 1
        flat_count[cell] = have
        flat_share[cell] = flat_loads[cell] / have.astype(np.float32)
    return member, number, count


def _pack(loads: Array, num_packs: int) -> Array:
    """[B, n]: pack * room + order of arrival of every item."""
    num_problems, num_items = loads.shape
    room = num_items // num_packs
    if room == 1:
        return np.tile(np.arange(num_items), (num_problems, 1))
    order = np.argsort(-loads, axis=1, kind="stable")
    by_round = np.ascontiguousarray(np.take_along_axis(loads, order, 1).T)
    pack_load = np.zeros((num_problems, num_packs), dtype=np.float32)
    size = np.zeros(num_problems * num_packs, dtype=np.int64)
    flat_load = pack_load.ravel()
    first_cell = np.arange(num_problems) * num_packs
    places = np.empty((num_items, num_problems), dtype=np.int64)
    for item, item_load in enumerate(by_round):
        pack = pack_load.argmin(1)
        cell = first_cell + pack
        place = size[cell]
        places[item] = pack * room + place
        place += 1
        size[cell] = place
        flat_load[cell] = np.where(place == room, np.inf, flat_load[cell] + item_load)
    result = np.empty_like(order)
    np.put_along_axis(result, order, places.T, 1)
    return result


def plan_one_by_one(
    weight: Array, num_slots: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Maps:
    """One layer after the other, one decision after the other; as ``plan_with_numpy``."""
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    num_layers, num_experts = weight.shape
    phy2log = np.empty((num_layers, num_slots), dtype=np.int64)
    slots_of: list[list[dict[int, int]]] = []
    for layer, loads in enumerate(np.asarray(weight, dtype=np.float32).tolist()):
        slots: list[dict[int, int]] = [{} for _ in loads]
        first_slot = 0
        for experts in _experts_of_nodes(loads, num_groups, num_nodes):
            items = _replicas([loads[e] for e in experts], num_slots // num_nodes)
            count = [0] * len(experts)
            for member, _ in items:
                count[member] += 1
            shares = [_float32(loads[experts[m]] / count[m]) for m, _ in items]
            places = _places(shares, num_gpus // num_nodes)
            for (member, number), place in zip(items, places, strict=True):
                phy2log[layer, first_slot + place] = experts[member]
                slots[experts[member]][number] = first_slot + place
            first_slot += len(items)
        slots_of.append(slots)
    logcnt = np.array([[len(s) for s in slots] for slots in slots_of], dtype=np.int64)
    log2phy = np.full((num_layers, num_experts, int(logcnt.max())), -1, dtype=np.int64)
    for layer, slots in enumerate(slots_of):
        for expert, by_number in enumerate(slots):
            for number, slot in by_number.items():
                log2phy[layer, expert, number] = slot
    return phy2log, log2phy, logcnt


def _float32(value: float) -> float:
    """Rounded once more. Sums and quotients of two float32 lose nothing by having been float64."""
    return float(np.float32(value))


def _experts_of_nodes(loads: list[float], num_groups: int, num_nodes: int) -> list[list[int]]:
    size = len(loads) // num_groups
    sums = []
    for group in range(num_groups):
        total = loads[group * size]
        for load in loads[group * size + 1 : (group + 1) * size]:
            total = _float32(total + load)
        sums.append(total)
    group_at = [0] * num_groups
    for group, place in enumerate(_places(sums, num_nodes)):
        group_at[place] = group
    experts = [e for group in group_at for e in range(group * size, (group + 1) * size)]
    per_node = len(loads) // num_nodes
    return [experts[i : i + per_node] for i in range(0, len(experts), per_node)]


def _replicas(loads: list[float], num_items: int) -> list[tuple[int, int]]:
    """(expert, number) of every item in the order in which they are made."""
    items = [(member, 0) for member in range(len(loads))]
    share, count = list(loads), [1] * len(loads)
    while len(items) < num_items:
        member = share.index(max(share))
        items.append((member, count[member]))
        count[member] += 1
        share[member] = _float32(loads[member] / count[member])
    return items


def _places(loads: list[float], num_packs: int) -> list[int]:
    """pack * room + order of arrival of every item."""
    room = len(loads) // num_packs
    if room == 1:
        return list(range(num_packs))
    pack_load, size = [0.0] * num_packs, [0] * num_packs
    places = [0] * len(loads)
    # Stable in both directions: what ties stays in order.
    for item in sorted(range(len(loads)), key=loads.__getitem__, reverse=True):
        pack = pack_load.index(min(pack_load))
        places[item] = pack * room + size[pack]
        size[pack] += 1
        full = size[pack] == room
        pack_load[pack] = float("inf") if full else _float32(pack_load[pack] + loads[item])
    return places
