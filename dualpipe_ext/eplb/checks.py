"""What planning and moving accept, checked before any work, with one clear line each.

Shapes: L layers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Far from float32's largest number (3.4e38), so that no sum of loads can round up to infinity.
MAX_LAYER_LOAD = 1e38


def float_loads(weight: Tensor) -> Tensor:
    """``weight`` as contiguous float32 [L, E]; its values are not looked at."""
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.numel() == 0:
        got = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"expected weight as a tensor [layers, experts], got {got}")
    if weight.is_complex():
        raise ValueError(f"expected weight of a real dtype, got {weight.dtype}")
    return weight.detach().float().contiguous()


def clamp_limit(num_experts: int) -> float:
    """What larger loads count as where they are clamped: so much of every expert is valid."""
    return MAX_LAYER_LOAD / num_experts


def checked_loads(weight: Tensor, *, sync: bool) -> Tensor:
    """``weight`` as float32, either checked (which waits for the device) or clamped."""
    loads = float_loads(weight)
    if not sync:
        most = clamp_limit(loads.shape[1])
        return loads.nan_to_num(nan=0.0, posinf=most).clamp_(0.0, most)
    # Written so that NaN fails both comparisons; one read back for the two of them.
    valid = torch.stack([loads.min() >= 0, loads.sum(1).max() <= MAX_LAYER_LOAD])
    if not bool(valid.all()):
        bad = ~((loads >= 0) & loads.isfinite())
        if not bool(bad.any()):
            raise ValueError(
                f"expected loads that sum to at most {MAX_LAYER_LOAD:g} in a layer, "
                f"got {float(loads.double().sum(1).max()):g}"
            )
        layer, expert = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"expected loads that are finite in float32 and not negative, "
            f"got {weight[layer, expert].item()} for expert {expert} of layer {layer}"
        )
    return loads


def checked_sizes(
    num_experts: int, num_slots: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[int, int]:
    """The groups and nodes to plan with: (1, 1) where the policy is the global one."""
    sizes = {"num_groups": num_groups, "num_nodes": num_nodes, "num_gpus": num_gpus}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"expected {name} of at least 1, got {size}")
    if num_slots < num_experts:
        raise ValueError(
            f"expected at least as many slots as experts ({num_experts}), "
            f"got num_replicas={num_slots}"
        )
    if num_slots % num_gpus:
        fits = -(-num_slots // num_gpus) * num_gpus
        raise ValueError(
            f"expected num_replicas to be a multiple of num_gpus={num_gpus}, got {num_slots}; "
            f"{fits} would work"
        )
    if num_groups % num_nodes:
        return 1, 1
    if num_experts % num_groups:
        raise ValueError(
            f"expected the number of experts to be a multiple of num_groups={num_groups}, "
            f"got {num_experts}"
        )
    if num_gpus % num_nodes:
        raise ValueError(
            f"expected num_gpus to be a multiple of num_nodes={num_nodes}, got {num_gpus}"
        )
    return num_groups, num_nodes


def check_one_device(what: str, tensors: Sequence[Tensor]) -> None:
    """Refuse ``tensors`` that are not all where the first one is."""
    for tensor in tensors:
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"expected {what} on one device, got {tensors[0].device} and {tensor.device}"
            )


def check_even_slots(num_slots: int, num_ranks: int) -> None:
    """Refuse maps whose slots are none or do not divide over the ranks."""
    if num_slots == 0 or num_slots % num_ranks:
        raise ValueError(
            f"expected maps whose slots divide evenly over {num_ranks} ranks, got {num_slots} slots"
        )
