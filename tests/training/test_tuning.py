"""Communication SMs in training: what is refused, and runs that tune, on played transports.

The tuner itself is tested in tests/sms; on GPUs: tests/multi_gpu/test_partition.py.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from rich.console import Console

from dualpipe_ext.ep import Buffer
from dualpipe_ext.launch import run_ranks
from dualpipe_ext.sms import Candidate, SMPartition, Tuning, tuner
from dualpipe_ext.training import RunOptions, TrainConfig, Trainer, run
from dualpipe_ext.training.tuning import (
    check_sms,
    described,
    join,
    make_tuner,
    numbers_to_try,
    times_tried,
    tuning_lines,
)
from tests.ep.test_switching import SIZES, Copies, played
from tests.training.test_trainer import CONFIG, TEXT

CPU = torch.device("cpu")
NUMBERS = (0, 8, 24)
STEPS = 2 * tuner.num_steps(len(NUMBERS))
SHORT = replace(
    CONFIG,
    model=replace(CONFIG.model, num_layers=2),
    pp=1,
    ep=2,
    num_chunks=2,
    batch=4,
    seq_len=16,
    steps=STEPS,
    redundant_experts=2,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"comm_sms": -1}, "comm_sms to be 'auto' or an integer of at least 0, got -1"),
        ({"comm_sms": "8"}, "comm_sms to be 'auto' or an integer of at least 0, got '8'"),
        ({"sm_means": "loud"}, "sm_means to be one of none, .*, got 'loud'"),
        ({"sm_means": "green_context"}, "same bits .* got 'green_context'; give a number"),
        ({"comm_sms": 8, "transport": "collective"}, "takes no SMs of its own, got 8"),
        ({"comm_sms": 0, "transport": "nvlink"}, "comm_sms of above 0 with transport 'nvlink'"),
        ({"comm_sms": 8, "transport": "copy_engine"}, "comm_sms of 0 with transport 'copy_engine'"),
    ],
)
def test_what_a_run_refuses_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_what_a_run_takes():
    for comm_sms, transport in ((0, "auto"), (8, "auto"), (8, "nvlink"), (0, "copy_engine")):
        check_sms(comm_sms, "carve_out", transport)
    check_sms("auto", "persistent", "collective")


def test_a_checkpoint_can_be_resumed_with_another_number():
    other = replace(CONFIG, comm_sms=8, sm_means="persistent")
    assert other.layout() == CONFIG.layout()


def test_candidates_by_transport(monkeypatch):
    assert numbers_to_try("auto") == tuner.NUMBERS
    assert 0 in tuner.NUMBERS
    assert numbers_to_try("nvlink") == tuple(n for n in tuner.NUMBERS if n)
    assert numbers_to_try("copy_engine") == numbers_to_try("collective") == ()
    monkeypatch.setenv("DUALPIPE_TRANSPORT", "nvlink")
    assert 0 not in numbers_to_try("auto")


def test_a_buffer_joins_the_partition():
    with played():
        buffer, partition = Buffer(**SIZES), SMPartition(device=CPU)
        join(partition, buffer)
        assert partition.comm_sms == 24  # the transport's own
        partition.set(0)
        assert buffer.transport == "copy_engine"
        with pytest.raises(ValueError, match="got 8: transport 'nvlink' takes 24"):
            join(SMPartition(8, device=CPU), Buffer(**SIZES))


def test_without_sms_auto_is_silent_and_a_number_is_refused():
    partition = SMPartition(device=CPU)
    join(partition, Buffer(**SIZES))
    assert partition.comm_sms is None
    assert described(partition, None) == "none of its own"
    assert make_tuner(partition, Buffer(**SIZES), "auto", steps=10_000, device=CPU) is None
    with pytest.raises(ValueError, match="got 8: transport 'collective' takes no SMs of its own"):
        join(SMPartition(8, device=CPU), Buffer(**SIZES))


def test_when_a_run_tunes():
    enough = 2 * tuner.num_steps(len(tuner.NUMBERS))
    with played():
        buffer = Buffer(**SIZES)
        auto, fixed = SMPartition(device=CPU), SMPartition(24, device=CPU)
        assert make_tuner(auto, buffer, "auto", steps=enough, device=CPU) is not None
        assert make_tuner(auto, buffer, "auto", steps=enough - 1, device=CPU) is None
        assert make_tuner(fixed, buffer, "auto", steps=enough, device=CPU) is None
        assert make_tuner(auto, buffer, "copy_engine", steps=enough, device=CPU) is None


def test_what_the_table_says(monkeypatch):
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu = torch.device("cuda", 0)
    fixed = SMPartition(8, means="persistent", device=gpu)
    assert described(fixed, None) == "8 of 132 SMs, compute told by persistent"
    assert described(SMPartition(0, means="persistent", device=gpu), None) == "copy engines"
    auto = SMPartition(device=gpu, means="none")
    auto.set(24)
    assert described(auto, None) == "24 of 132 SMs, the transport's own"
    assert described(auto, SimpleNamespace(done=False)) == "24 of 132 SMs, being tuned"
    assert described(auto, SimpleNamespace(done=True)) == "24 of 132 SMs, tuned"
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    assert described(auto, SimpleNamespace(done=True)) == (
        "24 of 132 SMs, tuned; one hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1), which hides less"
    )


def test_what_is_said_of_a_tuning():
    found = Tuning(
        (Candidate(0, float("inf"), "no room"), Candidate(8, 0.25), Candidate(16, 0.0125)),
        best=16,
        noise=0.0015,
    )
    assert [line.strip() for line in tuning_lines(found)] == [
        "copy engines  no room",
        "8 SMs  250.00 ms a step",
        "16 SMs  12.50 ms a step <- from now on",
        "the fewest SMs within noise of the fastest, 1.50 ms by the spread of 6 rounds",
    ]
    assert times_tried(found) == "8: 250.00 ms, 16: 12.50 ms (noise 1.50 ms)"
    alone = Tuning((Candidate(8, float("inf"), "nothing to compare it with"),), best=8)
    assert [line.strip() for line in tuning_lines(alone)] == [
        "8 SMs  nothing to compare it with <- from now on"
    ]
    assert times_tried(Tuning((Candidate(0, float("inf"), "no room"),), best=None)) == "none"


class Clock:
    """``time.perf_counter`` of a trainer whose steps take as long as the transport says."""

    def __init__(self, rank: int) -> None:
        # The ranks disagree on who is fastest; the slowest rank counts.
        self._seconds = ({0: 1.0, 8: 3.0, 24: 5.0}, {0: 6.0, 8: 2.0, 24: 1.0})[rank]
        self.trainer, self._now = None, 0.0

    def perf_counter(self) -> float:
        if self.trainer is not None:
            self._now += self._seconds[self.trainer.partition.comm_sms]
        return self._now


def tuned(config: TrainConfig, not_here: str | None) -> tuple[list[float], Tuning, list]:
    """Losses, what came out, and what each step used."""
    from dualpipe_ext.training import trainer as module

    clock = Clock(torch.distributed.get_rank())
    with (
        played(),
        patch.object(Copies, "not_here", not_here),
        patch.object(tuner, "NUMBERS", NUMBERS),
        patch.object(module, "time", clock),
    ):
        trainer = clock.trainer = Trainer(config, TEXT, device=CPU)
        losses, used = [], []
        for _ in range(config.steps):
            trainer.start_tuning()
            used.append((trainer.partition.comm_sms, trainer.buffer.transport))
            losses.append(trainer.step().loss)
        memory = trainer.buffer.memory_bytes
        trainer.close()
    return losses, trainer.tuner.result, used, memory


def plain(config: TrainConfig) -> list[float]:
    trainer = Trainer(config, TEXT, device=CPU)
    losses = [trainer.step().loss for _ in range(config.steps)]
    trainer.close()
    return losses


def test_a_run_tunes_itself_and_its_losses_stay():
    want = run_ranks(plain, 2, SHORT, run_timeout_s=120)[0]
    first, second = run_ranks(tuned, 2, SHORT, None, run_timeout_s=120)
    losses, result, used, memory = first
    assert first[:3] == second[:3]
    assert losses == want
    assert result.best == 8
    assert {number for number, _ in used} == set(NUMBERS)
    assert all(name == ("nvlink" if number else "copy_engine") for number, name in used)
    assert used[-1] == (8, "nvlink")
    assert len(used) - [number for number, _ in used][::-1].index(0) < STEPS / 2 + 1
    assert memory == 1000  # of one transport


def test_a_run_without_copy_engines_tunes_what_it_has():
    (_, result, used, _), _ = run_ranks(tuned, 2, SHORT, "no engines", run_timeout_s=120)
    assert {name for _, name in used} == {"nvlink"}
    assert result.best == 8
    assert result.candidates[0].reason == "no engines"


def tuned_run(config: TrainConfig, out: Path) -> str:
    """What the run prints."""
    printed = io.StringIO()
    module = sys.modules["dualpipe_ext.training.run"]  # as a name it is the function
    console = partial(Console, file=printed, width=100)
    with (
        played(),
        patch.object(tuner, "NUMBERS", NUMBERS),
        patch.object(module, "Console", console),
    ):
        run(config, RunOptions(out=out))
    return printed.getvalue()


def test_a_run_says_what_it_tried_and_took(tmp_path):
    config = replace(SHORT, pp=1, ep=1, num_chunks=4, redundant_experts=0)
    (shown,) = run_ranks(tuned_run, 1, config, tmp_path / "run", run_timeout_s=120)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["communication"].endswith(", tuned")
    assert [part.split(":")[0] for part in summary["SMs tried"].split(", ")] == ["0", "8", "24"]
    best = summary["communication"].partition(" ")[0]
    assert summary["transport"] == ("copy_engine" if best == "copy" else "nvlink")
    # a CPU has none
    assert "communication  24 of None SMs, compute told by yielding, being tuned" in shown
    assert f"step    {STEPS // 2}/{STEPS}  SMs that communicate:" in shown
    assert shown.count("ms a step") == 3
    assert shown.count("<- from now on") == 1


@contextmanager
def counted(counts: dict[str, int], name: str):
    counts[name] = counts.get(name, 0) + 1
    yield


def places() -> dict[str, int]:
    """How often a trainer's step marks itself, and its pairs."""
    counts: dict[str, int] = {}
    with (
        patch.object(SMPartition, "step", lambda self: counted(counts, "step")),
        patch.object(SMPartition, "beside", lambda self: counted(counts, "beside")),
    ):
        trainer = Trainer(replace(SHORT, num_chunks=4, batch=16), TEXT, device=CPU)
        trainer.step()
        trainer.close()
    experts = trainer.stages[0].layers["0"].experts
    assert experts.partition is trainer.partition
    return counts


def test_the_pipeline_tells_the_partition_of_steps_and_pairs():
    counts = run_ranks(places, 2, run_timeout_s=120)[0]
    assert counts["step"] == 1
    assert counts["beside"] > 0
