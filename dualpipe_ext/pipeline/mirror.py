"""Stage copies: in DualPipe every model stage is on two ranks, and both copies must learn the same.

What belongs here: summing the gradients of the two copies of each stage, and checking that they are
copies. A rank holds two stages, and the copies of both are on its mirror rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from dualpipe_ext.pipeline.p2p import Channel, Incoming
from dualpipe_ext.pipeline.plan import Plan

_AHEAD = 2  # gradients on their way, the one being added included


def mirror_rank(plan: Plan, rank: int) -> int:
    """The rank that holds the copies of the stages of ``rank``."""
    mirrors = {
        plan.stage_rank[other]
        for stage in plan.stages_of(rank)
        for other in range(plan.num_stages)
        if other != stage and plan.model_stage(other) == plan.model_stage(stage)
    }
    (other,) = mirrors
    assert other != rank, "copies belong on another rank"
    return other


def fingerprint(module: nn.Module) -> str:
    """What two copies of a stage must share: names, shapes and dtypes of the parameters."""
    rows = [
        f"{name} {list(p.shape)} {p.dtype} {p.requires_grad}"
        for name, p in module.named_parameters()
    ]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


@contextmanager
def grads_set_aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Start the body without gradients; add those from before afterwards.

    So that gradients accumulated over several steps are not summed with the mirror's again and
    again. The tensor in ``.grad`` before is the one there after.
    """
    before = [(p, p.grad) for p in parameters]
    for p, _ in before:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in before:
            if grad is not None:
                if p.grad is not None:
                    grad.add_(p.grad)
                p.grad = grad


@contextmanager
def synced_grads(
    modules: Sequence[nn.Module], outgoing: Channel, incoming: Channel
) -> Iterator[None]:
    """Sum the gradients that the body computes with those of the stage copies.

    See :func:`sum_mirrored_grads` for the arguments.
    """
    with grads_set_aside(p for module in modules for p in module.parameters()):
        yield
        sum_mirrored_grads(modules, outgoing, incoming)


def sum_mirrored_grads(modules: Iterable[nn.Module], outgoing: Channel, incoming: Channel) -> None:
    """Add to every gradient that of the parameter's copy, and leave both ranks with the same bits.

    Args:
        modules: the stages in the order of their place in the model, which is the same on both
            ranks.
        outgoing: to the mirror rank.
        incoming: from it.

    A parameter without gradient on one rank gets the other's; without any on both, none. The order
    of summation is no question: a + b and b + a round alike.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    if not parameters:
        return
    mine, theirs = _exchange_presence(parameters, outgoing, incoming)
    posted: list[Incoming | None] = []

    def post(index: int) -> None:
        if mine[index]:
            outgoing.send([parameters[index].grad], f"gradient {index}")
        p = parameters[index]
        posted.append(incoming.receive([(p.shape, p.dtype)]) if theirs[index] else None)

    for index, p in enumerate(parameters):
        # In lockstep with the mirror rank and not all at once: see exchange.py on what waits for
        # the whole device.
        while len(posted) < min(index + _AHEAD, len(parameters)):
            post(len(posted))
        arriving, posted[index] = posted[index], None
        if arriving is not None:
            (other,) = incoming.wait(arriving, f"gradient {index} of its stage copies")
            # Not in place: this rank's own gradient may still be on its way out.
            p.grad = other if p.grad is None else other.add_(p.grad)
    outgoing.drain()


def _exchange_presence(
    parameters: list[nn.Parameter], outgoing: Channel, incoming: Channel
) -> tuple[list[bool], list[bool]]:
    """Which parameters have a gradient here, and which have one on the mirror rank."""
    mine = [p.grad is not None for p in parameters]
    outgoing.send(
        [torch.tensor(mine, dtype=torch.uint8, device=outgoing.device)], "the list of gradients"
    )
    arriving = incoming.receive([((len(mine),), torch.uint8)])
    (theirs,) = incoming.wait(arriving, "the list of its gradients", on_host=True)
    return mine, [bool(flag) for flag in theirs.tolist()]
