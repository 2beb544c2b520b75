"""What a closed trainer leaves once it is let go of: nothing that waits for the collector."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from dualpipe_ext.launch import run_ranks
from dualpipe_ext.sms import tuner
from dualpipe_ext.training import TrainConfig, Trainer
from tests.ep.test_switching import played
from tests.training.test_trainer import CONFIG, TEXT

SMALL = replace(CONFIG, pp=1, ep=1, batch=8, seq_len=16)
MOVING = {"redundant_experts": 4, "rebalance_every": 1, "spare_bytes": 0}


def left_over(config: TrainConfig, steps: int, with_sms: bool) -> list[str]:
    """What is still there when the last reference to the trainer is gone."""
    # Otherwise it might be collected in time, by chance.
    gc.disable()
    with played() if with_sms else nullcontext():
        trainer = Trainer(config, TEXT, device=torch.device("cpu"))
        for _ in range(steps):
            trainer.step()
        parts = {
            "trainer": trainer,
            "pipeline": trainer.pipeline,
            "launcher": trainer.pipeline._launcher,
            "partition": trainer.partition,
            "buffer": trainer.buffer,
            "transport": trainer.buffer._transport,
            "parameter": next(iter(trainer._parameters.values())),
        }
        if with_sms:
            assert trainer.tuner is not None
            assert not trainer.tuner.done
            parts["tuner"] = trainer.tuner
        alive = {name: weakref.ref(part) for name, part in parts.items()}
        trainer.close()
        del trainer, parts
    return [name for name, reference in alive.items() if reference() is not None]


@pytest.mark.parametrize(
    ("config", "steps", "with_sms"),
    [
        (SMALL, 1, False),
        # In the middle of the trials, after the first change of the number.
        (replace(SMALL, steps=2 * tuner.num_steps(len(tuner.NUMBERS))), 4, True),
        (replace(CONFIG, pp=2, ep=2, ema=0.9, **MOVING), 3, False),
    ],
    ids=["plain", "tuning", "several ranks"],
)
def test_it_is_freed_with_its_last_reference(
    config: TrainConfig, steps: int, with_sms: bool
) -> None:
    ranks = config.pp * config.ep
    found = run_ranks(left_over, ranks, config, steps, with_sms, run_timeout_s=120)
    assert found == [[]] * ranks
