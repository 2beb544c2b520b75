"""Plans with their reasons: how balanced they are, how balanced they could be, what they cost.

Here belongs what a caller who re-balances a running model needs besides the maps. The maps are made
in ``plan.py`` (DeepSeek's rules) and ``balanced.py``.

Shapes: L layers, E logical experts, S slots in all, G GPUs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from dualpipe_ext.eplb.balanced import Sizes, balanced_phy2log, lowest_load
from dualpipe_ext.eplb.checks import checked_loads, checked_sizes
from dualpipe_ext.eplb.moves import experts_received
from dualpipe_ext.eplb.placement import Placement, balancedness
from dualpipe_ext.eplb.plan import POLICIES, rebalance_experts
from dualpipe_ext.eplb.replicas import normalise, tree_sum


@dataclass(frozen=True, slots=True, eq=False)
class PlacementPlan:
    """A placement and what speaks for it. Balancedness is mean over maximum GPU load.

    Attributes:
        policy: that made it.
        placement: the new maps.
        after: [L] float32 balancedness of every layer under it, for the loads it was made for.
        bound: [L] float32 balancedness that no plan of these sizes exceeds (provable, not always
            within reach).
        before: [L] float32 balancedness of the placement in force, if one was given.
        received: [L, G] int64 experts whose weights each GPU must receive from others, if so.
    """

    policy: str
    placement: Placement
    after: Tensor
    bound: Tensor
    before: Tensor | None = None
    received: Tensor | None = None

    @property
    def gap(self) -> Tensor:
        """[L] how far balancedness is below the bound, as a share of it; 0 is proven optimal."""
        return (1 - self.after / self.bound).clamp(min=0)

    @property
    def moves(self) -> int:
        """Expert weights that cross from one GPU to another, over all layers."""
        return 0 if self.received is None else int(self.received.sum())

    def bytes_received(self, expert_bytes: int) -> Tensor:
        """[G] int64 bytes that each GPU receives.

        Args:
            expert_bytes: of one expert in one layer: weights and optimizer state.
        """
        if self.received is None:
            raise ValueError("expected a plan made with current=..., got one that moves nothing")
        return self.received.sum(0) * expert_bytes


def plan_placement(
    weight: Tensor,
    num_slots: int,
    num_gpus: int,
    *,
    num_groups: int = 1,
    num_nodes: int = 1,
    policy: str = "balanced",
    current: Placement | None = None,
    tolerance: float = 0.02,
) -> PlacementPlan:
    """Plan replicas and their slots; say how good the plan is and what it moves.

    Args:
        weight: [L, E] load of every logical expert (tokens, say), any real dtype, not negative.
        num_slots: S, redundant ones included; a multiple of ``num_gpus``.
        num_gpus: G; slot s lives on GPU ``s // (S / G)``.
        num_groups: expert groups of group-limited routing.
        num_nodes: hosts; where it divides ``num_groups``, each group stays whole on one.
        policy: "balanced", or "reference" for DeepSeek's result.
        current: the placement in force. The balanced policy then moves as few experts as it can.
        tolerance: share of a fresh plan's balancedness that may be given up to move less, in each
            layer. 0 moves less only where it costs nothing. Without ``current`` it has no meaning.

    Raises:
        ValueError: as :func:`~dualpipe_ext.eplb.rebalance_experts`; a ``current`` of other sizes
            or with ids that are no experts; a tolerance outside [0, 1).
    """
    if policy not in POLICIES:
        raise ValueError(f"expected a policy of {', '.join(POLICIES)}, got {policy!r}")
    if not 0.0 <= tolerance < 1.0:
        raise ValueError(f"expected a tolerance of at least 0 and below 1, got {tolerance}")
    loads = checked_loads(weight, sync=True)
    num_experts = loads.shape[1]
    sizes = Sizes(
        num_slots,
        *checked_sizes(num_experts, num_slots, num_groups, num_nodes, num_gpus),
        num_gpus,
    )
    now = None if current is None else _checked_current(current, loads, num_slots)
    if policy == "balanced":
        phy2log = balanced_phy2log(loads, sizes, current=now, tolerance=tolerance)
        placement = Placement.from_phy2log(phy2log, num_experts)
    else:
        placement = Placement(*rebalance_experts(loads, num_slots, num_groups, num_nodes, num_gpus))
    mean = tree_sum(normalise(loads)) / num_gpus
    return PlacementPlan(
        policy=policy,
        placement=placement,
        after=balancedness(loads, placement, num_gpus),
        bound=(mean / lowest_load(loads, sizes)).float().clamp(max=1.0),
        before=None if current is None else balancedness(loads, current, num_gpus),
        received=None if now is None else experts_received(now, placement.phy2log, num_gpus),
    )


def _checked_current(current: Placement, loads: Tensor, num_slots: int) -> Tensor:
    """phy2log of a placement that fits."""
    want = (*loads.shape, num_slots)
    got = (current.num_layers, current.num_experts, current.num_slots)
    if got != want:
        raise ValueError(
            f"expected a current placement of {want[0]} layers, {want[1]} experts and {want[2]} "
            f"slots, got {got[0]}, {got[1]} and {got[2]}"
        )
    current.validate()
    return current.phy2log.to(loads.device)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a plan is worth its moves.

    Attributes:
        saved_s: seconds that it saves over the steps until the next one.
        cost_s: seconds that moving takes.
        steps_to_pay: steps after which it has paid; infinite if it saves nothing.
    """

    saved_s: float
    cost_s: float
    steps_to_pay: float

    @property
    def pays(self) -> bool:
        return self.saved_s > self.cost_s


def should_rebalance(
    plan: PlacementPlan,
    *,
    expert_s: float,
    steps: int,
    expert_bytes: int,
    bytes_per_s: float,
    overhead_s: float = 0.0,
) -> Verdict:
    """Compare the step time that a plan saves with the time that moving takes.

    All GPUs wait for the fullest one, so a layer takes its perfectly balanced time divided by its
    balancedness. Moving takes as long as the GPU that receives most.

    Args:
        plan: made with ``current``.
        expert_s: seconds that a step spends in the experts of all L layers if all are perfectly
            balanced, forward and backward; measured: their time now, times the balancedness now.
        steps: until the next re-balancing; loads are taken to stay as they are.
        expert_bytes: of one expert in one layer: weights and optimizer state.
        bytes_per_s: that a GPU can receive.
        overhead_s: what a migration costs besides, of which nothing is hidden.

    Raises:
        ValueError: a plan made without ``current``, or numbers that are negative or not finite.
    """
    if plan.before is None:
        raise ValueError("expected a plan made with current=..., got one without a before")
    positive = {"expert_s": expert_s, "steps": steps, "bytes_per_s": bytes_per_s}
    for name, value in {**positive, "expert_bytes": expert_bytes, "overhead_s": overhead_s}.items():
        if not math.isfinite(value) or value < 0 or (name in positive and value == 0):
            raise ValueError(f"expected {name} to be finite and positive, got {value}")
    # Layers count alike: each routes the same tokens.
    saved = (1 / plan.before.double() - 1 / plan.after.double()).mean().item() * expert_s
    moved = int(plan.bytes_received(expert_bytes).max())
    cost = moved / bytes_per_s + (overhead_s if moved else 0.0)
    return Verdict(
        saved_s=saved * steps,
        cost_s=cost,
        steps_to_pay=cost / saved if saved > 0 else math.inf,
    )
