"""Numbers that ranks measure for themselves and then use alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def largest_of_ranks(
    device: torch.device, group: dist.ProcessGroup | None, values: Sequence[float]
) -> list[float]:
    """The largest of all ranks for each of ``values``; collective, and the host waits for it.

    Args:
        device: for the exchange.
        group: the ranks; None for the world.
        values: as many on every rank.
    """
    found = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return found.tolist()
