"""Torch's schedules over NCCL and ours by copy engine, with the same stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dualpipe_ext.launch import run_ranks
from tests.integrations import test_torch_pipelining as checks

NAMES = ("Schedule1F1B", "ScheduleZBVZeroBubble", "ScheduleDualPipeV")
CHECKS = [(checks.same_as_torch, name) for name in NAMES]
CHECKS += [(checks.gradients_add_up,), (checks.outputs_as_torch_gives_them,)]


@pytest.mark.parametrize(
    "check", CHECKS, ids=lambda check: getattr(check[-1], "__name__", check[-1])
)
def test_two_gpus(check: tuple[Callable[..., None], Any]) -> None:
    run_ranks(check[0], checks.RANKS, *check[1:], run_timeout_s=100)
