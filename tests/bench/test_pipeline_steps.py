"""What the simulator is given, and what counts as another step than the expected one."""

from __future__ import annotations

from collections import defaultdict

import pytest

from dualpipe_ext.bench.pipeline_steps import add_action_times, durations, wrong_fingerprint
from dualpipe_ext.pipeline.plan import build_plan
from dualpipe_ext.pipeline.simulate import Durations, simulate
from dualpipe_ext.pipeline.timing import ActionTime, StepRecord


def simulated_records(plan, given):
    simulation = simulate(plan, given)
    return simulation, [
        StepRecord(
            tuple(ActionTime(str(s.step), 0.0, s.start, s.end) for s in simulation.timeline(rank)),
            simulation.makespan,
        )
        for rank in range(plan.num_ranks)
    ]


@pytest.mark.parametrize("kind", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_times_of_a_simulated_step_predict_that_step(kind):
    plan = build_plan(kind, num_ranks=4, num_chunks=10)
    given = Durations(F=3.0, I=2.5, W=2.0, B=4.75, FB=6.0, comm=0.125)
    simulation, records = simulated_records(plan, given)
    seconds = defaultdict(list)
    add_action_times(seconds, plan, records)
    assert sum(map(len, seconds.values())) == sum(len(steps) for steps in plan.actions)
    medians = {name: values[0] for name, values in seconds.items()}
    predicted = simulate(plan, durations(plan, medians, comm=0.125))
    assert predicted.makespan == pytest.approx(simulation.makespan)
    assert predicted.bubble_ratio == pytest.approx(simulation.bubble_ratio)
    measured = [record.bubble(simulation.makespan) for record in records]
    assert sum(measured) / 4 == pytest.approx(simulation.bubble_ratio)


def test_another_loss_or_gradient_is_wrong():
    assert wrong_fingerprint((100.0, 5.0), (101.0, 5.05)) is None
    wrong = wrong_fingerprint((100.0, 5.0), (101.0, 6.0))
    assert wrong == "expected squared gradients that sum to 6, got 5"
    assert "losses" in wrong_fingerprint((float("nan"), 5.0), (101.0, 5.0))
