"""The one test file that every transport must pass: semantics, faults and gradients, on R ranks.

A transport is added by a line in TRANSPORTS; what is checked is in rank_checks.py and
gradient_checks.py.
"""

from __future__ import annotations

import pytest
import torch

from dualpipe_ext.launch import run_ranks
from tests.ep import gradient_checks, rank_checks

# (transport, device, needs): the rows that this machine cannot run are skipped.
TRANSPORTS = [
    pytest.param(("collective", "cpu", "gloo"), id="collective-gloo"),
    pytest.param(("collective", "cuda", "nccl"), id="collective-nccl", marks=pytest.mark.multi_gpu),
]


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    _, device, _ = request.param
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two or more GPUs")
    return request.param


def _run(fn: object, transport: tuple[str, str, str], num_ranks: int, *args: object) -> list:
    name, device, backend = transport
    if device == "cuda" and num_ranks > torch.cuda.device_count():
        pytest.skip(f"needs {num_ranks} GPUs")
    return run_ranks(fn, num_ranks, name, device, *args, backend=backend, run_timeout_s=120)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_forward(transport: tuple[str, str, str], num_ranks: int) -> None:
    checks = (
        rank_checks.forward_equals_reference,
        rank_checks.combine_is_within_rounding,
        rank_checks.fp8_equals_reference,
        rank_checks.static_output,
        rank_checks.bad_ids_raise_everywhere,
        rank_checks.strided_inputs,
        rank_checks.async_op,
    )
    _run(rank_checks.run_checks, transport, num_ranks, checks)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_gradients(transport: tuple[str, str, str], num_ranks: int) -> None:
    checks = (
        gradient_checks.gradients_equal_dense,
        gradient_checks.gradients_join_everywhere,
        gradient_checks.fp8_gradient_is_straight_through,
        gradient_checks.padding_rows_do_not_matter,
    )
    _run(rank_checks.run_checks, transport, num_ranks, checks)


def test_many_calls_with_changing_routing(transport: tuple[str, str, str]) -> None:
    _run(rank_checks.run_checks, transport, 2, (rank_checks.many_calls,))


def test_groups_that_are_not_the_world(transport: tuple[str, str, str]) -> None:
    _run(rank_checks.run_checks, transport, 4, (rank_checks.subgroups,))


def test_a_rank_that_stays_away_is_named(transport: tuple[str, str, str]) -> None:
    if transport[1] == "cuda":
        pytest.skip("NCCL reports one time-out for all its messages")
    *others, late = _run(rank_checks.late_rank, transport, 3)
    assert late is None
    for rank, message in enumerate(others):
        assert message.startswith(
            f"rank {rank}, dispatch (counts): expected rank 2 to answer within 0.5 s"
        )
