"""DeepEP's interface between GPUs, over every transport."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.distributed as dist

from dualpipe_ext.integrations import deep_ep
from dualpipe_ext.launch import run_ranks
from tests.integrations import test_deep_ep as checks
from tests.integrations import test_deep_ep_low_latency as decoding


def over(transport: str, check: Callable[[], None]) -> None:
    deep_ep.Buffer.transport = deep_ep.Buffer.low_latency_transport = transport
    check()


@pytest.mark.parametrize("transport", ["nvlink", "copy_engine", "collective"])
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_two_gpus(check: Callable[[], None], transport: str) -> None:
    run_ranks(over, checks.RANKS, transport, check, run_timeout_s=100)


@pytest.mark.parametrize("transport", ["low_latency", "nvlink", "copy_engine"])
@pytest.mark.parametrize("check", decoding.CHECKS, ids=lambda check: check.__name__)
def test_decoding_on_two_gpus(check: Callable[[], None], transport: str) -> None:
    run_ranks(over, decoding.RANKS, transport, check, run_timeout_s=100)


def _takes_kernels_for_few_tokens() -> None:
    buffer = deep_ep.Buffer(dist.group.WORLD)
    x, idx, _ = decoding.inputs(dist.get_rank())
    *_, handle, _, _ = buffer.low_latency_dispatch(x, idx, decoding.MOST, decoding.EXPERTS)
    assert buffer._buffer_of(handle, "low_latency_dispatch").transport == "low_latency"


def test_decoding_takes_the_kernels_for_few_tokens() -> None:
    run_ranks(_takes_kernels_for_few_tokens, decoding.RANKS, run_timeout_s=100)
