"""Ranks that do not ask for the same transport: all are told at once, and nobody waits."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from dualpipe_ext.ep import Buffer
from dualpipe_ext.ep.local_ranks import LocalRanks
from dualpipe_ext.launch import run_ranks
from tests.ep.test_switching import played

CONFIG = {"hidden": 8, "num_experts": 6, "top_k": 2, "max_tokens": 4}
SAME = "expected the same transport on all ranks, and num_sms=0 on all or on none, got "
# Longer than it takes to tell, much shorter than the group's own time-out.
SOON_S = 20.0


def told(options: Sequence[Mapping[str, Any]], variables: Sequence[str]) -> str:
    """What a rank is told of its buffer."""
    rank, begin = dist.get_rank(), time.monotonic()
    with played(), patch.dict(os.environ, DUALPIPE_TRANSPORT=variables[rank]):
        with pytest.raises(ValueError, match="expected") as caught:
            Buffer(**{**CONFIG, **options[rank]})
        assert time.monotonic() - begin < SOON_S
        # Nobody is behind: all ranks make the next one together.
        assert Buffer(**CONFIG, transport="collective").transport == "collective"
    return str(caught.value)


def of_three(*options: Mapping[str, Any], variables: Sequence[str] = ("", "", "")) -> list[str]:
    """The same of all, given their options and their ``DUALPIPE_TRANSPORT``."""
    return run_ranks(told, 3, options, variables, backend="gloo", run_timeout_s=120)


@pytest.mark.parametrize(
    ("options", "got"),
    [
        (
            ({"transport": "nvlink"}, {"transport": "nvlink"}, {"transport": "copy_engine"}),
            "'nvlink' at rank 0, 'copy_engine' at rank 2",
        ),
        (
            ({}, {"transport": ("nvlink", "collective")}, {}),
            "'auto' at rank 0, 'nvlink' or 'collective' at rank 1",
        ),
        (
            ({"num_sms": 0}, {"num_sms": 0}, {}),
            "'auto' with num_sms=0 at rank 0, 'auto' at rank 2",
        ),
    ],
)
def test_other_requests_are_told_on_all_ranks(
    options: Sequence[Mapping[str, Any]], got: str
) -> None:
    assert of_three(*options) == [SAME + got] * 3


def test_a_variable_of_one_rank_is_told_on_all() -> None:
    found = of_three({}, {}, {}, variables=("", "collective", ""))
    assert found == [SAME + "'auto' at rank 0, 'collective' (by DUALPIPE_TRANSPORT) at rank 1"] * 3


@pytest.mark.parametrize(
    ("options", "variable", "wrong"),
    [
        ({"transport": "pigeon"}, "", "transport to be one of auto, nvlink, "),
        ({"transport": 5}, "", "transport to be a name or a list of names, got 5"),
        ({}, "pigeon", "DUALPIPE_TRANSPORT to be one of auto, nvlink, "),
        ({"top_k": 33}, "", "top_k of at most 32, got 33"),
        ({"num_experts": 7}, "", "num_experts to be a multiple of the 3 ranks of the group, got 7"),
    ],
)
def test_a_mistake_of_one_rank_is_told_on_all(
    options: Mapping[str, Any], variable: str, wrong: str
) -> None:
    *others, last = of_three({}, {}, options, variables=("", "", variable))
    assert last.startswith(f"expected {wrong}")
    assert others == [f"rank 2: {last}"] * 2


@pytest.mark.parametrize("transport", ["auto", "collective"])
def test_other_sizes_are_told_on_all_ranks(transport: str) -> None:
    one = {"transport": transport}
    message = (
        "expected the same hidden, num_experts, top_k, max_tokens, dtype and num_slabs on all "
        "ranks, got (8, 6, 2, 4, 'torch.bfloat16', 1) at rank 0, "
        "(8, 6, 2, 5, 'torch.bfloat16', 1) at rank 1"
    )
    assert of_three(one, {**one, "max_tokens": 5}, one) == [message] * 3


def alike() -> list[str]:
    with played(), patch.dict(os.environ, {"DUALPIPE_TRANSPORT": "copy_engine"}):
        by_name = "copy_engine" if dist.get_rank() else "auto"
        made = [Buffer(**CONFIG, transport=by_name)]
        made.append(Buffer(**CONFIG, transport=["collective", "auto"]))
        made.append(Buffer(**CONFIG, transport=("collective", "copy_engine")))
        return [buffer.transport for buffer in made]


def test_what_comes_to_the_same_is_the_same() -> None:
    found = run_ranks(alike, 2, backend="gloo", run_timeout_s=120)
    assert found == [["copy_engine", "collective", "collective"]] * 2


def test_virtual_ranks_are_told_too() -> None:
    def program(member):
        name = ("nvlink", "copy_engine", "nvlink")[member.rank]
        with pytest.raises(ValueError, match="expected") as caught:
            Buffer(**CONFIG, transport=name, local=member)
        return str(caught.value)

    found = LocalRanks(3).run(program)
    assert found == [SAME + "'nvlink' at rank 0, 'copy_engine' at rank 1"] * 3
