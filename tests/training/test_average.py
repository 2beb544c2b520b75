"""The average of the parameters beside training: its formula, resuming, experts that move."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from dualpipe_ext.launch import run_ranks
from dualpipe_ext.training import Trainer
from tests.training.test_trainer import CONFIG, TEXT

WITH = replace(CONFIG, ema=0.9)
MOVING = replace(WITH, redundant_experts=4, rebalance_every=3, dtype="float64")


def make(config, device="cpu"):
    index = torch.cuda.current_device() if device == "cuda" else None
    return Trainer(config, TEXT, device=torch.device(device, index))


def follow_by_hand(config, steps):
    """Largest difference between the average and its formula over the parameters of each step."""
    trainer = make(config)
    stages = trainer.pipeline.stages
    expected = {n: p.detach().double().clone() for n, p in stages.named_parameters()}
    for _ in range(steps):
        trainer.step()
        trainer.average.ema.flush()  # no step is skipped
        for name, parameter in stages.named_parameters():
            expected[name].lerp_(parameter.detach().double(), 0.1)
    averages = trainer.average.ema.averages()
    assert averages.keys() == expected.keys()
    # Something has been averaged, and it is not what the model has now.
    parameters = dict(stages.named_parameters())
    assert not any(torch.equal(averages[n], parameters[n]) for n in averages if "bias" not in n)
    trainer.close()
    return max((averages[n].double() - expected[n]).abs().max().item() for n in expected)


@pytest.mark.parametrize(("dtype", "unit"), [("float32", 2.0**-23), ("bfloat16", 2.0**-7)])
def test_average_is_that_of_the_parameters_after_each_step(dtype, unit):
    config = replace(WITH, ema_dtype=dtype)
    # Values are below 2, so a rounding is off by less than a unit (bfloat16 rounds at random): one
    # at the start, and in each step up to three.
    roundings = 1 + 6 * (3 if dtype == "float32" else 1)
    largest = max(run_ranks(follow_by_hand, 4, config, 6, run_timeout_s=120))
    assert largest < roundings * unit


def by_expert(trainer):
    """Averages of experts by weight and logical expert, those of all its replicas stacked."""
    found: dict[tuple[str, int], list[torch.Tensor]] = {}
    averages = trainer.average.ema.averages()
    for layer in trainer._moe_layers():
        experts = trainer.balancer.local_experts()[layer.index]
        for name, _ in layer.expert_parameters():
            for slot, expert in enumerate(experts):
                key = f"{layer.index}.{name.rpartition('.')[2]}", expert
                found.setdefault(key, []).append(averages[name][slot])
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    keys = {key for part in everyone for key in part}
    return {
        key: torch.stack([value for part in everyone for value in part.get(key, [])])
        for key in keys
    }


def move(config, steps, device="cpu"):
    """Averages by expert at the end, and the number of bytes of experts that moved."""
    trainer = make(config, device)
    moved = 0
    for _ in range(steps):
        moved += trainer.step().moved_bytes
        trainer.average.ema.flush()
    found = by_expert(trainer)
    trainer.close()
    return found, moved


@pytest.mark.parametrize("spare_bytes", [MOVING.spare_bytes, 0], ids=["at once", "by layer"])
def test_averages_follow_experts_that_move(spare_bytes):
    steps, config = 7, replace(MOVING, spare_bytes=spare_bytes)
    fixed, _ = run_ranks(move, 4, replace(config, rebalance_every=0), steps, run_timeout_s=120)[0]
    results = run_ranks(move, 4, config, steps, run_timeout_s=120)
    assert sum(moved for _, moved in results) > 0
    moving, _ = results[0]
    assert moving.keys() == fixed.keys()
    # Where an expert lives changes its training by rounding only (float64), so its average too.
    for key, average in fixed.items():
        expected = average[:1].expand_as(moving[key])
        torch.testing.assert_close(moving[key], expected, rtol=0, atol=1e-6)
    assert (fixed["0.down", 0][0] - fixed["0.down", 1][0]).abs().max() > 1e-3  # experts do differ


def follow(config, steps):
    """For each step whether experts of this rank's layers switched, and whether the average was
    waited for."""
    trainer = make(config)
    layers = [layer.index for layer in trainer._moe_layers()]
    followed, following = [], trainer.average.following

    def noted(balancer):
        followed[-1] = True
        return following(balancer)

    trainer.average.following = noted
    switched = []
    for _ in range(steps):
        before = trainer.balancer.placement.phy2log[layers]
        followed.append(False)
        trainer.step()
        switched.append(not torch.equal(before, trainer.balancer.placement.phy2log[layers]))
    trainer.close()
    return switched, followed


def test_only_steps_that_switch_experts_wait_for_the_average():
    for switched, followed in run_ranks(follow, 4, MOVING, 7, run_timeout_s=120):
        assert followed == switched
        assert any(switched)
        assert not all(switched)


def resume(config, split, steps):
    """Averages of a run, and of one that was resumed in the middle."""
    straight, first, second = make(config), make(config), make(config)
    for trainer, count in ((straight, split), (first, split)):
        for _ in range(count):
            trainer.step()
            trainer.average.ema.flush()
    state = first.state_dict()
    second.load_state_dict(state)
    for trainer in (straight, second):
        for _ in range(steps - split):
            trainer.step()
            trainer.average.ema.flush()
    ours, theirs = straight.average.ema.averages(), second.average.ema.averages()
    same = all(torch.equal(ours[n], theirs[n]) for n in ours)
    moved_on = any(not torch.equal(ours[n], state["ema"]["average"][n]) for n in ours)
    result = same, moved_on, second.average.ema.steps
    for trainer in (straight, first, second):
        trainer.close()
    return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_average_has_the_same_bits(dtype):
    config = replace(MOVING, ema_dtype=dtype)
    for result in run_ranks(resume, 4, config, 4, 7, run_timeout_s=120):
        assert result == (True, True, 7)


def slow_worker(config, steps):
    """Steps taken while the first update hangs: nobody waits for it."""
    import threading

    trainer = make(config)
    gate = threading.Event()
    add = trainer.average.ema._add

    def held(*args):
        assert gate.wait(60)
        add(*args)

    trainer.average.ema._add = held
    for _ in range(steps):
        trainer.step()
    counted = trainer.average.ema.steps, trainer.average.ema.skipped
    gate.set()
    trainer.close()
    return counted


def test_no_step_waits_for_the_average():
    assert run_ranks(slow_worker, 4, WITH, 3, run_timeout_s=120) == [(3, 2)] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema": 1.0}, "decay above 0 and below 1, got 1.0"),
        ({"ema": 0.0}, "decay above 0 and below 1, got 0.0"),
        ({"ema": 0.9, "ema_dtype": "float16"}, "ema_dtype of float32, bfloat16, got 'float16'"),
    ],
)
def test_impossible_averages_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)
