"""What ranks tell each other through the host, such as numbers that they measure and use alike."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence

import torch
import torch.distributed as dist

from dualpipe_ext.errors import CommTimeoutError, DualPipeError


def group_size_and_rank(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Number of ranks, and which of them this is; None for the world, (1, 0) where there is none.

    Raises:
        ValueError: this rank is not in the group.
    """
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return 1, 0
    rank = dist.get_rank(group)
    if rank < 0:  # new_group gives something even to those whom it leaves out
        raise ValueError(
            f"expected a group that this rank is in, got one without rank {dist.get_rank()}"
        )
    return dist.get_world_size(group), rank


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
    key: str,
    group: dist.ProcessGroup,
    text: str,
    *,
    timeout_s: float,
    what: str,
    ranks: Sequence[int] | None = None,
) -> list[str]:
    """Every rank's text, in the order of ``ranks``; the host waits for them.

    The store needs no GPU, has a time-out of its own, and knows nothing of what the group
    communicates meanwhile.

    Args:
        key: the same on all ranks of the group, and used once.
        timeout_s: longest wait, in seconds.
        what: for the error message, what the ranks come for.
        ranks: of the group, those that take part, this one among them; by default all.

    Raises:
        CommTimeoutError: some ranks did not come; they are named.
        DualPipeError: the store is lost, with the process that holds it.
    """
    store = dist.distributed_c10d._get_default_store()
    rank = dist.get_rank(group)
    keys = {one: _key(group, key, one) for one in (ranks or range(group.size()))}
    try:
        store.set(keys[rank], text)
        if not _come(store, list(keys.values()), timeout_s):
            raise CommTimeoutError(_late(rank, what, _absent(store, keys), timeout_s))
        return [store.get(name).decode() for name in keys.values()]
    except dist.DistNetworkError as error:
        raise DualPipeError(
            f"rank {rank}, {what}: lost the store through which ranks meet: {error}"
        ) from error


def meet_through_store(group: dist.ProcessGroup, *, timeout_s: float, what: str) -> str | None:
    """Wait on the host for all ranks of a group, with one end for all of them.

    That a rank has come says nothing for itself: it may have left since. So the end is a key that
    is written once, by whoever sees that all are here or is the first to leave. What has failed has
    failed on every rank, also on those that come later, and they can meet again.

    Returns:
        None, or what the first rank that left says of those that had not come.

    Raises:
        torch.distributed.DistNetworkError: the store is lost.
    """
    store = dist.distributed_c10d._get_default_store()
    rank = dist.get_rank(group)
    # Those that failed too: all ranks of a group count alike.
    key = f"meeting {_count(group, 'meetings')}"
    came = {one: _key(group, key, one) for one in range(group.size())}
    end = _key(group, key, "end")
    store.set(came[rank], "")
    if not store.check(list(came.values())) and _come(store, [end], timeout_s):
        said = store.get(end)
    else:
        absent = _absent(store, came)
        late = _late(rank, what, absent, timeout_s) if absent else _MET
        said = store.compare_set(end, "", late)
    return None if said.decode() == _MET else said.decode()


_MET = "met"


def _come(store: dist.Store, keys: list[str], timeout_s: float) -> bool:
    """Whether all of the keys are written in time."""
    try:
        store.wait(keys, datetime.timedelta(seconds=timeout_s))
    except dist.DistNetworkError:
        raise
    except RuntimeError:  # what a time-out is depends on the kind of store
        return False
    return True


def _absent(store: dist.Store, keys: dict[int, str]) -> list[int]:
    return [rank for rank, name in keys.items() if not store.check([name])]


def _late(rank: int, what: str, absent: list[int], timeout_s: float) -> str:
    return f"rank {rank}, {what}: expected ranks {absent} to come within {timeout_s:g} s"


def _key(group: dist.ProcessGroup, key: str, rank: int | str) -> str:
    return f"dualpipe/{group.group_name}/{key}/{rank}"


def _count(group: dist.ProcessGroup, what: str) -> int:
    """How often this rank of the group has counted so far. In the store: a group of the next one
    may have the name of a group of this one."""
    store = dist.distributed_c10d._get_default_store()
    return store.add(_key(group, what, dist.get_rank(group)), 1)


class Meetings:
    """Ranks that meet through the store, the host waiting for the others, again and again.

    Args:
        name: the same on these ranks, and no others'.
        group: of ranks.
        timeout_s: longest wait, in seconds.
        what: for the error message, what they come for.
        ranks: of the group, those that meet, this one among them; by default all.

    Attributes:
        place: of this rank among them.
    """

    def __init__(
        self,
        name: str,
        group: dist.ProcessGroup,
        timeout_s: float,
        what: str,
        ranks: Sequence[int] | None = None,
    ) -> None:
        self._name, self._group = name, group
        self._ranks = list(ranks or range(group.size()))
        self.place = self._ranks.index(dist.get_rank(group))
        self._timeout_s, self._what = timeout_s, what
        self._calls = 0

    def gather(self, text: str) -> list[str]:
        """Every rank's text, in the order of ``ranks``.

        Raises:
            CommTimeoutError: some ranks did not come; they are named.
            DualPipeError: the store is lost.
        """
        found = gather_through_store(
            f"{self._name}/{self._calls}",
            self._group,
            text,
            timeout_s=self._timeout_s,
            what=self._what,
            ranks=self._ranks,
        )
        if self._calls:
            # All have come, so all have read what this rank said the last time.
            before = f"{self._name}/{self._calls - 1}"
            store = dist.distributed_c10d._get_default_store()
            store.delete_key(_key(self._group, before, dist.get_rank(self._group)))
        self._calls += 1
        return found


class Agreement:
    """Makes numbers that ranks have measured those of the slowest, in the middle of a step.

    Through the store: a collective of the group could meet another one there, and would end with
    the process if a rank has failed. Made on all ranks of the group in the same order.

    Args:
        group: the ranks.
        timeout_s: longest wait for them, in seconds.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float) -> None:
        self._group = group
        # All ranks of a group make as many.
        name = f"agreement {_count(group, 'agreements')}"
        self._meetings = Meetings(name, group, timeout_s, "agreement on measured times")

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of all ranks for each of ``values``.

        Raises:
            CommTimeoutError: a rank did not come; it is named.
            DualPipeError: another rank has another number of values.
        """
        rows = [json.loads(text) for text in self._meetings.gather(json.dumps(list(values)))]
        if len({len(row) for row in rows}) != 1:
            raise DualPipeError(
                f"rank {dist.get_rank(self._group)}: expected as many measured times on all ranks, "
                f"got {[len(row) for row in rows]}"
            )
        return [max(column) for column in zip(*rows, strict=True)]
