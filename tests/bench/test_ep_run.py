"""``ep_run``: every case is measured, wrong results are found and not timed, the run goes on."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from dualpipe_ext.bench import ep_run
from dualpipe_ext.bench.ep_cases import CASES, row_bytes
from dualpipe_ext.bench.ep_result import ERROR, FAILED, OK, UNAVAILABLE, EpRow
from dualpipe_ext.bench.ranks import start
from dualpipe_ext.ep import registry
from tests.bench.runs import InMemory, run_everything, small


def by_name(rows: list[EpRow]) -> dict[tuple[str, str], EpRow]:
    return {(row.transport, row.case): row for row in rows}


def not_timed(row: EpRow) -> bool:
    return row.us_p50 is row.uncached_us_p50 is row.graph_us_p50 is row.wire_gb_s is None


@pytest.fixture(scope="module")
def runs() -> tuple[list[dict[tuple[str, str], EpRow]], list[str]]:
    with_push = small(
        "dispatch-bf16-token,dispatch-fp8-token,combine-expert", transports=("nvlink",), sms=(8, 9)
    )
    found, told = start(run_everything, 2, small(), with_push, virtual=False, device_type="cpu")
    return [by_name(rows) for rows in found[:3]] + found[3:], told


def test_every_case_is_measured(runs) -> None:
    (good, *_), told = runs
    names = {case.name for case in CASES}
    without_memory = {n for n in names if not n.endswith("-buffer")}
    plain = {n for n in without_memory if not n.endswith("128")}
    assert {case for by, case in good if by == "collective"} == without_memory
    assert {case for by, case in good if by == "gloo-per-rank"} == plain
    per_expert = {n for n in plain if n.endswith("-expert")}
    assert {case for by, case in good if by == "gloo-per-expert"} == per_expert
    for (_, case), row in good.items():
        assert (row.status, row.reason) == (OK, "")
        assert 0 < row.us_p20 <= row.us_p50 <= row.us_p80
        if case.startswith("dispatch"):
            assert row.routing_us == pytest.approx(row.uncached_us_p50 - row.us_p50, abs=0.02)
        else:
            assert row.uncached_us_p50 is row.routing_us is None
    # All ranks agree: what is reported is the slowest rank's.
    assert told[0] == told[1]


def test_bytes(runs) -> None:
    (good, *_), _ = runs
    generators = [torch.Generator().manual_seed(rank) for rank in range(2)]
    crossing, copies, received = [0, 0], [0, 0], [0, 0]
    for source, generator in enumerate(generators):
        torch.randn(6, 128, generator=generator)
        choices = torch.rand(6, 4, generator=generator).topk(2, dim=1).indices
        for pair in choices.tolist():
            for rank in {expert // 2 for expert in pair}:
                received[rank] += 1
                crossing[rank] += source != rank
            for expert in pair:
                copies[expert // 2] += source != expert // 2
    for (by, case), row in good.items():
        size = row_bytes(128, "fp8" in case or "quantised" in case)
        wire = copies if by == "gloo-per-expert" else crossing
        assert row.wire_bytes == size * max(wire)
        assert row.logical_bytes == size * max(received)
        assert row.logical_gb_s == pytest.approx(row.logical_bytes / row.us_p50 / 1e3, abs=1e-3)
        assert row.useful_gb_s == pytest.approx(size * max(crossing) / row.us_p50 / 1e3, abs=1e-3)
    assert row_bytes(7168, False) == 14336
    assert row_bytes(7168, True) == 7168 + 224


def test_wrong_results_are_failed_and_not_timed(runs) -> None:
    (_, flipped, *_), _ = runs
    for (by, case), row in flipped.items():
        if by == "collective" and "expert" in case:
            assert row.status == FAILED
            assert not_timed(row)
            what = "cached: rank 0: 1 of 6 tokens are beyond what rounding can explain"
            if case.startswith("dispatch"):
                what = "uncached: rank 1: tokens: 1 of"
            assert row.reason.startswith(what)
        else:
            assert row.status == OK


def test_what_raises_is_a_row_and_the_run_goes_on(runs) -> None:
    (_, _, raising, _), _ = runs
    for (by, case), row in raising.items():
        moves_bf16 = "bf16" in case or "combine" in case  # a combine needs a dispatch
        if by == "collective" and moves_bf16:
            assert (row.status, row.reason) == (ERROR, "rank 1: RuntimeError: no more rows")
            assert not_timed(row)
        else:
            assert row.status == OK
            assert row.us_p50 > 0


def test_plain_pushes_are_checked_and_compared_with(runs) -> None:
    rows = {(row.case, row.transport, row.num_sms): row for row in runs[0][3]}
    cases = ("dispatch-bf16-token", "dispatch-fp8-token", "combine-expert")
    assert set(rows) == {
        *((case, "nvlink", sms) for case in cases for sms in (8, 9)),
        *((case, "push_kernel", sms) for case in ("push-bf16", "push-fp8") for sms in (8, 9)),
    }
    for (case, transport, sms), row in rows.items():
        if (case, sms) == ("push-fp8", 9):
            assert row.status == FAILED
            assert row.reason.startswith("cached: rank 1: 1 of 12 rows differ, the first is row 0")
            assert not_timed(row)
            continue
        assert row.status == OK
        assert row.reason == ("as asked" if transport == "push_kernel" else "")
        push = rows["push-fp8" if "fp8" in case else "push-bf16", "push_kernel", sms]
        # The same rows cross; those that stay are not pushed.
        if push.status == OK:
            assert row.wire_bytes == push.wire_bytes
        assert push.logical_bytes == push.wire_bytes
        if transport == "push_kernel" or push.status == FAILED:
            assert row.of_push is None
        else:
            assert row.of_push == pytest.approx(row.wire_gb_s / push.wire_gb_s, abs=1e-4)
        assert row.of_peer_copy is None


def test_a_plain_push_needs_a_gpu() -> None:
    options = small("combine-token", transports=("nvlink",), sms=(8,))
    rows = by_name(start(ep_run.run, 2, options, virtual=True, device_type="cpu"))
    assert rows["push_kernel", ""].status == UNAVAILABLE
    assert rows["push_kernel", ""].reason == (
        "rank 0: expected --device cuda for a plain push, got cpu"
    )


def test_virtual_ranks() -> None:
    options = small(
        "dispatch-bf16,combine", experts=6, transports=("in_memory", "collective", "nccl")
    )
    with patch.object(registry, "_TRANSPORTS", (InMemory,)):
        rows = start(ep_run.run, 3, options, virtual=True, device_type="cpu")
    found = by_name(rows)
    assert found["in_memory", "dispatch-bf16-expert128"].status == OK
    assert found["in_memory", "combine-token"].logical_gb_s > 0
    # Nothing crosses a link.
    assert all(row.wire_gb_s is None for row in rows)
    assert all(row.virtual for row in rows)
    assert found["collective", ""].reason == (
        "rank 0: expected a process per rank for collective, got virtual ranks"
    )
    assert found["nccl-per-rank", ""].status == UNAVAILABLE


@pytest.mark.gpu
def test_virtual_ranks_on_a_gpu() -> None:
    options = small(
        tokens=256, hidden=1024, experts=16, transports=("nvlink", "copy_engine"), sms=(4, 8)
    )
    rows = start(ep_run.run, 2, options, virtual=True, device_type="cuda")
    assert {row.status for row in rows} == {OK}, [row.reason for row in rows]
    assert {row.num_sms for row in rows} == {4, 8, None}
    for row in rows:
        assert row.sm_us > 0
        assert row.gemm_slow_down is None
        # Nothing crosses a link.
        assert row.of_push is None
    pushed = {(row.case, row.num_sms) for row in rows if row.transport == "push_kernel"}
    assert pushed == {(case, sms) for case in ("push-bf16", "push-fp8") for sms in (4, 8)}


@pytest.mark.multi_gpu
def test_two_gpus() -> None:
    options = small(
        tokens=512,
        hidden=1024,
        experts=16,
        transports=("nvlink", "copy_engine", "collective", "nccl"),
    )
    rows = start(ep_run.run, 2, options, virtual=False, device_type="cuda")
    assert {row.status for row in rows} == {OK}, [(row.case, row.reason) for row in rows]
    found = by_name(rows)
    assert found["copy_", "peer-copy"].wire_gb_s > 100
    for transport in ("nvlink", "copy_engine"):
        row = found[transport, "dispatch-bf16-token"]
        assert row.graph_us_p50 is not None, row.graph_reason
        assert row.overlap_speed_up > 0.5
        assert row.sm_us > 0
    assert found["nvlink", "dispatch-bf16-token"].most_sms <= 132
    push = found["push_kernel", "push-bf16"]
    assert push.most_sms == 8
    assert push.graph_us_p50 is not None, push.graph_reason
    assert push.wire_bytes == found["nvlink", "dispatch-bf16-token"].wire_bytes
    assert found["nvlink", "dispatch-bf16-token"].of_push > 0
    copies = found["copy_engine", "dispatch-bf16-token"]
    assert (copies.of_peer_copy is None) == (copies.copy_gb_s is None)
