"""The EP transports between GPUs: what virtual ranks cannot show, since all of them meet.

Ranks that stay away, stall or die; and thousands of calls between processes that really drift.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path

import pytest
import torch

from dualpipe_ext.errors import WorkerFailedError
from tests.ep import fault_checks, graph_checks, stress_checks
from tests.ep.ranks import COPY_ENGINE, COPY_ENGINE_PARTS, LOW_LATENCY, NVLINK, Environment

all_ways = pytest.mark.parametrize(
    "environment",
    [NVLINK, COPY_ENGINE, LOW_LATENCY, COPY_ENGINE_PARTS],
    ids=["nvlink", "copy_engine", "low_latency", "copy_engine-parts"],
)


def _num_ranks(most: int) -> int:
    return min(most, torch.cuda.device_count())


@all_ways
def test_an_absent_rank_is_named_and_a_reset_helps(environment: Environment) -> None:
    environment.run(_num_ranks(4), fault_checks.absent_rank_then_reset)


@all_ways
def test_another_call_of_one_rank_is_refused_by_all(environment: Environment) -> None:
    environment.run(_num_ranks(4), fault_checks.other_calls_are_refused_everywhere)


@all_ways
def test_hosts_that_are_not_equally_far_raise_at_the_same_call(environment: Environment) -> None:
    environment.run(_num_ranks(4), fault_checks.faults_are_told_at_the_same_call)


@all_ways
def test_a_stall_within_the_time_out_is_no_error(environment: Environment) -> None:
    environment.run(_num_ranks(4), fault_checks.stalled_rank)


@all_ways
def test_a_killed_rank_is_named_by_the_others(environment: Environment, tmp_path: Path) -> None:
    num_ranks = _num_ranks(4)
    check = functools.partial(fault_checks.killed_rank, folder=tmp_path)
    begin = time.monotonic()
    with pytest.raises(WorkerFailedError, match="was killed by signal 9") as caught:
        environment.run(num_ranks, check)
    assert caught.value.rank == num_ranks - 1
    for rank in range(num_ranks - 1):
        assert (tmp_path / f"rank {rank}").read_text() == "ok"
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize("environment", [NVLINK, LOW_LATENCY], ids=["nvlink", "low_latency"])
def test_two_buffers_on_two_streams(environment: Environment) -> None:
    environment.run(2, stress_checks.two_buffers_on_two_streams)


@all_ways
def test_10_000_calls(environment: Environment) -> None:
    environment.run(_num_ranks(8), stress_checks.thousands_of_calls, timeout_s=200)


@all_ways
def test_graphs(environment: Environment) -> None:
    environment.run(
        _num_ranks(4),
        graph_checks.graph_equals_eager,
        graph_checks.graph_of_a_cached_handle,
        graph_checks.graph_of_groups,
    )
