"""The planner benchmark checks before it measures, and its rows say what was measured."""

from __future__ import annotations

import pytest
import torch

from dualpipe_ext.bench import eplb as bench
from dualpipe_ext.bench.eplb import CASES, Case, check, measure
from dualpipe_ext.eplb import synthetic_loads

SMALL = Case(2, 288, 4, 32)


def test_rows_say_what_was_measured():
    rows = [measure(case, rounds=2, balance=False) for case in (SMALL, Case(2, 320, 40, 320))]
    assert [row["policy"] for row in rows] == ["hierarchical", "global"]
    assert list(rows[0]) == list(rows[1])
    for row in rows:
        for name in ("torch", "numpy", "loops", "split_torch"):
            assert 0 < row[f"{name}_us_p20"] <= row[f"{name}_us_p50"] <= row[f"{name}_us_p80"]
        assert 0 < row["balance_reference"] <= row["balance_bound"] <= 1
        assert row["balance_reference"] <= row["balance_reference_split"] <= 1
        assert row["balance_bound"] <= row["balance_global_bound"] <= 1
        for name in ("kernel_us_p50", "split_graph_us_p50", "numpy_over_kernel"):
            assert (row[name] == "") == (not torch.cuda.is_available())


def test_balanced_plans_are_between_the_reference_and_the_bound():
    row = measure(SMALL, rounds=1)
    assert row["balance_reference"] < row["balance_balanced"] <= row["balance_bound"]
    assert row["balance_balanced"] < row["balance_global"] <= row["balance_global_bound"]


def test_the_cases_are_those_of_deepseek_v3():
    assert [case.by_node for case in CASES] == [True, False, False, False]


def test_a_planner_that_differs_is_found(monkeypatch):
    def wrong(weight, *sizes):
        maps = bench.plan_one_by_one(weight, *sizes)
        maps[0][0, 0] = 1 - maps[0][0, 0]
        return maps

    loads = synthetic_loads("lognormal", SMALL.layers, bench.EXPERTS)
    check(SMALL, loads)
    monkeypatch.setattr(bench, "plan_with_numpy", wrong)
    with pytest.raises(AssertionError, match="got others of wrong"):
        check(SMALL, loads)
