"""How much of an expert's load each of its replicas should take: a split that need not be even.

Here belongs the splitting of loads over a placement that stays. It evens out what the placement
cannot: replicas and places are whole, and loads drift until they are planned again, while weights
can follow every step, for they only say where a router sends its tokens. Who takes which token is
``shares.py``.

Splitting loads so that the fullest GPU has least is a linear program; peers give it to a solver
(LPLB). Here it is a quadratic one that first-order steps solve for all layers at a time: of all
splits, the one with the least sum of squared GPU loads is also one with the lowest fullest GPU,
since loads that experts can send along their replicas form the base of a polymatroid (Fujishige,
Lexicographically optimal base of a polymatroid with respect to a weight vector, 1980). The steps
are accelerated projected gradients (FISTA; Beck and Teboulle, 2009), started anew where the
momentum leads uphill (O'Donoghue and Candes, 2015), with the projection onto an expert's simplex by
sorting (Duchi et al., 2008).

How good that is, is not taken on trust: experts whose replicas all lie within some set of GPUs put
at least their whole load onto it, so the mean over the set is a bound. The sets tried are the
fullest GPUs, as many as there may be, among which is a tight one once the loads are optimal.

Shapes: L layers, E logical experts, S slots, X most replicas of one expert, G GPUs. Loads are
float32, relative to a layer's mean GPU load.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dualpipe_ext.eplb.checks import checked_loads
from dualpipe_ext.eplb.placement import Placement, gpu_loads, slot_cells
from dualpipe_ext.eplb.shares import to_shares


@dataclass(frozen=True, eq=False)
class ReplicaSplit:
    """Weights of the replicas and how good they are. Balancedness is mean over maximum GPU load.

    Attributes:
        weights: [L, E, X] float32, in the order of ``log2phy``: the part of the expert's load that
            a replica takes; 1 in all for an expert, 0 where there is no replica.
        after: [L] float32 balancedness with these weights; 1 for a layer without load.
        bound: [L] float32 balancedness that no split over this placement exceeds (provable).
    """

    weights: Tensor
    after: Tensor
    bound: Tensor

    @property
    def gap(self) -> Tensor:
        """[L] how far balancedness is below the bound, as a share of it; 0 is proven optimal."""
        return (1 - self.after / self.bound).clamp(min=0)

    @cached_property
    def shares(self) -> Tensor:
        """[L, E, X] int32: what routers and ``select_replicas`` take, a layer at a time."""
        return to_shares(self.weights)


@torch.no_grad()
def split_replicas(
    loads: Tensor, placement: Placement, num_gpus: int, *, iterations: int = 64
) -> ReplicaSplit:
    """Weigh the replicas of every expert so that the fullest GPU of each layer has little load.

    Runs where its tensors are, in torch operations without a wait for a GPU, a fixed number of them
    for all layers together. Never worse than an even split.

    Args:
        loads: [L, E] load of every expert, any real dtype. Loads that are negative or not finite
            are refused on the CPU; on a GPU, where looking would mean waiting, they are clamped.
        placement: valid maps on the device of ``loads``.
        num_gpus: G; S is a multiple of it.
        iterations: steps. With 64 the gap stayed within 2e-3 for loads that had drifted away from
            the plan (``benchmarks/eplb_split.py``).

    Raises:
        ValueError: shapes that do not fit, or loads as said.

    Example: expert 0 with load 6 on both of two GPUs, expert 1 with load 2 on the first only: the
    weights of expert 0 become 1/3 and 2/3, both GPUs have 4, and the bound of 1 is met.
    """
    if iterations < 1:
        raise ValueError(f"expected at least one iteration, got {iterations}")
    gpu_loads(loads, placement, num_gpus)  # checks the sizes
    relative = checked_loads(loads, sync=not loads.is_cuda)
    mean = relative.sum(1, keepdim=True) / num_gpus
    relative = relative / mean.where(mean > 0, 1.0)
    problem = _Problem.of(relative, placement, num_gpus)
    flow = problem.solve(iterations)
    worse = problem.gpu_load(flow).amax(1) > problem.gpu_load(problem.even).amax(1)
    flow = torch.where(worse[:, None, None], problem.even, flow)
    total = flow.sum(2, keepdim=True)
    # Where there is no load any weights do.
    weights = torch.where(total > 0, flow / total.where(total > 0, 1.0), problem.even_weights)
    loaded = mean[:, 0] > 0
    fullest = problem.gpu_load(flow).amax(1)
    return ReplicaSplit(
        weights=weights,
        after=torch.where(loaded, 1 / fullest, 1.0).clamp(max=1.0),
        bound=torch.where(loaded, 1 / problem.lowest_fullest(flow), 1.0).clamp(max=1.0),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """What the steps look at. A flow [L, E, X] is the load that each replica takes.

    Attributes:
        loads: [L, E].
        real: [L, E, X] whether there is such a replica.
        gpu: [L, E, X] int64 the GPU that it is on; 0 where there is none.
        cells: [L, S] int64 the place of every slot in a flattened flow.
        even_weights: [L, E, X].
        step: [L, 1, 1] the longest step that is sure to go downhill.
        num_gpus: G.
    """

    loads: Tensor
    real: Tensor
    gpu: Tensor
    cells: Tensor
    even_weights: Tensor
    step: Tensor
    num_gpus: int

    @classmethod
    def of(cls, loads: Tensor, placement: Placement, num_gpus: int) -> _Problem:
        num_layers, _, width = placement.log2phy.shape
        count = placement.logcnt
        real = torch.arange(width, device=loads.device) < count.unsqueeze(2)
        can_move = (count > 1).gather(1, placement.phy2log).view(num_layers, num_gpus, -1)
        # A GPU's load is the sum of its replicas', so the gradient's Lipschitz constant is the most
        # replicas on a GPU that can change.
        step = 1 / can_move.sum(2).amax(1).clamp(min=1).to(loads.dtype)
        return cls(
            loads=loads,
            real=real,
            gpu=(placement.log2phy // (placement.num_slots // num_gpus)).clamp(min=0),
            cells=slot_cells(placement),
            even_weights=real.to(loads.dtype) / count.unsqueeze(2),
            step=step.view(-1, 1, 1),
            num_gpus=num_gpus,
        )

    @property
    def even(self) -> Tensor:
        return self.loads.unsqueeze(2) * self.even_weights

    def gpu_load(self, flow: Tensor) -> Tensor:
        """[L, G]; by slots and not by adding into GPUs, so that the order of additions is fixed."""
        by_slot = flow.flatten(1).gather(1, self.cells)
        return by_slot.view(len(flow), self.num_gpus, -1).sum(2)

    def solve(self, iterations: int) -> Tensor:
        """The flow with nearly the least sum of squared GPU loads."""
        flow = ahead = self.even
        momentum = torch.ones_like(self.step)
        for _ in range(iterations):
            slope = self.gpu_load(ahead).gather(1, self.gpu.flatten(1)).view_as(ahead)
            new = self._project(ahead - self.step * slope)
            uphill = ((ahead - new) * (new - flow)).sum((1, 2), keepdim=True) > 0
            grown = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
            carry = torch.where(uphill, 0.0, (momentum - 1) / grown)
            momentum = torch.where(uphill, 1.0, grown)
            ahead = new + carry * (new - flow)
            flow = new
        return flow

    def _project(self, flow: Tensor) -> Tensor:
        """The nearest flow that is not negative and sums to the loads."""
        flow = flow.masked_fill(~self.real, -torch.inf)
        highest = flow.sort(2, descending=True).values
        rank = torch.arange(1, flow.shape[2] + 1, device=flow.device)
        # How much all must sink if the first 1, 2, ... are to stay above zero.
        sink = (highest.cumsum(2) - self.loads.unsqueeze(2)) / rank
        stay = (highest > sink).sum(2, keepdim=True).clamp(min=1)
        return (flow - sink.gather(2, stay - 1)).clamp(min=0)

    def lowest_fullest(self, flow: Tensor) -> Tensor:
        """[L] load of the fullest GPU that no split is below."""
        order = self.gpu_load(flow).argsort(dim=1, descending=True, stable=True)
        ranks = torch.arange(self.num_gpus, device=flow.device)
        rank = torch.empty_like(order).scatter_(1, order, ranks.expand_as(order))
        # An expert belongs to the k fullest GPUs once its emptiest one does.
        last = rank.gather(1, self.gpu.flatten(1)).view_as(self.gpu)
        last = last.masked_fill(~self.real, 0).amax(2, keepdim=True)
        inside = (self.loads.unsqueeze(2) * (last <= ranks)).sum(1)  # [L, G]
        return (inside / (ranks + 1)).amax(1)
