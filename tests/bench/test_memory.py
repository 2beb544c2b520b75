"""The memory benchmark checks before it measures, and its rows say what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dualpipe_ext.bench import memory as bench
from dualpipe_ext.bench.memory import MemoryOptions
from dualpipe_ext.bench.ranks import start
from dualpipe_ext.models import ModelConfig

OPTIONS = MemoryOptions(
    model=ModelConfig(
        hidden=128, num_layers=2, num_heads=1, num_experts=8, expert_hidden=64, shared_hidden=64
    ),
    tokens=32,
    seq_len=16,
    in_flight=2,
    dtype=torch.float32,
    transport="collective",
    rounds=2,
)


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_say_what_was_measured(ranks):
    rows = start(bench.run, ranks, OPTIONS.checked(ranks), virtual=False, device_type="cpu")
    assert [row["memory_level"] for row in rows] == [0, 1, 2, 3]
    assert all(row["ranks"] == ranks for row in rows)
    saved = [row["saved_mib"] for row in rows]
    assert saved == sorted(saved, reverse=True)
    assert rows[3]["saved_over_level_0"] == pytest.approx(saved[3] / saved[0], rel=0.01)
    for row in rows:
        # From level 1 on, what a router saves inside of a ``saved_as`` is not counted.
        assert 0.9 * row["predicted_mib"] <= row["saved_mib"]
        assert row["kept_mib"] == row["peak_mib"] == row["peak_over_level_0"] == ""  # needs a GPU
        assert 0 < row["step_ms_p20"] <= row["step_ms_p50"] <= row["step_ms_p80"]
    assert rows[0]["step_over_level_0"] == 1.0
    assert rows[1]["gradient_error_max"] < 1e-5  # float32, rounded elsewhere
    assert 0 < rows[2]["gradient_error_gate_up"] <= rows[2]["gradient_error_max"] < 0.1


def wrong_level(ranks, options):
    bench._LARGEST_ERROR = {**bench._LARGEST_ERROR, 2: 1e-6}
    with pytest.raises(AssertionError, match=r"gradients of level 2 within 1e-06 of level 0's"):
        bench.run(ranks, options)
    return True


def test_a_level_that_is_too_far_off_is_not_measured():
    assert start(wrong_level, 1, OPTIONS, virtual=False, device_type="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "--tokens of at least 1, got 0"),
        ({"rounds": 0}, "--rounds of at least 1, got 0"),
        ({"in_flight": 0}, "--in-flight of at least 1, got 0"),
        ({"seq_len": 5}, "--seq-len to divide --tokens 32, got 5"),
        ({"model": replace(OPTIONS.model, hidden=64)}, "hidden to be a multiple of 128"),
    ],
)
def test_options_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(OPTIONS, **changes).checked(1)
    with pytest.raises(ValueError, match="--experts to be a multiple of 3 ranks, got 8"):
        OPTIONS.checked(3)
