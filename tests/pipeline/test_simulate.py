"""Times: published numbers and formulas, a timeline by hand, and an independent simulation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_ext.pipeline.plan import KINDS, Op, Pair, Plan, build_plan, parts
from dualpipe_ext.pipeline.simulate import Durations, Simulation, Span, simulate


def run(kind: str, num_ranks: int, num_chunks: int, **durations: float) -> Simulation:
    plan = build_plan(kind, num_ranks=num_ranks, num_chunks=num_chunks)
    return simulate(plan, Durations(**durations))


def slow_ends(plan: Plan, durations: Durations) -> list[list[float]]:
    """The same times, action by action: the end of every step of every rank."""
    work = plan.num_ranks / len(plan.pipes[0])
    hidden = durations.FB / (durations.F + durations.B)
    ends: list[list[float]] = [[] for _ in plan.actions]
    done: dict[tuple[str, int, int], float] = {}
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(plan.actions):
            if len(ends[rank]) == len(steps):
                continue
            step = steps[len(ends[rank])]
            start = ends[rank][-1] if ends[rank] else 0.0
            for op, stage, chunk in parts(step):
                source = stage - 1 if op is Op.F else stage + 1
                at_end = plan.is_first(stage) if op is Op.F else plan.is_last(stage)
                if op is Op.W or at_end:
                    continue
                away = durations.comm if plan.stage_rank[source] != rank else 0.0
                kind = "F" if op is Op.F else "B"
                start = max(start, done.get((kind, source, chunk), np.inf) + away)
            if start == np.inf:
                continue
            moved = True
            cost = sum(getattr(durations, action.op.value) for action in parts(step))
            ends[rank].append(start + work * cost * (hidden if isinstance(step, Pair) else 1))
            for op, stage, chunk in parts(step):
                if op is not Op.W:
                    done["F" if op is Op.F else "B", stage, chunk] = ends[rank][-1]
    return ends


@pytest.mark.parametrize(
    ("kind", "bubble", "percent", "activations", "copies"),
    [
        ("1f1b", 21, 25.9, 8, 1),
        ("zb1p", 7, 10.4, 8, 1),
        ("zbv", 3.5, 5.5, 8, 1),
        ("dualpipe", 6, 9.1, 9, 2),
    ],
)
def test_published_numbers(
    kind: str, bubble: float, percent: float, activations: float, copies: float
) -> None:
    """8 stages, 20 micro-batches, F = I = W = 1, useful work 60."""
    result = run(kind, 8, 20, F=1, I=1, W=1, FB=3)
    assert result.busy.tolist() == [60] * 8
    assert result.bubble.tolist() == [bubble] * 8
    assert round(100 * result.bubble_ratio, 1) == percent
    assert result.makespan == 60 + bubble
    assert result.peak_activations.max() == activations
    assert result.parameter_copies.tolist() == [copies] * 8


def test_published_numbers_of_dualpipev() -> None:
    """The same 8 stages are 4 ranks of two whole stages each, and half of the micro-batches."""
    plan = build_plan("dualpipev", num_ranks=4, num_chunks=10)
    result = simulate(plan, Durations(stage_scale=(1,) * 8))
    assert result.bubble.tolist() == [6] * 4
    assert round(100 * result.bubble_ratio, 1) == 9.1
    assert result.peak_activations.tolist() == [9] * 4
    assert result.parameter_copies.tolist() == [2] * 4


def test_dualpipev_on_as_many_ranks() -> None:
    """The same model on the same 8 ranks: stages of half the size, and no second copy."""
    result = run("dualpipev", 8, 20)
    assert result.bubble.tolist() == [7] * 8
    assert result.peak_activations.tolist() == [8.5] * 8
    assert result.parameter_copies.tolist() == [1] * 8


@pytest.mark.parametrize("num_chunks", [16, 20, 34])
@pytest.mark.parametrize(("f", "i", "w"), [(1, 1, 1), (1, 1.5, 1), (1, 1, 0.5), (2, 3, 1)])
def test_published_formulas(f: float, i: float, w: float, num_chunks: int) -> None:
    b = i + w
    times = {"F": f, "I": i, "W": w}
    assert run("1f1b", 8, num_chunks, **times).bubble.tolist() == [7 * (f + b)] * 8
    assert run("zb1p", 8, num_chunks, **times).bubble.tolist() == [7 * (f + b - 2 * w)] * 8


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 12])
@pytest.mark.parametrize(("f", "w", "fb"), [(1, 1, 3), (1, 0.5, 2.5), (1, 1, 2.5), (1, 1, 2)])
def test_published_formula_of_dualpipe(num_ranks: int, f: float, w: float, fb: float) -> None:
    """(PP/2 - 1)(F&B + B - 3W), with I as long as F, for the rank that idles most."""
    b = f + w
    expected = (num_ranks / 2 - 1) * (fb + b - 3 * w)
    result = run("dualpipe", num_ranks, 3 * num_ranks, F=f, I=f, W=w, FB=fb)
    assert result.bubble.max() == expected
    in_half = build_plan("dualpipev", num_ranks=num_ranks // 2, num_chunks=3 * num_ranks // 2)
    durations = dataclasses.replace(result.durations, stage_scale=(1,) * num_ranks)
    assert simulate(in_half, durations).bubble.max() == expected


@pytest.mark.parametrize("num_ranks", [2, 4, 6])
def test_peak_activations(num_ranks: int) -> None:
    many = 4 * num_ranks
    falling = list(range(num_ranks, 0, -1))
    assert run("1f1b", num_ranks, many).peak_activations.tolist() == falling
    for kind, peak in (
        ("zb1p", num_ranks),
        ("zbv", num_ranks),
        ("dualpipe", num_ranks + 1),
        ("dualpipev", num_ranks + 0.5),
    ):
        assert run(kind, num_ranks, many).peak_activations.tolist() == [peak] * num_ranks


def test_timeline_by_hand() -> None:
    result = run("1f1b", 2, 2, F=1, B=2, comm=0.5)
    f0, f1, b0, b1 = result.plan.actions[0]
    assert result.timeline(0) == (
        Span(f0, 0, 1),
        Span(f1, 1, 2),
        Span(b0, 5, 7),  # rank 1: forward 1.5 to 2.5, backward to 4.5, and half a unit back
        Span(b1, 8, 10),
    )
    assert result.starts[1].tolist() == [1.5, 2.5, 4.5, 5.5]
    assert result.ends[1].tolist() == [2.5, 4.5, 5.5, 7.5]
    assert result.makespan == 10
    assert result.bubble.tolist() == [4, 4]
    assert result.mean_bubble == 4
    assert result.bubble_ratio == 0.4


def test_no_communication_at_the_turn_of_a_v() -> None:
    assert run("zbv", 1, 1, F=1, B=2, comm=100).makespan == 3


@settings(max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    half=st.integers(1, 3),
    extra=st.integers(0, 5),
    times=st.tuples(*[st.integers(0, 8).map(lambda n: n / 4)] * 4),
)
def test_agrees_with_a_slow_simulation(
    kind: str, half: int, extra: int, times: tuple[float, ...]
) -> None:
    num_ranks = 2 * half if kind == "dualpipe" else 2 * half - 1
    num_chunks = 2 * num_ranks + 2 * extra
    i, w, fb, comm = times
    durations = Durations(F=1, I=i, W=w, FB=1 + fb, comm=comm)
    plan = build_plan(kind, num_ranks=num_ranks, num_chunks=num_chunks)
    result = simulate(plan, durations)
    for mine, expected in zip(result.ends, slow_ends(plan, durations), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_written_out_plans_give_the_same(kind: str) -> None:
    plan = build_plan(kind, num_ranks=6, num_chunks=14)
    durations = Durations(F=1.25, B=2.5, W=0.75, FB=3, comm=0.5)
    compact = simulate(plan, durations)
    written_out = simulate(dataclasses.replace(plan, actions=tuple(plan.actions)), durations)
    for mine, other in zip(compact.ends, written_out.ends, strict=True):
        assert mine.tolist() == other.tolist()
    assert compact.peak_activations.tolist() == written_out.peak_activations.tolist()


def test_overlap_shortens_pairs_only() -> None:
    alone, hidden = run("dualpipe", 4, 12), run("dualpipe", 4, 12, FB=2)
    assert hidden.makespan < alone.makespan
    for rank, steps in enumerate(hidden.plan.actions):
        for (step, start, end), before in zip(
            hidden.timeline(rank), alone.timeline(rank), strict=True
        ):
            assert step in steps
            same = end - start == before.end - before.start
            assert same is not isinstance(step, Pair)
    assert run("zbv", 4, 12, FB=2).makespan == run("zbv", 4, 12).makespan


def test_uneven_stages() -> None:
    plan = build_plan("1f1b", num_ranks=2, num_chunks=4)
    result = simulate(plan, Durations(stage_scale=(1, 1.5)))
    assert result.busy.tolist() == [12, 18]
    assert result.makespan == 1 + 18 + 2
    assert result.parameter_copies.tolist() == [1, 1.5]
    assert result.peak_activations.tolist() == [2, 1.5]


def test_defaults_of_durations() -> None:
    def times(**given: float) -> tuple[float, ...]:
        d = Durations(**given)
        return d.F, d.B, d.I, d.W, d.FB

    assert times() == (1, 2, 1, 1, 3)
    assert times(F=2) == (2, 4, 2, 2, 6)
    assert times(B=3) == (1, 3, 1.5, 1.5, 4)
    assert times(B=3, W=1) == (1, 3, 2, 1, 4)
    assert times(B=3, I=1) == (1, 3, 1, 2, 4)
    assert times(I=3) == (1, 4, 3, 1, 5)
    assert times(B=1.8, I=1, W=1, FB=2.1) == (1, 1.8, 1, 1, 2.1)
    moved = dataclasses.replace(Durations(F=2), comm=1)
    assert (moved.F, moved.B, moved.comm) == (2, 4, 1)


@pytest.mark.parametrize(
    ("given_times", "message"),
    [
        ({"F": -1}, "expected F to be a finite time of at least 0, got -1"),
        ({"comm": float("inf")}, "expected comm to be a finite time of at least 0, got inf"),
        ({"FB": float("nan")}, "expected FB to be a finite time of at least 0, got nan"),
        ({"B": 1, "W": 2}, "expected a split of B = 1 into I and W of at least 0, got I = -1"),
        ({"F": 0, "B": 0}, "expected a positive F or B"),
        ({"stage_scale": (1, -1)}, "expected stage_scale to be a finite time of at least 0"),
    ],
)
def test_bad_durations(given_times: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Durations(**given_times)


def test_stage_scale_must_fit() -> None:
    plan = build_plan("dualpipe", num_ranks=4, num_chunks=8)
    with pytest.raises(ValueError, match="expected stage_scale for 4 model stages of dualpipe"):
        simulate(plan, Durations(stage_scale=(1,) * 8))


def test_a_rank_without_stages() -> None:
    plan = build_plan("1f1b", num_ranks=1, num_chunks=2)
    plan = dataclasses.replace(plan, num_ranks=2, actions=(*plan.actions, ()))
    result = simulate(plan, Durations(stage_scale=(1,)))
    assert result.makespan == 6
    assert result.bubble.tolist() == [0, 6]
    assert result.timeline(1) == ()


def test_plans_from_elsewhere_are_checked() -> None:
    plan = build_plan("1f1b", num_ranks=2, num_chunks=2)
    with pytest.raises(ValueError, match="got nothing"):
        simulate(dataclasses.replace(plan, actions=(plan.actions[0], ())))
