"""Training between GPUs with SMs divided in every way: losses stay, and a run tunes itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dualpipe_ext.bench.pipeline_pair import DETERMINISTIC_ENVIRONMENT
from dualpipe_ext.launch import run_ranks
from dualpipe_ext.sms import tuner
from dualpipe_ext.sms.means import has_same_bits
from dualpipe_ext.training import TrainConfig, Trainer
from tests.multi_gpu import RANKS
from tests.multi_gpu.test_training import CONFIG, TEXT, on_all_ranks

NUMBERS = (0, 8, 24)
STEPS = 2 * tuner.num_steps(len(NUMBERS))
# As many chunks as give pairs, whose compute is what is told.
RUN = replace(CONFIG, dtype="bfloat16", num_chunks=8)


def run(*changes: dict[str, Any]) -> list[list[float]]:
    return on_all_ranks([replace(RUN, **change) for change in changes])


@pytest.fixture(scope="module")
def plain() -> list[float]:
    return run({"transport": "collective", "comm_sms": "auto", "sm_means": "none"})[0]


@pytest.mark.parametrize("means", ["none", "persistent", "yielding", "carve_out", "green_context"])
def test_losses_stay(means: str, plain: list[float]) -> None:
    """The same bits with every number; with means that make libraries choose other kernels,
    equal but for rounding."""
    found = run(*({"comm_sms": number, "sm_means": means} for number in NUMBERS))
    runs = dict(zip(NUMBERS, found, strict=True))
    if means == "none":
        assert runs[0] == plain
    for found in runs.values():
        assert found == pytest.approx(plain, rel=0.02)
        assert not has_same_bits(means) or found == runs[0]


def test_fp8_experts_persistent() -> None:
    model = replace(RUN.model, fp8_experts=True)
    runs = run(*({"model": model, "comm_sms": n, "sm_means": "persistent"} for n in NUMBERS))
    assert runs[1] == runs[0]
    assert runs[2] == runs[0]


def tuned(config: TrainConfig) -> tuple[list[float], tuner.Tuning, list[int], str, int]:
    torch.use_deterministic_algorithms(True)  # as ``losses`` does
    tuner.NUMBERS = NUMBERS
    trainer = Trainer(config, TEXT, device=torch.device("cuda", torch.cuda.current_device()))
    alone = trainer.buffer.memory_bytes
    found, used = [], []
    for _ in range(config.steps):
        trainer.start_tuning()
        used.append(trainer.partition.comm_sms)
        found.append(trainer.step().loss)
    assert (trainer.buffer.num_sms, trainer.partition.comm_sms) == (used[-1], used[-1])
    slabs = trainer.buffer.memory_bytes / alone
    trainer.close()
    return found, trainer.tuner.result, used, trainer.buffer.transport, round(slabs)


@pytest.mark.parametrize("means", ["none", "persistent"])
def test_a_run_tunes_itself_and_its_losses_stay(means: str) -> None:
    config = replace(RUN, steps=STEPS, sm_means=means)
    ranks = run_ranks(
        tuned, RANKS, config, run_timeout_s=200, environment=DETERMINISTIC_ENVIRONMENT
    )
    assert ranks == [ranks[0]] * RANKS
    found, result, used, transport, slabs = ranks[0]
    assert [found] == run({"steps": STEPS, "comm_sms": 24, "sm_means": means})
    assert set(used) == set(NUMBERS)
    assert used[-1] == result.best
    assert transport == ("nvlink" if result.best else "copy_engine")
    assert slabs == (1 if result.best else 2)  # nothing is left of the other transport
    assert all(c.reason == "" and 0 < c.seconds < 10 for c in result.candidates)
