"""Options that cannot be are refused, and the work of a step is what is really multiplied."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dualpipe_ext.bench.pipeline_cases import columns, new_row, step_flops_per_token
from dualpipe_ext.bench.stage import middle_stage
from dualpipe_ext.ep import Buffer
from dualpipe_ext.models import ModelConfig
from tests.bench.pipeline_runs import MODEL, OPTIONS


@pytest.mark.parametrize(
    ("ranks", "changes", "message"),
    [
        (2, {"tokens": 0}, "--tokens of at least 1, got 0"),
        (2, {"num_chunks": 0}, "--num-chunks of at least 1, got 0"),
        (2, {"seq_len": 5}, "--seq-len to divide --tokens 16, got 5"),
        (2, {"peak_tflops": 0.0}, "--peak-tflops above 0, got 0"),
        (2, {"pack_sms": (32, 0)}, "--pack-sms of at least 1, got 0"),
        (2, {"slow_link": "rope"}, "--slow-link of host, peer, got 'rope'"),
        (2, {"parts": ()}, "--parts of pair, steps, got 'nothing'"),
        (3, {}, "--experts to be a multiple of 3 ranks, got 4"),
        (2, {"ep": 3}, "--ep to divide 2 ranks, got 3"),
        (4, {"ep": 4, "step_experts": 6}, "--step-experts to be a multiple of --ep 4, got 6"),
        (2, {"schedules": ("gpipe",)}, "--schedules of .*, got 'gpipe'"),
        (2, {"step_layers": 1}, "--step-layers to be even for dualpipev"),
        (2, {"num_chunks": 3}, "chunks"),
        (2, {"step_experts": 1}, "top_k of at most 1"),
    ],
)
def test_options_that_cannot_be(ranks, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(OPTIONS, **changes).checked(ranks)
    assert OPTIONS.checked(2) is OPTIONS


def test_the_formula_counts_every_product():
    config = ModelConfig(
        hidden=128,
        num_layers=1,
        num_heads=2,
        num_experts=8,
        top_k=2,
        num_groups=1,
        top_groups=1,
        expert_hidden=64,
        shared_hidden=96,
        memory_level=0,
    )
    tokens, seq_len = 64, 32
    buffer = Buffer(
        hidden=128,
        num_experts=8,
        top_k=2,
        max_tokens=tokens,
        dtype=torch.float32,
        transport="collective",
    )
    kind = {"dtype": torch.float32, "device": torch.device("cpu")}
    stage = middle_stage(config, range(1), buffer=buffer, **kind)
    x = torch.randn(tokens // seq_len, seq_len, 128, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        stage(x).sum().backward()
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    scores = 3 * 2 * seq_len * 128  # the formula's; no matrix product for the counter
    assert tokens * (step_flops_per_token(config, seq_len) - scores) == counted


def test_a_row_has_every_column_and_nothing_that_was_not_measured():
    row = new_row(OPTIONS, MODEL, part="pair", device="cpu", pp=1, ep=2, layers=2, transport="x")
    assert list(row.to_dict()) == columns()
    assert row.to_dict()["dtype"] == "float32"
    assert row.speed_up is None
    row.set_times("pair_ms", {"p20": 1.0, "p50": 2.00004, "p80": 3.0})
    assert (row.pair_ms_p20, row.pair_ms_p50, row.pair_ms_p80) == (1.0, 2.0, 3.0)
