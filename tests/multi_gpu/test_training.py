"""Training with expert parallelism does not depend on how tokens travel."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from dualpipe_ext.launch import run_ranks
from dualpipe_ext.models import ModelConfig
from dualpipe_ext.training import TrainConfig, Trainer
from dualpipe_ext.training.data import load_text
from tests.multi_gpu import RANKS

MODEL = ModelConfig(
    hidden=256, num_heads=4, num_layers=2, num_experts=16, expert_hidden=128, shared_hidden=128
)
CONFIG = TrainConfig(
    model=MODEL,
    pp=1,
    ep=RANKS,
    batch=8 * RANKS,
    seq_len=256,
    steps=12,
    warmup=3,
    redundant_experts=RANKS,
)
TEXT = load_text(None)[:200_000]


def losses(config: TrainConfig) -> list[float]:
    # Otherwise the backward of attention and of the embedding add up in any order. With warn_only
    # attention would do so all the same.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    trainer = Trainer(config, TEXT, device=torch.device("cuda", torch.cuda.current_device()))
    found = [trainer.step().loss for _ in range(config.steps)]
    trainer.close()
    return found


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_losses_are_the_same_bits_with_every_transport(dtype: str) -> None:
    runs = {}
    for transport in ("collective", "nvlink", "copy_engine"):
        config = replace(CONFIG, dtype=dtype, transport=transport)
        ranks = run_ranks(losses, RANKS, config, run_timeout_s=120)
        assert ranks == [ranks[0]] * RANKS
        runs[transport] = ranks[0]
    again = run_ranks(losses, RANKS, replace(CONFIG, dtype=dtype, transport="nvlink"))[0]
    assert again == runs["nvlink"], "a run is not repeatable in itself"
    assert runs["nvlink"] == runs["collective"]
    assert runs["copy_engine"] == runs["collective"]
    assert runs["nvlink"][-1] < runs["nvlink"][0] - 0.3
