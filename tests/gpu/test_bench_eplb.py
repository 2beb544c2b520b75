"""The planner benchmark on a GPU: every figure is there, and a wait for the GPU is found."""

from __future__ import annotations

import pytest
import torch

from dualpipe_ext.bench import eplb as bench


def test_every_figure_is_measured():
    row = bench.measure(bench.Case(4, 288, 4, 32), rounds=2)
    assert [name for name, value in row.items() if value == ""] == []
    for name in bench._TIMED:
        assert row[f"{name}_us_p50"] > 0
    assert row["numpy_over_kernel"] == round(row["numpy_us_p50"] / row["kernel_us_p50"], 1)


def test_a_wait_for_the_gpu_is_found():
    flag = torch.ones(1, device="cuda")
    with bench._no_wait():
        flag.add_(1)
    with pytest.raises(AssertionError, match="expected no wait for the GPU"), bench._no_wait():
        flag.item()
    assert torch.cuda.get_sync_debug_mode() == 0
