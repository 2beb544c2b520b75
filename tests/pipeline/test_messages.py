"""Which messages follow from a plan, and in which order."""

from __future__ import annotations

import pytest

from dualpipe_ext.pipeline.messages import destination, links, name, sent, source
from dualpipe_ext.pipeline.plan import KINDS, Action, Op, build_plan, parts


def test_v_turns_around_without_a_message():
    plan = build_plan("dualpipev", num_ranks=2, num_chunks=4)
    assert destination(plan, Action(Op.F, 1, 0)) == 2
    assert destination(plan, Action(Op.F, 3, 0)) is None
    assert source(plan, Action(Op.I, 1, 3)) == Action(Op.B, 2, 3)
    assert source(plan, Action(Op.B, 3, 0)) is None
    assert source(plan, Action(Op.F, 0, 0)) is None
    assert destination(plan, Action(Op.W, 1, 0)) is source(plan, Action(Op.W, 1, 0)) is None
    assert name(Action(Op.I, 1, 3)) == Action(Op.B, 1, 3)
    assert links(plan) == [(0, 1), (1, 0)]
    down = sent(plan, 0, forward_only=True)[1]
    assert down == [Action(Op.F, 0, chunk) for chunk in range(4)]


def test_directions_of_dualpipe_are_not_joined():
    plan = build_plan("dualpipe", num_ranks=2, num_chunks=4)
    assert destination(plan, Action(Op.F, 1, 0)) is None
    assert source(plan, Action(Op.F, 2, 0)) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forward_only", [False, True])
def test_everything_needed_is_sent_once(kind, forward_only):
    plan = build_plan(kind, num_ranks=4, num_chunks=10)
    messages = [
        (message, rank, peer)
        for rank in range(4)
        for peer, queue in sent(plan, rank, forward_only=forward_only).items()
        for message in queue
    ]
    assert len({message for message, _, _ in messages}) == len(messages)
    assert {(rank, peer) for _, rank, peer in messages} <= set(links(plan))
    needed = set()
    for rank in range(4):
        for action in (a for step in plan.actions[rank] for a in parts(step)):
            message = source(plan, action)
            if message is None or (forward_only and action.op is not Op.F):
                continue
            if plan.stage_rank[message.stage] != rank:
                needed.add((message, plan.stage_rank[message.stage], rank))
    assert needed == set(messages)
