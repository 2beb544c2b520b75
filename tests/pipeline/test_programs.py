"""The orders: against torch's own schedules, the published table, and their symmetries."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleZBVZeroBubble,
)

from dualpipe_ext.pipeline.plan import Action, Op, Pair, Plan, build_plan, parts


def torch_order(schedule: type, num_ranks: int, num_chunks: int) -> list[list[str]]:
    """What a torch schedule with two stages per rank does, without a process group."""
    stages = [
        SimpleNamespace(
            stage_index=index,
            num_stages=2 * num_ranks,
            group_size=num_ranks,
            group_rank=0,
            is_last=False,
            submod=None,
        )
        for index in (0, 2 * num_ranks - 1)
    ]
    order = schedule(stages, num_chunks).pipeline_order
    return [[str(action) for action in order[rank] if action] for rank in range(num_ranks)]


def own_order(kind: str, num_ranks: int, num_chunks: int) -> list[list[str]]:
    plan = build_plan(kind, num_ranks=num_ranks, num_chunks=num_chunks)
    return [[str(step) for step in steps] for steps in plan.actions]


@pytest.mark.parametrize("num_ranks", range(1, 8))
def test_dualpipev_is_torchs(num_ranks: int) -> None:
    least = 2 * num_ranks
    for num_chunks in (least, least + 1, least + 2, 3 * num_ranks + 1, 24):
        expected = torch_order(ScheduleDualPipeV, num_ranks, num_chunks)
        assert own_order("dualpipev", num_ranks, num_chunks) == expected


@pytest.mark.parametrize("num_ranks", range(1, 8))
def test_zbv_is_torchs(num_ranks: int) -> None:
    for num_chunks in (1, 2, num_ranks, 2 * num_ranks - 1, 2 * num_ranks, 20):
        expected = torch_order(ScheduleZBVZeroBubble, num_ranks, num_chunks)
        assert own_order("zbv", num_ranks, num_chunks) == expected


@pytest.mark.parametrize("num_ranks", range(1, 8))
def test_1f1b_is_torchs(num_ranks: int) -> None:
    for num_chunks in (num_ranks, num_ranks + 1, 3 * num_ranks):
        # The order is computed from these two attributes; torch's own execution does not use it.
        schedule = SimpleNamespace(_num_stages=num_ranks, _n_microbatches=num_chunks)
        theirs = Schedule1F1B._get_pipeline_order(schedule)
        ours = own_order("1f1b", num_ranks, num_chunks)
        for rank in range(num_ranks):
            expected = [
                str(action)
                for action in theirs[rank]
                if action is not None and action.computation_type.value in ("F", "B")
            ]
            if rank == num_ranks - 1:
                # torch numbers the last rank's forwards from 1 on; its backwards from 0 on.
                expected = [
                    f"{rank}F{int(text.split('F')[1]) - 1}" if "F" in text else text
                    for text in expected
                ]
            assert ours[rank] == expected


def published_rounds(num_ranks: int, rank: int, num_chunks: int) -> list[str]:
    """DualPipe's published table, operation by operation: phases are 0 and 1, a pair is F0&B1."""
    half = num_ranks // 2
    k = min(rank, num_ranks - 1 - rank)
    order = ["F0"] * (2 * (half - k - 1))
    order += ["F0", "F1"] * (k + 1)
    order += ["I1", "W", "F1"] * (half - k - 1)
    for index in range(num_chunks // 2 - num_ranks + k + 1):
        if index == 0 and k == half - 1:
            order += ["F0", "B1", "F1&B0"]
        else:
            order += ["F0&B1", "F1&B0"]
    order += ["B1", "F1&B0"] * (half - k - 1)
    input_only = False
    for index in range(k + 1):
        if k % 2 == 1 and index == (k + 1) // 2:
            input_only = True
        order.append("I1" if input_only else "B1")
        if k % 2 == 0 and index == k // 2:
            input_only = True
        order.append("I0" if input_only else "B0")
    order += ["W", "I0"] * (half - k - 1)
    order += ["W"] * (k + 1)
    if rank >= half:  # the phases change places
        order = [text.translate(str.maketrans("01", "10")) for text in order]
    return order


def phases(plan: Plan, rank: int) -> list[str]:
    """The plan's steps in the notation of ``published_rounds``."""
    first, _ = plan.stages_of(rank)

    def name(action: Action) -> str:
        if action.op is Op.W:
            return "W"
        return f"{action.op}{0 if action.stage == first else 1}"

    return ["&".join(map(name, parts(step))) for step in plan.actions[rank]]


@pytest.mark.parametrize(
    ("num_ranks", "num_chunks"), [(2, 4), (2, 10), (4, 8), (6, 14), (8, 16), (8, 20), (12, 36)]
)
def test_dualpipe_follows_the_published_table(num_ranks: int, num_chunks: int) -> None:
    plan = build_plan("dualpipe", num_ranks=num_ranks, num_chunks=num_chunks)
    for rank in range(num_ranks):
        assert phases(plan, rank) == published_rounds(num_ranks, rank, num_chunks)


@pytest.mark.parametrize(("num_ranks", "num_chunks"), [(2, 4), (4, 10), (8, 20), (10, 30)])
@pytest.mark.parametrize("kind", ["dualpipe", "dualpipev"])
def test_dualpipe_numbers_chunks_in_order(kind: str, num_ranks: int, num_chunks: int) -> None:
    """Chunks ascend in every stage and direction; W takes the oldest I of the whole rank."""
    plan = build_plan(kind, num_ranks=num_ranks, num_chunks=num_chunks)
    chunks = list(range(plan.chunks_of_pipe(0)))
    for rank in range(num_ranks):
        actions = [action for step in plan.actions[rank] for action in parts(step)]
        for stage in plan.stages_of(rank):
            mine = [action for action in actions if action.stage == stage]
            assert [a.chunk for a in mine if a.op is Op.F] == chunks
            assert [a.chunk for a in mine if a.op in (Op.B, Op.I)] == chunks
        inputs = [action[1:] for action in actions if action.op is Op.I]
        assert [action[1:] for action in actions if action.op is Op.W] == inputs


@pytest.mark.parametrize(("half", "chunks"), [(1, 2), (2, 5), (3, 6), (4, 10), (5, 11)])
def test_half_of_dualpipe_is_dualpipev(half: int, chunks: int) -> None:
    whole = build_plan("dualpipe", num_ranks=2 * half, num_chunks=2 * chunks)
    cut = build_plan("dualpipev", num_ranks=half, num_chunks=chunks)
    # Rank r holds stages r and last - r; only the number of the last one differs.
    shift = whole.num_stages - cut.num_stages

    def relabel(action: Action) -> Action:
        return action._replace(stage=action.stage + shift * (action.stage >= half))

    for rank in range(half):
        expected = tuple(
            Pair(relabel(step.forward), relabel(step.backward))
            if isinstance(step, Pair)
            else relabel(step)
            for step in cut.actions[rank]
        )
        assert whole.actions[rank] == expected


@pytest.mark.parametrize(("num_ranks", "num_chunks"), [(2, 4), (4, 10), (8, 20)])
def test_dualpipe_is_its_mirror_image(num_ranks: int, num_chunks: int) -> None:
    """Turning the ranks round and exchanging the pipes changes nothing."""
    plan = build_plan("dualpipe", num_ranks=num_ranks, num_chunks=num_chunks)

    def mirror(action: Action) -> Action:
        return action._replace(stage=(action.stage + num_ranks) % (2 * num_ranks))

    for rank in range(num_ranks):
        mirrored = tuple(
            Pair(mirror(step.forward), mirror(step.backward))
            if isinstance(step, Pair)
            else mirror(step)
            for step in plan.actions[num_ranks - 1 - rank]
        )
        assert plan.actions[rank] == mirrored


def test_first_pair_of_the_middle_ranks_is_not_overlapped() -> None:
    plan = build_plan("dualpipe", num_ranks=8, num_chunks=20)
    pairs = [sum(isinstance(step, Pair) for step in steps) for steps in plan.actions]
    assert pairs == [9, 10, 11, 11, 11, 11, 10, 9]


def test_zb1p_lags_by_its_rank() -> None:
    plan = build_plan("zb1p", num_ranks=3, num_chunks=4)
    assert [" ".join(map(str, steps)) for steps in plan.actions] == [
        "0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3",
        "1F0 1F1 1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3",
        "2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3",
    ]
