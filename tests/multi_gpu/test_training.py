"""Training with expert parallelism does not depend on how tokens travel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from dualpipe_ext.bench.pipeline_pair import DETERMINISTIC_ENVIRONMENT
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


def losses(configs: Sequence[TrainConfig]) -> list[list[float]]:
    """Of one run after the other: to start a process takes longer than a run."""
    # Otherwise the backward of attention and of the embedding add up in any order. With warn_only
    # attention would do so all the same.
    torch.use_deterministic_algorithms(True)
    found = []
    for config in configs:
        trainer = Trainer(config, TEXT, device=torch.device("cuda", torch.cuda.current_device()))
        found.append([trainer.step().loss for _ in range(config.steps)])
        trainer.close()
    return found


def on_all_ranks(configs: Sequence[TrainConfig]) -> list[list[float]]:
    """The losses of each run, which are the same on every rank."""
    found = run_ranks(
        losses, RANKS, configs, run_timeout_s=300, environment=DETERMINISTIC_ENVIRONMENT
    )
    assert found == [found[0]] * RANKS
    return found[0]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_losses_are_the_same_bits_with_every_transport(dtype: str) -> None:
    transports = ("nvlink", "collective", "copy_engine", "nvlink")
    runs = on_all_ranks([replace(CONFIG, dtype=dtype, transport=name) for name in transports])
    nvlink, collective, copy_engine, again = runs
    assert again == nvlink, "a run is not repeatable in itself"
    assert nvlink == collective
    assert copy_engine == collective
    assert nvlink[-1] < nvlink[0] - 0.3
