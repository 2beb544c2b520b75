"""Stage copies: in DualPipe every model stage is on two ranks, and both copies must learn the same.

What belongs here: summing the gradients of the two copies of each stage, and checking that they are
copies. A rank holds two stages, and the copies of both are on its mirror rank.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dualpipe_ext.errors import DualPipeError
from dualpipe_ext.pipeline.copy_channel import Arriving
from dualpipe_ext.pipeline.exchange import DTYPES, AnyChannel
from dualpipe_ext.pipeline.p2p import Incoming
from dualpipe_ext.pipeline.plan import Plan
from dualpipe_ext.pipeline.ring import ALIGNMENT, aligned

# Of a message at most: few enough bytes that one is added while the next is on its way, and so many
# that they take longer than the host's calls.
_MESSAGE_BYTES = 64 << 20
# Messages on their way, the one being added included; as many as the ring of a copy engine's
# channel holds for certain. With more, ranks could wait for each other (docs/internals.md).
_AHEAD = 3


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


def links(plan: Plan) -> list[tuple[int, int]]:
    """All ordered pairs of ranks (source, destination) that hold copies of each other's stages."""
    return [(rank, mirror_rank(plan, rank)) for rank in range(plan.num_ranks)]


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
    modules: Sequence[nn.Module], outgoing: AnyChannel, incoming: AnyChannel
) -> Iterator[None]:
    """Sum the gradients that the body computes with those of the stage copies.

    See :func:`sum_mirrored_grads` for the arguments.
    """
    with grads_set_aside(p for module in modules for p in module.parameters()):
        yield
        sum_mirrored_grads(modules, outgoing, incoming)


@torch.no_grad()
def sum_mirrored_grads(
    modules: Iterable[nn.Module], outgoing: AnyChannel, incoming: AnyChannel
) -> None:
    """Add to every gradient that of the parameter's copy, and leave both ranks with the same bits.

    Args:
        modules: the stages in the order of their place in the model, which is the same on both
            ranks.
        outgoing: to the mirror rank.
        incoming: from it.

    A parameter without gradient on one rank gets the other's; without any on both, none. The order
    of summation is no question: a + b and b + a round alike.

    Raises:
        DualPipeError: a gradient is sparse, or of another dtype than its copy's.
        CommTimeoutError: the mirror rank did not take its part in time.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    if not parameters:
        return
    sums = _sums(parameters, outgoing, incoming)
    messages = _messages(sums, min(_MESSAGE_BYTES, outgoing.piece_bytes))
    posted: deque[Arriving | Incoming] = deque()
    for number, parts in enumerate(messages):
        # In lockstep with the mirror rank and not all at once: see exchange.py on what waits for
        # the whole device.
        while number + len(posted) < min(number + _AHEAD, len(messages)):
            ahead = number + len(posted)
            mine = [p.of.mine[p.span] for p in messages[ahead] if p.of.mine is not None]
            outgoing.send(mine, f"gradients, message {ahead}", follow=False)
            theirs = [p for p in messages[ahead] if p.of.theirs]
            posted.append(incoming.receive([((p.stop - p.start,), p.of.dtype) for p in theirs]))
        added = [part for part in parts if part.of.theirs]
        totals = [part.of.total(part) for part in added]
        # Both lanes have followed the list of gradients: only memory can be new.
        incoming.add(
            posted.popleft(),
            f"the gradients of its stage copies, message {number}",
            [None if part.of.mine is None else part.of.mine[part.span] for part in added],
            totals,
            follow=any(part.start == 0 for part in added),
        )
        for part in added:
            part.of.end(part)
    incoming.join()
    incoming.drain()
    outgoing.drain()


class _Sum:
    """A parameter's gradient here, and the one on the mirror rank, as it comes part by part.

    Attributes:
        dtype: of the gradient.
        mine: [elements], or None.
        theirs: whether there is one on the mirror rank.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        grad = parameter.grad
        if grad is not None and grad.layout is not torch.strided:
            raise DualPipeError(
                f"expected dense gradients, to sum with those of the stage copies, got "
                f"{grad.layout} for a parameter of shape {list(parameter.shape)}"
            )
        self.parameter = parameter
        self.dtype = parameter.grad_dtype or parameter.dtype if grad is None else grad.dtype
        self.mine = None if grad is None else grad.contiguous().view(-1)
        self.theirs = False
        self._total: Tensor | None = None

    def total(self, part: _Part) -> Tensor:
        """Where the sum of a part belongs."""
        if part.start == 0:
            # Not in place: this rank's own gradient may still be on its way out.
            self._total = torch.empty(
                self.parameter.shape, dtype=self.dtype, device=self.parameter.device
            )
        return self._total.view(-1)[part.span]

    def end(self, part: _Part) -> None:
        """With the last part, make the sum the gradient."""
        if part.stop == self.parameter.numel():
            self.parameter.grad = self._total
            self.mine = self._total = None


class _Part(NamedTuple):
    """Elements ``start`` to ``stop`` of a gradient."""

    of: _Sum
    start: int
    stop: int

    @property
    def span(self) -> slice:
        return slice(self.start, self.stop)


def _messages(sums: Iterable[_Sum], most: int) -> list[list[_Part]]:
    """What travels together: as many gradients as it takes for ``most`` bytes, as a ring counts."""
    assert most >= ALIGNMENT, "a message must hold some elements"
    messages: list[list[_Part]] = [[]]
    room = most
    for summed in sums:
        start, numel, size = 0, summed.parameter.numel(), summed.dtype.itemsize
        while True:
            stop = min(numel, start + room // ALIGNMENT * ALIGNMENT // size)
            if stop > start or not numel:
                messages[-1].append(_Part(summed, start, stop))
                room -= aligned((stop - start) * size)
            if stop == numel:
                break
            messages.append([])
            start, room = stop, most
    return messages


def _sums(
    parameters: Iterable[nn.Parameter], outgoing: AnyChannel, incoming: AnyChannel
) -> list[_Sum]:
    """The gradients that there are on one rank or on both, after telling each other of them."""
    sums = [_Sum(parameter) for parameter in parameters]
    mine = [0 if summed.mine is None else 1 + DTYPES.index(summed.dtype) for summed in sums]
    outgoing.send(
        [torch.tensor(mine, dtype=torch.uint8, device=outgoing.device)], "the list of gradients"
    )
    arriving = incoming.receive([((len(mine),), torch.uint8)])
    (theirs,) = incoming.wait(arriving, "the list of its gradients", on_host=True)
    for summed, code in zip(sums, theirs.tolist(), strict=True):
        summed.theirs = code > 0
        if summed.theirs and DTYPES[code - 1] is not summed.dtype:
            raise DualPipeError(
                f"expected gradients of one dtype in both copies of a stage, got {summed.dtype} "
                f"here and {DTYPES[code - 1]} on rank {incoming.peer} (pipeline ranks), for a "
                f"parameter of shape {list(summed.parameter.shape)}"
            )
    return [summed for summed in sums if summed.theirs or summed.mine is not None]
