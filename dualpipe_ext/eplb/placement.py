"""A placement: which expert sits in which slot, and what follows from it for tokens and loads.

Here belongs what reads the maps. Making them is ``plan.py``, moving weights is ``migrate.py``.

Shapes: L layers, E logical experts, S slots (physical experts) in all, X most replicas of one
expert, T tokens, K top-k, G GPUs. GPU g holds the S/G slots from ``g * S / G``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dualpipe_ext.eplb.shares import pick_replica, share_phase

# What a slot id becomes when the expert id was none: no model has that many slots, so whoever
# receives it can tell. Small enough for int32.
_NO_SUCH_SLOT = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Expert maps of all layers, as ``rebalance_experts`` returns them: ``Placement(*plan)``.

    Attributes:
        phy2log: [L, S] int64, the expert in every slot.
        log2phy: [L, E, X] int64, the slots of every expert, padded with -1.
        logcnt: [L, E] int64, the number of replicas of every expert.

    Raises:
        ValueError: shapes or dtypes that cannot belong together. The contents are checked by
            :meth:`validate`, which reads them back from their device.
    """

    phy2log: Tensor
    log2phy: Tensor
    logcnt: Tensor

    def __post_init__(self) -> None:
        for name, num_dims in (("phy2log", 2), ("log2phy", 3), ("logcnt", 2)):
            tensor = getattr(self, name)
            if tensor.dtype != torch.int64 or tensor.dim() != num_dims:
                raise ValueError(
                    f"expected {name} as int64 with {num_dims} dimensions, "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
        if self.log2phy.shape[:2] != self.logcnt.shape or len(self.phy2log) != len(self.logcnt):
            raise ValueError(
                f"expected phy2log [L, S], log2phy [L, E, X] and logcnt [L, E], "
                f"got {list(self.phy2log.shape)}, {list(self.log2phy.shape)} "
                f"and {list(self.logcnt.shape)}"
            )

    @classmethod
    def from_phy2log(cls, phy2log: Tensor, num_experts: int) -> Placement:
        """Derive the other two maps; the replicas of an expert are in slot order.

        Args:
            phy2log: [L, S] integers in [0, num_experts).
            num_experts: E. Every expert must have a slot in every layer.

        Raises:
            ValueError: an id out of range, or an expert without a slot.
        """
        if phy2log.dim() != 2 or phy2log.is_floating_point():
            raise ValueError(
                f"expected phy2log as integers [L, S], got {phy2log.dtype} {list(phy2log.shape)}"
            )
        phy2log = phy2log.to(torch.int64)
        _check_ids(phy2log, num_experts)
        logcnt = _count(phy2log, num_experts)
        if bool((logcnt == 0).any()):
            layer, expert = (logcnt == 0).nonzero()[0].tolist()
            raise ValueError(
                f"expected a slot for each of {num_experts} experts, "
                f"got none for expert {expert} in layer {layer}"
            )
        width = int(logcnt.max())
        slots = torch.arange(phy2log.shape[1], device=phy2log.device).expand_as(phy2log)
        cells = phy2log * width + _occurrence(phy2log, num_experts)
        log2phy = phy2log.new_full((len(phy2log), num_experts * width), -1)
        log2phy.scatter_(1, cells, slots)
        return cls(phy2log, log2phy.view(len(phy2log), num_experts, width), logcnt)

    @classmethod
    def identity(
        cls,
        num_layers: int,
        num_experts: int,
        num_slots: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Placement:
        """Slot s holds expert ``s % num_experts``: one replica each, then a second one, and so on.

        Args:
            num_slots: S, by default ``num_experts``.
        """
        num_slots = num_experts if num_slots is None else num_slots
        if num_slots < num_experts:
            raise ValueError(
                f"expected at least as many slots as experts ({num_experts}), got {num_slots}"
            )
        slots = torch.arange(num_slots, device=device) % num_experts
        return cls.from_phy2log(slots.repeat(num_layers, 1), num_experts)

    @property
    def num_layers(self) -> int:
        return self.phy2log.shape[0]

    @property
    def num_experts(self) -> int:
        return self.logcnt.shape[1]

    @property
    def num_slots(self) -> int:
        return self.phy2log.shape[1]

    def to(self, device: torch.device | str) -> Placement:
        """The same placement with its maps on ``device``."""
        return Placement(*(t.to(device) for t in (self.phy2log, self.log2phy, self.logcnt)))

    def validate(self) -> Placement:
        """Check that the three maps say the same; returns self. Waits for the device.

        Raises:
            ValueError: names the first layer and expert whose slots do not agree.
        """
        derived = Placement.from_phy2log(self.phy2log, self.num_experts)
        # The order of replicas is free, their set is not; padding must come last.
        width = max(derived.log2phy.shape[2], self.log2phy.shape[2])
        mine, theirs = (_widen(p.log2phy, width) for p in (self, derived))
        padding = torch.arange(width, device=mine.device) >= derived.logcnt[..., None]
        wrong = (
            (self.logcnt != derived.logcnt)
            | (mine.sort(dim=2).values != theirs.sort(dim=2).values).any(2)
            | ((mine == -1) != padding).any(2)
        )
        if bool(wrong.any()):
            layer, expert = wrong.nonzero()[0].tolist()
            want = [s for s in derived.log2phy[layer, expert].tolist() if s >= 0]
            raise ValueError(
                f"expected log2phy and logcnt to follow from phy2log, which puts expert {expert} "
                f"of layer {layer} into slots {want}; got {self.log2phy[layer, expert].tolist()} "
                f"and a count of {int(self.logcnt[layer, expert])}"
            )
        return self


def select_replicas(
    topk_idx: Tensor,
    log2phy: Tensor,
    logcnt: Tensor,
    *,
    offset: int = 0,
    split: Tensor | None = None,
) -> Tensor:
    """Choose a replica for every (token, expert) pair: expert ids in, slot ids out.

    The n-th use of an expert, counted through ``topk_idx`` in row-major order, goes to its replica
    ``(n + offset) % replicas``. So its replicas differ by at most one token, for any routing, and
    the same input gives the same choice. With a ``split`` replicas take the shares that it gives
    them, as evenly (:func:`~dualpipe_ext.eplb.shares.pick_replica`). Nothing is read back from a
    GPU.

    Args:
        topk_idx: [T, K] integer expert ids, -1 where dropped.
        log2phy: [E, X] int64, one layer of ``Placement.log2phy``.
        logcnt: [E] int64, the same layer of ``Placement.logcnt``.
        offset: where to start; give every rank another one (its rank), or the tokens that do not
            divide evenly all go to the first replicas.
        split: int32 [E, X], one layer of ``ReplicaSplit.shares``; None for equal shares.

    Returns:
        [T, K] of the dtype of ``topk_idx``: slot ids, -1 where ``topk_idx`` is -1. On a GPU, where
        checking would mean waiting, an expert id out of range gives 2^31 - 1, which dispatch
        reports.

    Raises:
        ValueError: wrong shapes, or on the CPU an expert id out of range.
    """
    if log2phy.dim() != 2 or logcnt.shape != log2phy.shape[:1] or topk_idx.dim() != 2:
        raise ValueError(
            f"expected topk_idx [T, K], log2phy [E, X] and logcnt [E] of one layer, "
            f"got {list(topk_idx.shape)}, {list(log2phy.shape)} and {list(logcnt.shape)}"
        )
    if split is not None and (split.shape != log2phy.shape or split.dtype != torch.int32):
        raise ValueError(
            f"expected a split int32 {list(log2phy.shape)}, got {split.dtype} {list(split.shape)}"
        )
    num_experts = log2phy.shape[0]
    if not topk_idx.is_cuda:
        _check_ids(topk_idx, num_experts, lowest=-1)
    expert = topk_idx.flatten().long()
    valid = (expert >= 0) & (expert < num_experts)
    # Ids that are none get a bin of their own behind the experts: they must not advance a count.
    bins = expert.where(valid, num_experts)
    expert = bins.clamp(max=num_experts - 1)
    if log2phy.shape[1] == 1:  # nothing to choose from
        slot = log2phy[expert, 0]
    else:
        nth = _occurrence(bins[None], num_experts + 1)[0]
        if split is None:
            replica = (nth + offset) % logcnt[expert]
        else:
            replica = pick_replica(nth, split[expert], phase=share_phase(offset))
        slot = log2phy[expert, replica]
    dropped = topk_idx.flatten() == -1
    slot = slot.where(valid, _NO_SUCH_SLOT).masked_fill(dropped, -1)
    return slot.view_as(topk_idx).to(topk_idx.dtype)


def gpu_loads(
    loads: Tensor, placement: Placement, num_gpus: int, *, weights: Tensor | None = None
) -> Tensor:
    """Load of every GPU when each expert's load is split over its replicas, evenly or by weights.

    Args:
        loads: [L, E] load of every expert, any real dtype.
        num_gpus: G; S is a multiple of it.
        weights: [L, E, X] of the replicas, 1 in all for an expert (``ReplicaSplit.weights``).

    Returns:
        [L, G] float32.
    """
    if loads.shape != placement.logcnt.shape:
        raise ValueError(
            f"expected loads of shape {list(placement.logcnt.shape)}, got {list(loads.shape)}"
        )
    if num_gpus < 1 or placement.num_slots % num_gpus:
        raise ValueError(
            f"expected num_gpus to divide the {placement.num_slots} slots, got {num_gpus}"
        )
    if weights is None:
        slot_loads = (loads.float() / placement.logcnt).gather(1, placement.phy2log)
    elif weights.shape != placement.log2phy.shape:
        raise ValueError(
            f"expected weights of shape {list(placement.log2phy.shape)}, got {list(weights.shape)}"
        )
    else:
        by_replica = loads.float().unsqueeze(2) * weights
        slot_loads = by_replica.flatten(1).gather(1, slot_cells(placement))
    return slot_loads.view(placement.num_layers, num_gpus, -1).sum(-1)


def slot_cells(placement: Placement) -> Tensor:
    """[L, S] int64: where every slot stands in the flattened [E, X] of ``placement.log2phy``."""
    num_layers, num_experts, width = placement.log2phy.shape
    slots = placement.log2phy.flatten(1)
    # Padding goes to a slot of its own behind the last one.
    slots = slots.where(slots >= 0, placement.num_slots)
    cells = slots.new_zeros(num_layers, placement.num_slots + 1)
    here = torch.arange(num_experts * width, device=slots.device)
    return cells.scatter_(1, slots, here.expand_as(slots))[:, :-1]


def balancedness(
    loads: Tensor, placement: Placement, num_gpus: int, *, weights: Tensor | None = None
) -> Tensor:
    """Mean over maximum GPU load of every layer: 1 is perfect, 1 / G the worst.

    It is the share of its time that a GPU computes while all wait for the slowest.

    Args:
        loads: [L, E] load of every expert.
        num_gpus: G.
        weights: [L, E, X] of the replicas; by default all of an expert's are alike.

    Returns:
        [L] float32; 1 for a layer without any load.
    """
    per_gpu = gpu_loads(loads, placement, num_gpus, weights=weights)
    most = per_gpu.max(1).values
    return torch.where(most > 0, per_gpu.mean(1) / most, 1.0)


def _occurrence(ids: Tensor, num_ids: int) -> Tensor:
    """How often each entry's id came before it in its row: [0, 0, 1, 2] for [5, 3, 5, 5]."""
    order = ids.argsort(dim=1, stable=True)
    end = _count(ids, num_ids).cumsum(1)
    start = torch.cat([torch.zeros_like(end[:, :1]), end[:, :-1]], 1)
    position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    nth = position - start.gather(1, ids.gather(1, order))
    return torch.empty_like(nth).scatter_(1, order, nth)


def _count(ids: Tensor, num_ids: int) -> Tensor:
    """Occurrences of every id in each row. Unlike bincount it needs no host to size its result."""
    counts = torch.zeros(len(ids), num_ids, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(1, ids, torch.ones_like(ids))


def _widen(log2phy: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(log2phy, (0, width - log2phy.shape[2]), value=-1)


def _check_ids(ids: Tensor, num_experts: int, *, lowest: int = 0) -> None:
    if ids.numel() == 0:
        return
    least, most = int(ids.min()), int(ids.max())
    if least < lowest or most >= num_experts:
        raise ValueError(
            f"expected expert ids from {lowest} to {num_experts - 1}, "
            f"got {least if least < lowest else most}"
        )
