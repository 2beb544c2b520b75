"""DeepEP's interface between GPUs, over every transport."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dualpipe_ext.integrations import deep_ep
from dualpipe_ext.launch import run_ranks
from tests.integrations import test_deep_ep as checks


def over(transport: str, check: Callable[[], None]) -> None:
    deep_ep.Buffer.transport = transport
    check()


@pytest.mark.parametrize("transport", ["nvlink", "copy_engine", "collective"])
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_two_gpus(check: Callable[[], None], transport: str) -> None:
    run_ranks(over, checks.RANKS, transport, check, run_timeout_s=100)
