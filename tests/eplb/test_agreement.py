"""All go on or all raise. What this means for tensors is tested in test_migrate.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from dualpipe_ext.eplb.agreement import Agreement
from dualpipe_ext.launch import run_ranks


def test_alone_it_only_runs_the_steps() -> None:
    agreement = Agreement("a test", None, 1.0)
    done: list[str] = []
    assert agreement.prepare(lambda: ("ready", {"x": 1})) == "ready"
    agreement.act(lambda: done.append("acted"))
    agreement.confirm()
    assert done == ["acted"]
    with pytest.raises(ValueError, match="rank 0: expected"):
        agreement.prepare(lambda: _raise("expected something else"))


def _raise(text: str) -> tuple[None, dict[str, object]]:
    raise ValueError(text)


def collect_errors() -> list[str]:
    rank = dist.get_rank()
    agreement = Agreement("a test", None, 20.0)
    same = {"maps": (1, 2), "layout": "float32"}
    attempts = [
        lambda: ("fine", same),
        lambda: _raise("expected\n  less") if rank == 1 else ("fine", same),
        lambda: _raise(f"expected {rank}"),  # the lowest rank speaks for all
        lambda: ("fine", same if rank == 0 else {**same, "layout": "float64"}),
        lambda: _raise("\N{EURO SIGN}" * 1000) if rank == 0 else ("fine", same),
    ]

    def outcome(attempt: Callable[[], tuple[Any, dict[str, object]]]) -> str:
        try:
            return agreement.prepare(attempt)
        except ValueError as error:
            return str(error)

    return [outcome(attempt) for attempt in attempts]


def test_every_rank_comes_to_the_same_end() -> None:
    first, second = run_ranks(collect_errors, 2, run_timeout_s=60)
    assert first == second
    assert first[:4] == [
        "fine",
        "rank 1: expected less",
        "rank 0: expected 0",
        "expected the same layout on all ranks, got ranks [1] to differ from rank 0",
    ]
    assert first[4].startswith("rank 0: " + "\N{EURO SIGN}" * 100)  # cut, and still text
