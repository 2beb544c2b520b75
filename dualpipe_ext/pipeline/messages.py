"""Which tensors travel between ranks, in which order, as it follows from a plan.

What belongs here: naming messages and listing them per pair of ranks. A message is named by the
action that produces it: ``F`` of a stage sends its outputs to the rank of the next stage, ``B``
(full or input-only) the gradients of its inputs to the rank of the one before. Sender and receiver
derive the same list from the same plan, so messages carry no names.

The runtime's freedom from deadlock rests on this module: see ``runtime.py``.
"""

from __future__ import annotations

from collections import defaultdict

from dualpipe_ext.pipeline.plan import Action, Op, Plan, parts


def destination(plan: Plan, action: Action) -> int | None:
    """The virtual stage that takes what ``action`` produces; None at the ends of a pipe."""
    if action.op is Op.W:
        return None
    if action.op is Op.F:
        return None if plan.is_last(action.stage) else action.stage + 1
    return None if plan.is_first(action.stage) else action.stage - 1


def source(plan: Plan, action: Action) -> Action | None:
    """The action whose product ``action`` needs; None where the batch or the loss is its source."""
    if action.op is Op.W:
        return None
    if action.op is Op.F:
        return None if plan.is_first(action.stage) else Action(Op.F, action.stage - 1, action.chunk)
    return None if plan.is_last(action.stage) else Action(Op.B, action.stage + 1, action.chunk)


def sent(plan: Plan, rank: int, *, forward_only: bool) -> dict[int, list[Action]]:
    """The messages that ``rank`` sends, per receiving rank, in the order it sends them."""
    messages: dict[int, list[Action]] = defaultdict(list)
    for step in plan.actions[rank]:
        for action in parts(step):
            if forward_only and action.op is not Op.F:
                continue
            stage = destination(plan, action)
            if stage is not None and plan.stage_rank[stage] != rank:
                messages[plan.stage_rank[stage]].append(name(action))
    return messages


def name(action: Action) -> Action:
    """The message that ``action`` produces: an I sends what a B would."""
    return action._replace(op=Op.B) if action.op is Op.I else action


def links(plan: Plan) -> list[tuple[int, int]]:
    """All ordered pairs of ranks (source, destination) that exchange messages, sorted."""
    pairs: set[tuple[int, int]] = set()
    for pipe in plan.pipes:
        for stage in pipe[:-1]:
            here, there = plan.stage_rank[stage], plan.stage_rank[stage + 1]
            if here != there:
                pairs |= {(here, there), (there, here)}
    return sorted(pairs)
