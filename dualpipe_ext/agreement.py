"""Numbers that ranks measure for themselves and then use alike."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence

import torch
import torch.distributed as dist

from dualpipe_ext.errors import CommTimeoutError, DualPipeError


def largest_of_ranks(
    device: torch.device, group: dist.ProcessGroup | None, values: Sequence[float]
) -> list[float]:
    """The largest of all ranks for each of ``values``; a collective, and the host waits for it.

    Args:
        device: for the exchange.
        group: the ranks; None for the world.
        values: as many on every rank.
    """
    found = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return found.tolist()


def gather_through_store(
    key: str, group: dist.ProcessGroup, text: str, *, timeout_s: float, what: str
) -> list[str]:
    """Every rank's text, by rank in the group; the host waits for them.

    The store needs no GPU, has a time-out of its own, and knows nothing of what the group
    communicates meanwhile.

    Args:
        key: the same on all ranks of the group, and used once.
        timeout_s: longest wait, in seconds.
        what: for the error message, what the ranks come for.

    Raises:
        CommTimeoutError: some ranks did not come; they are named.
    """
    store = dist.distributed_c10d._get_default_store()
    rank = dist.get_rank(group)
    keys = [f"dualpipe/{group.group_name}/{key}/{one}" for one in range(group.size())]
    store.set(keys[rank], text)
    try:
        store.wait(keys, datetime.timedelta(seconds=timeout_s))
    except RuntimeError:  # dist.DistStoreError
        absent = [one for one, name in enumerate(keys) if not store.check([name])]
        raise CommTimeoutError(
            f"rank {rank}, {what}: expected ranks {absent} to come within {timeout_s:g} s"
        ) from None
    return [store.get(name).decode() for name in keys]


class Agreement:
    """Makes numbers that ranks have measured those of the slowest, in the middle of a step.

    Through the store: a collective of the group could meet another one there, and would end with
    the process if a rank has failed. Made on all ranks of the group in the same order.

    Args:
        group: the ranks.
        timeout_s: longest wait for them, in seconds.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float) -> None:
        self._group, self._timeout_s = group, timeout_s
        self._ordinal = _made[group.group_name] = _made.get(group.group_name, -1) + 1
        self._calls = 0

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of all ranks for each of ``values``.

        Raises:
            CommTimeoutError: a rank did not come; it is named.
            DualPipeError: another rank has another number of values.
        """
        key = f"agreement {self._ordinal}/{self._calls}"
        self._calls += 1
        found = gather_through_store(
            key,
            self._group,
            json.dumps(list(values)),
            timeout_s=self._timeout_s,
            what="agreement on measured times",
        )
        rows = [json.loads(text) for text in found]
        if len({len(row) for row in rows}) != 1:
            raise DualPipeError(
                f"rank {dist.get_rank(self._group)}: expected as many measured times on all ranks, "
                f"got {[len(row) for row in rows]}"
            )
        return [max(column) for column in zip(*rows, strict=True)]


# Agreements of each group so far, less one: every rank of it counts alike.
_made: dict[str, int] = {}
