"""Ranks agree on what went wrong, wherever each of them is by then."""

from __future__ import annotations

import pytest
import torch

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
