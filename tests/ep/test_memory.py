"""Meetings of ranks that come late, leave and try again; without any memory or GPU."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from dualpipe_ext.ep import memory
from dualpipe_ext.ep.local_ranks import LocalRanks
from dualpipe_ext.ep.transport import Ranks
from dualpipe_ext.errors import CommTimeoutError, DualPipeError
from dualpipe_ext.launch import run_ranks

LONG_S, SHORT_S = 60.0, 1.0


def place(timeout_s: float, group: dist.ProcessGroup | None = None) -> Ranks:
    group = group or dist.group.WORLD
    return Ranks(group=group, rank=group.rank(), num_ranks=group.size(), timeout_s=timeout_s)


def default_store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def meets_all(name: str) -> None:
    """A meeting after which all ranks have come to this one, not to one before."""
    config, store = place(LONG_S), default_store()
    came = [f"{name} of {rank}" for rank in range(config.num_ranks)]
    store.set(came[config.rank], "")
    memory.meet(config)
    assert store.check(came)


def other_store(kind: str) -> object:
    """Around a check: the same with a store of that kind, which all ranks share."""
    if kind == "file":
        return nullcontext()
    first, port = dist.get_rank() == 0, [None]
    if first:
        served = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = [served.port]
    dist.broadcast_object_list(port)
    store = served if first else dist.TCPStore("127.0.0.1", port[0])
    return patch.object(dist.distributed_c10d, "_get_default_store", lambda: store)


def one_is_late(kind: str) -> tuple[str, str]:
    """The last rank comes when the first has left; then all try again."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    told = []
    with other_store(kind):
        store = default_store()
        meets_all("begin")
        for turn in range(2):
            left = f"left {turn}"
            if rank == last:
                store.wait([left])
            with pytest.raises(CommTimeoutError) as caught:
                memory.meet(place(LONG_S if rank else SHORT_S))
            if rank == 0:
                store.set(left, "")
            told.append(str(caught.value))
            meets_all(f"again {turn}")
            meets_all(f"and on {turn}")
        dist.barrier()  # the store goes with the first rank
    return told[0], told[1]


@pytest.mark.parametrize("kind", ["file", "tcp"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_meeting_that_failed_has_failed_everywhere_and_the_next_is_right(
    kind: str, num_ranks: int
) -> None:
    found = run_ranks(one_is_late, num_ranks, kind, backend="gloo", run_timeout_s=LONG_S)
    message = f"rank 0, meeting of the ranks: expected ranks [{num_ranks - 1}] to come within 1 s"
    assert found == [(message, message)] * num_ranks


def hardly_in_time() -> list[bool]:
    """Which of many meetings were held, whose ranks wait about as long as others are late."""
    delays, held = random.Random(dist.get_rank()), []
    with other_store("tcp"):
        for turn in range(60):
            time.sleep(delays.uniform(0, 0.015))
            try:
                memory.meet(place(0.01))
                held.append(True)
            except CommTimeoutError:
                held.append(False)
            meets_all(f"after {turn}")
        dist.barrier()
    return held


def test_all_ranks_know_the_same_end_of_every_meeting() -> None:
    first, *others = run_ranks(hardly_in_time, 3, backend="gloo", run_timeout_s=120)
    assert others == [first] * 2


class Lost:
    def __getattr__(self, name: str) -> Callable[..., None]:
        def lost(*_: object) -> None:
            raise dist.DistNetworkError("connection reset")

        return lost


def without_a_store() -> str:
    config = place(LONG_S)
    with (
        patch.object(dist.distributed_c10d, "_get_default_store", Lost),
        pytest.raises(DualPipeError) as caught,
    ):
        memory.meet(config)
    dist.barrier()
    return str(caught.value)


def test_a_lost_store_is_told() -> None:
    for rank, text in enumerate(run_ranks(without_a_store, 2, backend="gloo")):
        assert text == (
            f"rank {rank}, meeting of the ranks: lost the store through which they meet: "
            "connection reset"
        )


def in_two_worlds(folder: Path) -> list[str | None]:
    """A group of each, which get the same name; one rank is in both."""
    rank, names = dist.get_rank(), []
    for world, members in enumerate(([0, 1], [0, 2])):
        if world:
            dist.barrier()
            dist.destroy_process_group()
            there = {"init_method": f"file://{folder / 'again'}", "rank": rank, "world_size": 3}
            dist.init_process_group("gloo", **there)
        group = dist.new_group(members)
        if rank in members:
            memory.meet(place(20.0, group))
        names.append(group.group_name if rank in members else None)
    dist.barrier()
    return names


def test_a_group_of_another_world_may_have_the_same_name(tmp_path: Path) -> None:
    names = run_ranks(in_two_worlds, 3, tmp_path, backend="gloo", run_timeout_s=60)
    assert names[0][0] == names[0][1] == names[2][1]


def test_virtual_ranks_meet_and_gather() -> None:
    def program(member):
        config = Ranks(group=None, rank=member.rank, num_ranks=3, timeout_s=5, local=member)
        memory.meet(config)
        return config.gather(10 * member.rank)

    assert LocalRanks(3).run(program) == [[0, 10, 20]] * 3


def test_a_rank_alone_waits_for_nobody() -> None:
    alone = Ranks(group=None, rank=0, num_ranks=1, timeout_s=5)
    memory.meet(alone)
    assert alone.gather("x") == ["x"]
