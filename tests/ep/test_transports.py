"""The one test file that every transport must pass: semantics, faults and gradients, on R ranks.

What is checked is in the files ``*_checks.py``; where, in ranks.py. A transport is added by a line
in ENVIRONMENTS.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.ep import (
    fault_checks,
    gradient_checks,
    group_checks,
    rank_checks,
    stress_checks,
    switching_checks,
    zero_copy_checks,
)
from tests.ep.ranks import (
    COPY_ENGINE,
    COPY_ENGINE_PARTS,
    COPY_ENGINE_PARTS_VIRTUAL,
    COPY_ENGINE_VIRTUAL,
    GLOO,
    LOW_LATENCY,
    LOW_LATENCY_VIRTUAL,
    NCCL,
    NVLINK,
    NVLINK_VIRTUAL,
    Environment,
)

GPU, MULTI_GPU = pytest.mark.gpu, pytest.mark.multi_gpu
# id: (environment, its tier, numbers of ranks). Larger numbers than there are GPUs are skipped.
ENVIRONMENTS = {
    "collective-gloo": (GLOO, (), (1, 2, 3, 4)),
    "collective-nccl": (NCCL, (MULTI_GPU,), (1, 2, 4)),
    "nvlink": (NVLINK, (MULTI_GPU,), (1, 2, 3, 4, 8)),
    "copy_engine": (COPY_ENGINE, (MULTI_GPU,), (1, 2, 3, 4, 8)),
    "nvlink-virtual": (NVLINK_VIRTUAL, (GPU,), (1, 2, 3, 4, 8)),
    "copy_engine-virtual": (COPY_ENGINE_VIRTUAL, (GPU,), (1, 2, 3, 4, 8)),
    "low_latency": (LOW_LATENCY, (MULTI_GPU,), (1, 2, 3, 4, 8)),
    "low_latency-virtual": (LOW_LATENCY_VIRTUAL, (GPU,), (1, 2, 3, 4, 8)),
    "copy_engine-parts": (COPY_ENGINE_PARTS, (MULTI_GPU,), (2, 4)),
    "copy_engine-parts-virtual": (COPY_ENGINE_PARTS_VIRTUAL, (GPU,), (1, 2, 4)),
}


def on(
    *names: str, num_ranks: int | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test in the environments named (or all), on the number of ranks given (or its own)."""
    params = []
    for name in names or ENVIRONMENTS:
        environment, marks, usual = ENVIRONMENTS[name]
        numbers = usual if num_ranks is None else (num_ranks,)
        params += [pytest.param(environment, n, id=f"{name}-{n}", marks=marks) for n in numbers]
    return pytest.mark.parametrize(("environment", "num_ranks"), params)


VIRTUAL = ("nvlink-virtual", "copy_engine-virtual", "low_latency-virtual")
GPU_TRANSPORTS = ("nvlink", "copy_engine", "low_latency", *VIRTUAL)
PROCESSES = ("collective-gloo", "collective-nccl", "nvlink", "copy_engine", "low_latency")


@on()
def test_forward(environment: Environment, num_ranks: int) -> None:
    environment.run(
        num_ranks,
        rank_checks.forward_equals_reference,
        rank_checks.combine_is_within_rounding,
        rank_checks.fp8_equals_reference,
        rank_checks.numbers_of_any_bits,
        rank_checks.static_output,
        rank_checks.strided_inputs,
        rank_checks.same_bits_every_time,
        rank_checks.async_op,
    )


@on()
def test_mistakes(environment: Environment, num_ranks: int) -> None:
    environment.run(
        num_ranks,
        rank_checks.mistakes_of_one_call,
        rank_checks.bad_ids_raise_everywhere,
        rank_checks.too_many_rows_raise_everywhere,
        rank_checks.other_settings_raise_everywhere,
    )


@on()
def test_groups(environment: Environment, num_ranks: int) -> None:
    environment.run(
        num_ranks,
        group_checks.groups_equal_reference,
        group_checks.fp8_groups_equal_reference,
        group_checks.too_full_groups_raise_everywhere,
        group_checks.other_groups_raise_everywhere,
        group_checks.weights_that_come_late,
        group_checks.gradients_of_groups,
    )


@on()
def test_sizes(environment: Environment, num_ranks: int) -> None:
    environment.run(num_ranks, stress_checks.sizes)


@on()
def test_gradients(environment: Environment, num_ranks: int) -> None:
    environment.run(
        num_ranks,
        gradient_checks.gradients_equal_dense,
        gradient_checks.gradients_join_everywhere,
        gradient_checks.fp8_gradient_is_straight_through,
        gradient_checks.padding_rows_do_not_matter,
    )


@on("nvlink", "copy_engine", "nvlink-virtual", "copy_engine-virtual")
def test_zero_copy(environment: Environment, num_ranks: int) -> None:
    environment.run(
        num_ranks,
        zero_copy_checks.zero_copy_equals_reference,
        zero_copy_checks.slabs_come_and_go,
        zero_copy_checks.slabs_do_not_leak,
    )


@on(*GPU_TRANSPORTS)
def test_other_numbers_of_sms(environment: Environment, num_ranks: int) -> None:
    environment.run(
        num_ranks,
        switching_checks.every_number_gives_the_same_bits,
        switching_checks.a_backward_takes_the_transport_of_its_forward,
        switching_checks.unused_memory_is_given_up,
    )


@on("collective-gloo", "collective-nccl", "low_latency", "low_latency-virtual", num_ranks=2)
def test_zero_copy_without_slabs(environment: Environment, num_ranks: int) -> None:
    environment.run(
        num_ranks, zero_copy_checks.zero_copy_equals_reference, zero_copy_checks.slabs_come_and_go
    )


@on(num_ranks=2)
def test_many_calls_with_changing_routing(environment: Environment, num_ranks: int) -> None:
    environment.run(num_ranks, stress_checks.many_calls)


@on(*GPU_TRANSPORTS, "copy_engine-parts", "copy_engine-parts-virtual", num_ranks=2)
def test_calls_in_a_row_with_delays(environment: Environment, num_ranks: int) -> None:
    environment.run(num_ranks, stress_checks.calls_in_a_row_with_delays)


@on("collective-gloo", num_ranks=3)
def test_hundreds_of_calls(environment: Environment, num_ranks: int) -> None:
    # With 10,000 of them on the GPU transports: tests/gpu/test_ep.py, tests/multi_gpu/test_ep.py.
    environment.run(num_ranks, stress_checks.hundreds_of_calls)


@on(*PROCESSES, num_ranks=4)
def test_groups_that_are_not_the_world(environment: Environment, num_ranks: int) -> None:
    environment.run(num_ranks, rank_checks.subgroups)


# NCCL reports one time-out for all its messages; the GPU transports: test_ep.py beside this one.
@on("collective-gloo", num_ranks=3)
def test_a_rank_that_stays_away_is_named(environment: Environment, num_ranks: int) -> None:
    *others, [late] = environment.run(num_ranks, fault_checks.late_rank)
    assert late is None
    for rank, [message] in enumerate(others):
        assert message.startswith(
            f"rank {rank}, dispatch (counts): expected rank 2 to answer within 0.5 s"
        )
