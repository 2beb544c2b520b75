"""Plans as data: their helpers, the shapes that exist, and the check that finds bad ones."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_ext.pipeline.plan import KINDS, Action, Op, Pair, Plan, build_plan, check_plan, parts


def edited(plan: Plan, rank: int, steps: list[Action | Pair]) -> Plan:
    actions = list(plan.actions)
    actions[rank] = tuple(steps)
    return dataclasses.replace(plan, actions=tuple(actions))


@settings(max_examples=60)
@given(kind=st.sampled_from(KINDS), half=st.integers(1, 5), extra=st.integers(0, 14))
def test_every_plan_is_complete_and_does_not_deadlock(kind: str, half: int, extra: int) -> None:
    # Odd rank counts and fewer chunks than ranks, where the kind has them.
    num_ranks = 2 * half if kind == "dualpipe" else 2 * half - 1
    num_chunks = {
        "dualpipe": 2 * num_ranks + 2 * extra,
        "dualpipev": 2 * num_ranks + extra,
    }.get(kind, 1 + extra)
    check_plan(build_plan(kind, num_ranks=num_ranks, num_chunks=num_chunks))


def test_notation_is_torchs() -> None:
    forward, backward = Action(Op.F, 3, 7), Action(Op.B, 4, 2)
    assert str(forward) == "3F7"
    assert str(Pair(forward, backward)) == "(3F7;4B2)OVERLAP_F_B"
    assert parts(forward) == (forward,)
    assert parts(Pair(forward, backward)) == (forward, backward)


def test_helpers_of_two_pipes() -> None:
    plan = build_plan("DualPipe", num_ranks=4, num_chunks=10)
    assert plan.kind == "dualpipe"
    assert plan.stage_rank == (0, 1, 2, 3, 3, 2, 1, 0)
    assert plan.pipes == (range(4), range(4, 8))
    assert plan.num_stages == 8
    assert plan.has_copies
    assert [plan.stages_of(rank) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    assert [plan.pipe_of(stage) for stage in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [plan.model_stage(stage) for stage in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [stage for stage in range(8) if plan.is_first(stage)] == [0, 4]
    assert [stage for stage in range(8) if plan.is_last(stage)] == [3, 7]
    assert plan.chunks_of_pipe(1) == 5
    with pytest.raises(ValueError, match=r"expected a stage in 0\.\.7, got 8"):
        plan.pipe_of(8)
    with pytest.raises(ValueError, match=r"expected a pipe in 0\.\.1, got 2"):
        plan.chunks_of_pipe(2)


@pytest.mark.parametrize("kind", ["dualpipev", "zbv"])
def test_helpers_of_a_v(kind: str) -> None:
    plan = build_plan(kind, num_ranks=3, num_chunks=6)
    assert plan.stage_rank == (0, 1, 2, 2, 1, 0)
    assert plan.pipes == (range(6),)
    assert not plan.has_copies
    assert plan.stages_of(0) == (0, 5)
    assert [stage for stage in range(6) if plan.is_last(stage)] == [5]
    assert plan.chunks_of_pipe(0) == 6


@pytest.mark.parametrize("kind", ["1f1b", "zb1p"])
def test_helpers_of_one_stage_a_rank(kind: str) -> None:
    plan = build_plan(kind, num_ranks=3, num_chunks=2)
    assert plan.stage_rank == (0, 1, 2)
    assert plan.pipes == (range(3),)
    assert plan.stages_of(1) == (1,)


def test_actions_behave_like_tuples() -> None:
    plan = build_plan("dualpipev", num_ranks=4, num_chunks=9)
    written_out = dataclasses.replace(plan, actions=tuple(plan.actions))
    assert plan == written_out
    assert written_out == plan
    assert hash(plan) == hash(written_out)
    assert plan == build_plan("dualpipev", num_ranks=4, num_chunks=9)
    assert plan != build_plan("dualpipev", num_ranks=4, num_chunks=10)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert plan.actions[-1] == plan.actions[3]
    assert plan.actions[1:3] == (plan.actions[1], plan.actions[2])
    with pytest.raises(IndexError):
        plan.actions[4]


@pytest.mark.parametrize(
    ("kind", "num_ranks", "num_chunks", "message"),
    [
        ("dualpipe", 8, 15, "expected an even num_chunks of at least 16 for dualpipe on 8 ranks"),
        ("dualpipe", 8, 14, "expected an even num_chunks of at least 16 for dualpipe on 8 ranks"),
        ("dualpipe", 7, 20, "expected an even num_ranks for dualpipe, got 7 .dualpipev takes any"),
        ("dualpipev", 4, 7, "expected num_chunks of at least 8 for dualpipev on 4 ranks, got 7"),
        ("dualpipev", 1, 1, "expected num_chunks of at least 2 for dualpipev on 1 rank, got 1"),
        ("1f1b", 0, 4, "expected num_ranks to be a positive integer, got 0"),
        ("zbv", 2, -1, "expected num_chunks to be a positive integer, got -1"),
        ("1f1b", 10**9, 20, "num_ranks x num_chunks of at most 33554432, got 1000000000 x 20"),
        ("1f1b", 1, 10**7, "expected num_chunks of at most 1048576"),
        ("zb1p", 2, 2.0, "expected num_chunks to be a positive integer, got 2.0"),
        (None, 2, 2, "expected a kind of dualpipe, dualpipev, 1f1b, zb1p, zbv, got None"),
        ("gpipe", 2, 2, "expected a kind of dualpipe, dualpipev, 1f1b, zb1p, zbv, got 'gpipe'"),
    ],
)
def test_impossible_shapes_say_what_works(
    kind: str, num_ranks: int, num_chunks: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_plan(kind, num_ranks=num_ranks, num_chunks=num_chunks)


def test_check_finds_a_missing_action() -> None:
    plan = build_plan("1f1b", num_ranks=2, num_chunks=3)
    with pytest.raises(ValueError, match=r"stage 1 chunk 2, got F$"):
        check_plan(edited(plan, 1, list(plan.actions[1][:-1])))


def test_check_finds_a_repeated_action() -> None:
    plan = build_plan("1f1b", num_ranks=2, num_chunks=3)
    with pytest.raises(ValueError, match="stage 0 chunk 0, got F B B"):
        check_plan(edited(plan, 0, [*plan.actions[0], Action(Op.B, 0, 0)]))


def test_check_finds_a_weight_gradient_without_its_backward() -> None:
    plan = build_plan("1f1b", num_ranks=1, num_chunks=1)
    with pytest.raises(ValueError, match="stage 0 chunk 0, got F W"):
        check_plan(edited(plan, 0, [Action(Op.F, 0, 0), Action(Op.W, 0, 0)]))


def test_check_finds_an_action_on_the_wrong_rank() -> None:
    plan = build_plan("1f1b", num_ranks=2, num_chunks=3)
    with pytest.raises(ValueError, match="expected stage 1 on rank 1, got 1F0 on rank 0"):
        check_plan(edited(plan, 0, [Action(Op.F, 1, 0), *plan.actions[0]]))


def test_check_finds_a_chunk_out_of_range() -> None:
    plan = build_plan("dualpipe", num_ranks=2, num_chunks=4)
    with pytest.raises(ValueError, match="chunks below 2, got 0F2 on rank 0"):
        check_plan(edited(plan, 0, [*plan.actions[0], Action(Op.F, 0, 2)]))


def test_check_finds_a_pair_of_the_wrong_operations() -> None:
    plan = build_plan("zb1p", num_ranks=1, num_chunks=2)
    first, second = Action(Op.I, 0, 0), Action(Op.F, 0, 1)
    steps = [Action(Op.F, 0, 0), Pair(second, first), Action(Op.W, 0, 0)]
    steps += [Action(Op.I, 0, 1), Action(Op.W, 0, 1)]
    with pytest.raises(ValueError, match="expected a pair of one F and one B"):
        check_plan(edited(plan, 0, steps))


def test_check_finds_a_deadlock() -> None:
    plan = build_plan("1f1b", num_ranks=2, num_chunks=2)
    # Rank 0 wants a gradient that rank 1 makes only after the forward that rank 0 does later.
    f0, f1, b0, b1 = plan.actions[0]
    plan = edited(plan, 0, [f0, b0, f1, b1])
    check_plan(plan)
    f0, b0, f1, b1 = plan.actions[1]
    plan = edited(plan, 1, [f0, f1, b0, b1])
    with pytest.raises(ValueError, match="deadlock: rank 0 at 0B0, rank 1 at 1F1"):
        check_plan(plan)


def test_check_finds_a_pair_that_waits_for_itself() -> None:
    plan = build_plan("1f1b", num_ranks=1, num_chunks=1)
    pair = Pair(Action(Op.F, 0, 0), Action(Op.B, 0, 0))
    with pytest.raises(ValueError, match="deadlock: rank 0 at"):
        check_plan(edited(plan, 0, [pair]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_ranks": 3}, "expected actions for 3 ranks, got 2"),
        ({"stage_rank": (0, 5)}, r"expected stages on ranks 0\.\.1, got rank 5"),
        ({"pipes": (range(1),)}, r"expected pipes that cover stages 0\.\.1 in order"),
        ({"pipes": (range(1), range(1, 2)), "num_chunks": 3}, "multiple of the 2 pipes, got 3"),
    ],
)
def test_check_finds_a_wrong_structure(change: dict[str, object], message: str) -> None:
    plan = dataclasses.replace(build_plan("1f1b", num_ranks=2, num_chunks=2), **change)
    with pytest.raises(ValueError, match=message):
        check_plan(plan)


def test_importing_plans_does_not_import_torch() -> None:
    code = "import dualpipe_ext.cli.schedule, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
