"""Ranks agree on what went wrong, wherever each of them is by then."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from dualpipe_ext import launch
from dualpipe_ext.bench.ranks import ProblemError, Ranks, start


def meet(ranks: Ranks, failing: int | None) -> list[str]:
    """What each of several ways to fail ends with, and that the ranks are in step afterwards."""

    def at_the_end() -> int:
        ranks.maxima([1.0])
        if ranks.rank == failing:
            raise ValueError("too\n many")
        return 7

    def before_the_others_meet() -> int:
        if ranks.rank == failing:
            raise RuntimeError("x")
        ranks.maxima([1.0])
        ranks.gather_object(None)
        return 7

    def nested() -> int:
        return ranks.together(before_the_others_meet)

    def before_the_others_wait() -> int:
        if ranks.rank == failing:
            raise RuntimeError("x")
        ranks.barrier()
        return 7

    def before_tensors_are_gathered() -> int:
        if ranks.rank == failing:
            raise RuntimeError("x")
        ranks.gather(torch.ones(3))
        return 7

    found = []
    for step in (
        at_the_end,
        before_the_others_meet,
        nested,
        before_the_others_wait,
        before_tensors_are_gathered,
    ):
        try:
            found.append(str(ranks.together(step)))
        except ProblemError as problem:
            found.append(str(problem))
        assert ranks.gather_object(ranks.rank) == list(range(ranks.num_ranks))
    return [*found, str(ranks.maxima([float(ranks.rank)])[0])]


@pytest.mark.parametrize("virtual", [False, True])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_problem_of_one_rank_is_everyones(failing: int, virtual: bool) -> None:
    # Rank 0 tells: of itself, and of what it has learnt from another.
    assert start(meet, 2, failing, virtual=virtual, device_type="cpu") == [
        f"rank {failing}: too many",
        *[f"rank {failing}: RuntimeError: x"] * 4,
        "1.0",
    ]


def test_no_problem() -> None:
    assert start(meet, 2, None, virtual=False, device_type="cpu") == [*["7"] * 5, "1.0"]


def flavour(ranks: Ranks) -> list[str | None]:
    return ranks.gather_object(os.environ.get("DUALPIPE_TEST_FLAVOUR"))


@pytest.mark.parametrize("virtual", [False, True])
def test_ranks_have_the_environment_that_is_given(
    virtual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUALPIPE_TEST_FLAVOUR", "mint")
    given = {"DUALPIPE_TEST_FLAVOUR": "lime"}
    run = {"virtual": virtual, "device_type": "cpu", "environment": given}
    assert start(flavour, 2, **run) == ["lime", "lime"]
    assert os.environ["DUALPIPE_TEST_FLAVOUR"] == ("lime" if virtual else "mint")


def test_ranks_of_torchrun_have_it_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALPIPE_TEST_FLAVOUR", "mint")
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    join, seen = launch.init_from_env, []

    def joined(**options: Any) -> None:
        seen.append(os.environ["DUALPIPE_TEST_FLAVOUR"])
        join(**options)

    monkeypatch.setattr(launch, "init_from_env", joined)
    given = {"DUALPIPE_TEST_FLAVOUR": "lime"}
    found = start(flavour, 1, virtual=False, device_type="cpu", environment=given)
    assert seen == found == ["lime"]
