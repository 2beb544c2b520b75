"""The reference policy by the CUDA core: one launch, from loads on a GPU to maps on that GPU.

Here belongs when the planner kernel can be used, and how. The rules that it follows are in
``plan.py``, which calls this; how it works is in csrc/eplb/planner.cuh.

Shapes: L layers, E experts, S slots, N nodes, X columns of log2phy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dualpipe_ext import core
from dualpipe_ext.eplb.balanced import Sizes
from dualpipe_ext.eplb.checks import MAX_LAYER_LOAD, checked_loads, clamp_limit

_CAPABILITY = (9, 0)  # the core is built for it alone


@dataclass(frozen=True, slots=True, eq=False)
class DeviceMaps:
    """What the kernel writes, on the device of the loads.

    Attributes:
        phy2log: [L, S] int64, the expert in every slot.
        replica: [L, S] int64, which replica of its expert a slot holds, from 0 in the order made.
        log2phy: [L, E, X] int64, the slots of every expert, -1 beyond; None if no X was given.
        logcnt: [L, E] int64, the replicas of every expert.
        status: [L, N] int32, the most replicas of an expert of the node; its negative if a load
            was negative, NaN, or larger than the launch was told to expect.
    """

    phy2log: Tensor
    replica: Tensor
    log2phy: Tensor | None
    logcnt: Tensor
    status: Tensor


def usable(device: torch.device, num_experts: int, sizes: Sizes) -> bool:
    """Whether the kernel can plan this: a Hopper GPU, a core, and sizes within its limits."""
    if device.type != "cuda" or not core.available():
        return False
    c = core.module()
    return (
        num_experts <= c.MAX_PLANNER_EXPERTS
        and sizes.num_slots <= c.MAX_PLANNER_SLOTS
        and sizes.num_gpus <= c.MAX_PLANNER_GPUS
        and torch.cuda.get_device_capability(device) == _CAPABILITY
    )


def plan_clamped(loads: Tensor, sizes: Sizes, width: int) -> DeviceMaps:
    """Plan without reading anything back; can be captured into a CUDA graph.

    Loads that are NaN or negative count as 0, those above ``clamp_limit(E)`` as that: what
    ``checked_loads(sync=False)`` makes of them.

    Args:
        loads: [L, E] contiguous float32 on a GPU.
        sizes: checked to fit.
        width: X; replicas beyond it are left out of log2phy.
    """
    limit = clamp_limit(loads.shape[1])
    return _launch(loads, sizes, width=width, max_load=limit, suspect_load=limit)


def plan_checked(weight: Tensor, loads: Tensor, sizes: Sizes) -> tuple[DeviceMaps, int]:
    """Plan without log2phy; then wait, refuse bad loads, and say how wide log2phy must be.

    Args:
        weight: [L, E] as the caller gave it, for the message.
        loads: the same as contiguous float32.
        sizes: checked to fit.

    Raises:
        ValueError: as ``checked_loads``.
    """
    # No load below half of an even share of the limit can make its layer exceed it, whatever the
    # order of additions; anything else is looked at by the checks proper. Valid loads are below
    # the clamp, so that planning them first does no harm.
    suspect = clamp_limit(loads.shape[1]) / 2
    maps = _launch(loads, sizes, width=None, max_load=MAX_LAYER_LOAD, suspect_load=suspect)
    status = maps.status.cpu()
    if bool((status < 0).any()):
        checked_loads(weight, sync=True)
    return maps, int(status.abs().max())


def _launch(
    loads: Tensor, sizes: Sizes, *, width: int | None, max_load: float, suspect_load: float
) -> DeviceMaps:
    num_layers, num_experts = loads.shape

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=loads.device)

    maps = DeviceMaps(
        phy2log=empty(num_layers, sizes.num_slots),
        replica=empty(num_layers, sizes.num_slots),
        log2phy=None if width is None else empty(num_layers, num_experts, width),
        logcnt=empty(num_layers, num_experts),
        status=empty(num_layers, sizes.num_nodes, dtype=torch.int32),
    )
    c = core.module()
    with torch.cuda.device(loads.device):
        c.plan_experts(
            c.PlannerSizes(
                num_layers=num_layers,
                num_experts=num_experts,
                num_slots=sizes.num_slots,
                num_groups=sizes.num_groups,
                num_nodes=sizes.num_nodes,
                num_gpus=sizes.num_gpus,
            ),
            loads=loads.data_ptr(),
            phy2log=maps.phy2log.data_ptr(),
            replica=maps.replica.data_ptr(),
            log2phy=0 if maps.log2phy is None else maps.log2phy.data_ptr(),
            logcnt=maps.logcnt.data_ptr(),
            status=maps.status.data_ptr(),
            width=width or 0,
            max_load=max_load,
            suspect_load=suspect_load,
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return maps
