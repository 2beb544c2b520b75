"""Buffers that are made at the first call."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dualpipe_ext.ep import Buffer
from dualpipe_ext.integrations.shared_buffers import SharedBuffers
from dualpipe_ext.launch import run_ranks

SHAPE: dict[str, Any] = {
    "hidden": 16,
    "num_experts": 4,
    "top_k": 2,
    "dtype": torch.float32,
    "device": torch.device("cpu"),
}


def get(buffers: SharedBuffers, tokens: int, **changes: Any) -> Buffer:
    return buffers.get(dist.group.WORLD, tokens=tokens, **SHAPE | changes)


def of_two_ranks() -> None:
    buffers = SharedBuffers("do this", options={"transport": "collective", "timeout_s": 7.0})
    first = get(buffers, 3 + dist.get_rank())
    assert first.config.max_tokens == 4, "the most of any rank"
    assert first.config.timeout_s == 7.0
    assert get(buffers, 4) is first
    assert get(buffers, 0) is first
    with pytest.raises(ValueError, match=r"^expected at most 4 tokens .*, got 5: do this$"):
        get(buffers, 5)
    others = [
        get(buffers, 4, **change)
        for change in ({"hidden": 32}, {"num_experts": 8}, {"top_k": 1}, {"dtype": torch.bfloat16})
    ]
    assert len({first, *others}) == 5
    assert [get(buffers, 1, hidden=32), get(buffers, 1, num_experts=8)] == others[:2]
    group = dist.new_group()
    assert buffers.get(group, tokens=4, **SHAPE) is not first

    # A call without tokens tells nothing of the next one.
    count = len(buffers.made())
    empty = get(buffers, 0, hidden=48)
    assert empty.config.max_tokens == 1
    assert get(buffers, 0, hidden=48) is empty
    full = get(buffers, 5 * dist.get_rank(), hidden=48)
    assert full.config.max_tokens == 5
    assert get(buffers, 0, hidden=48) is full
    assert {empty, full} < set(buffers.made())
    assert len(buffers.made()) == count + 2
    assert {buffer.config.num_slabs for buffer in (first, *others)} == {0}

    roomy = SharedBuffers("", max_tokens=100, options={"transport": "collective"})
    assert get(roomy, 0).config.max_tokens == 100
    assert get(roomy, 2) is get(roomy, 0)
    roomy.clear()
    buffers.clear()
    assert roomy.made() == buffers.made() == []


def test_ranks_make_buffers_together() -> None:
    run_ranks(of_two_ranks, 2, backend="gloo", run_timeout_s=60)


@pytest.mark.parametrize("most", [-5, 0, True, 8.0])
def test_a_bound_is_an_integer_of_at_least_1(most: Any) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        SharedBuffers("", max_tokens=most)
    assert str(error.value) == (
        f"expected max_tokens to be None or an integer of at least 1, got {most!r}"
    )


def one_rank_logs() -> list[str]:
    logger = logging.getLogger("dualpipe_ext.integrations.shared_buffers")
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    buffers = SharedBuffers("", options={"transport": "collective"})
    get(buffers, 2)
    get(buffers, 2)
    return told


def test_a_new_buffer_is_logged_once() -> None:
    (told,) = run_ranks(one_rank_logs, 1, backend="gloo", run_timeout_s=60)
    assert told == ["made a buffer: transport collective, 0 MiB"]
