"""Numbers that ranks agree on: the largest, and an error that names who did not come."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from dualpipe_ext.agreement import Agreement, largest_of_ranks
from dualpipe_ext.errors import CommTimeoutError, DualPipeError
from dualpipe_ext.launch import run_ranks

NUM_RANKS = 3


def agree_twice() -> list[list[float]]:
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1, 2]), dist.new_group([0, 2])]
    agreements = [Agreement(dist.group.WORLD, 10), Agreement(dist.group.WORLD, 10)]
    found = []
    for turn in range(2):
        for number, agreement in enumerate(agreements):
            found.append(agreement.largest([rank, -rank, turn + 0.5, number]))
    if rank != 1:
        # Only some of the ranks, and by their numbers in the group.
        found.append(Agreement(groups[1], 10).largest([rank]))
    return found


def test_every_rank_gets_the_largest() -> None:
    first, second, third = run_ranks(agree_twice, NUM_RANKS)
    assert first == third
    assert second == first[:4]
    assert first[:4] == [[2, 0, turn + 0.5, n] for turn in range(2) for n in range(2)]
    assert first[4] == [2]


def absent() -> str:
    agreement = Agreement(dist.group.WORLD, 0.5)
    agreement.largest([1.0])
    if dist.get_rank() == 1:
        time.sleep(2)
        return ""
    begin = time.monotonic()
    with pytest.raises(CommTimeoutError) as caught:
        agreement.largest([1.0])
    assert time.monotonic() - begin < 1.5
    return str(caught.value)


class Lost:
    def set(self, key: str, value: str) -> None:
        raise dist.DistNetworkError("connection reset")


def without_a_store() -> str:
    agreement = Agreement(dist.group.WORLD, 5)
    dist.distributed_c10d._get_default_store = Lost
    with pytest.raises(DualPipeError) as caught:
        agreement.largest([1.0])
    return str(caught.value)


def test_a_lost_store_is_told() -> None:
    (text,) = run_ranks(without_a_store, 1)
    assert text == (
        "rank 0, agreement on measured times: lost the store through which ranks meet: "
        "connection reset"
    )


def test_who_does_not_come_is_named() -> None:
    first, _, third = run_ranks(absent, NUM_RANKS)
    for rank, message in ((0, first), (2, third)):
        assert message == (
            f"rank {rank}, agreement on measured times: expected ranks [1] to come within 0.5 s"
        )


def other_number() -> str:
    agreement = Agreement(dist.group.WORLD, 10)
    with pytest.raises(DualPipeError, match="as many measured times on all ranks") as caught:
        agreement.largest([1.0] * (1 + dist.get_rank()))
    return str(caught.value)


def test_other_numbers_of_values() -> None:
    for rank, message in enumerate(run_ranks(other_number, 2)):
        assert message.startswith(f"rank {rank}: ")
        assert message.endswith("got [1, 2]")


def by_collective() -> list[float]:
    return largest_of_ranks(torch.device("cpu"), None, [dist.get_rank(), -dist.get_rank()])


def test_by_a_collective() -> None:
    assert run_ranks(by_collective, 2) == [[1, 0], [1, 0]]
