"""Stage copies: in DualPipe every model stage is on two ranks, and both copies must learn the same.

What belongs here: summing the gradients of the two copies of each stage, and checking that they are
copies. A rank holds two stages, and the copies of both are on its mirror rank.

A stage's sum follows, on the device, what has computed its gradients, so the first one of a rank
runs beside what the other stage still computes. The host launches sums when all actions of the step
are launched. By copy engine it waits for nothing else but the host of the mirror rank; over NCCL,
whose waits take SMs, until both have computed the step.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dualpipe_ext.agreement import Meetings
from dualpipe_ext.errors import CommTimeoutError, DualPipeError
from dualpipe_ext.pipeline.copy_channel import Arriving
from dualpipe_ext.pipeline.exchange import DTYPES, AnyChannel
from dualpipe_ext.pipeline.p2p import Incoming, plain
from dualpipe_ext.pipeline.plan import Plan
from dualpipe_ext.pipeline.ring import ALIGNMENT, aligned

# Of a message at most: few enough bytes that one is added while the next is on its way, and so many
# that they take longer than the host's calls.
_MESSAGE_BYTES = 64 << 20
# Messages on their way, the one being added included; as many as the ring of a copy engine's
# channel holds for certain. With more, ranks could wait for each other (docs/internals.md).
_AHEAD = 3
_AGAIN = "again"  # what a rank says that has nothing new to say


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


class MirrorLinks:
    """What a rank has to do with its mirror rank.

    Args:
        outgoing: to the mirror rank.
        incoming: from it.
        meetings: of the two ranks' hosts, the lower one first. Without, they tell each other
            through the channels, for which the device must have come that far.
    """

    def __init__(
        self, outgoing: AnyChannel, incoming: AnyChannel, meetings: Meetings | None = None
    ) -> None:
        self.outgoing, self.incoming = outgoing, incoming
        self._meetings = meetings
        self._told: list[int] = []
        self._heard: list[int] = []

    def tell(self, codes: list[int]) -> list[int]:
        """Say something, and hear what the mirror rank says; the host waits for it.

        Args:
            codes: integers from -128 to 127, not always as many as there.

        Raises:
            CommTimeoutError: the other rank did not come in time.
        """
        return self._in_band(codes) if self._meetings is None else self._met(codes)

    def _in_band(self, codes: list[int]) -> list[int]:
        (number,) = self._swap([len(codes)], 1, torch.int64)
        return self._swap(codes, number, torch.int8)

    def _swap(self, mine: list[int], number: int, dtype: torch.dtype) -> list[int]:
        tensor = torch.tensor(mine, dtype=dtype, device=self.outgoing.device)
        self.outgoing.send([tensor], "the list of gradients")
        arriving = self.incoming.receive([((number,), dtype)])
        (theirs,) = self.incoming.wait(arriving, "the list of its gradients", on_host=True)
        return theirs.tolist()

    def _met(self, codes: list[int]) -> list[int]:
        rank, peer = self.outgoing.rank, self.outgoing.peer
        # Nearly always the same as the last time: a store is no place for much.
        text = json.dumps(codes) if codes != self._told else _AGAIN
        try:
            both = self._meetings.gather(text)
        except CommTimeoutError as error:
            raise CommTimeoutError(
                f"rank {rank} waited {self.outgoing.timeout_s:g} s for rank {peer} to sum the "
                f"gradients of stage copies (pipeline ranks)"
            ) from error
        self._told = codes
        theirs = both[1 - self._meetings.place]
        if theirs != _AGAIN:
            self._heard = json.loads(theirs)
        return self._heard


def order_of_sums(plan: Plan, rank: int) -> list[int]:
    """The stages of ``rank``, in the order in which the gradients of both copies are complete.

    Both ranks come to the same order of model stages.
    """
    last = {one: plan.last_backwards(one) for one in (rank, mirror_rank(plan, rank))}
    complete = dict.fromkeys(map(plan.model_stage, plan.stages_of(rank)), -1)
    for backwards in last.values():
        for stage, index in backwards.items():
            model_stage = plan.model_stage(stage)
            complete[model_stage] = max(complete[model_stage], index)
    return sorted(
        plan.stages_of(rank),
        key=lambda stage: (complete[plan.model_stage(stage)], plan.model_stage(stage)),
    )


class GradSums:
    """Adds to the gradients of one step those of the stage copies: both ranks get the same bits.

    A parameter without gradient on one rank gets the other's; without any on both, none. The order
    of summation is no question: a + b and b + a round alike. A parameter that several modules share
    is summed once, with the last of them.

    Args:
        modules: by stage, in an order that is that of their copies on the mirror rank.
        links: to that rank.
        device: of the modules.
    """

    def __init__(
        self, modules: Mapping[int, nn.Module], links: MirrorLinks, device: torch.device
    ) -> None:
        self._links, self._device = links, device
        stage_of = {p: stage for stage, module in modules.items() for p in module.parameters()}
        self._parameters: dict[int, list[nn.Parameter]] = {stage: [] for stage in modules}
        for parameter, stage in stage_of.items():
            if parameter.requires_grad:
                self._parameters[stage].append(parameter)
        self._ready: dict[int, tuple[list[_Sum], Any]] = {}

    def ready(self, stage: int) -> None:
        """The current stream, or what it waits for, has been given all of a stage's gradients.

        Raises:
            DualPipeError: a gradient is sparse.
        """
        sums = [_Sum(parameter) for parameter in self._parameters[stage]]
        event = None
        if self._device.type == "cuda":
            if stage != list(self._parameters)[-1]:
                # Memory that is free now. Later it would be free only after what the current stream
                # has been given by then, and the sum would have to wait for that.
                for summed in sums:
                    summed.allocate(mine_only=True)
            event = torch.cuda.current_stream(self._device).record_event()
        self._ready[stage] = sums, event

    def _complete(self, stage: int) -> None:
        """Be sure that a stage's gradients are complete: another stage may use its parameters."""
        known = self._ready.get(stage)
        if known is None or any(summed.changed() for summed in known[0]):
            self.ready(stage)

    @torch.no_grad()
    def run(self) -> None:
        """Launch the sums; the current stream waits for them, the host for its mirror's alone.

        All messages of the stages have been launched. Some time after it the channels must be
        drained: only then is it sure that everything has come.

        Raises:
            DualPipeError: a gradient is sparse, or of another dtype than its copy's.
            CommTimeoutError: the mirror rank did not take its part in time.
        """
        for stage in self._parameters:
            self._complete(stage)
        self._compare([one for stage in self._parameters for one in self._ready[stage][0]])
        beside = _Beside(self._device)
        for stage in self._parameters:
            sums, event = self._ready.pop(stage)
            with beside.after(event):
                present = [one for one in sums if one.theirs or one.mine is not None]
                self._sum(present, f"gradients of stage {stage}", beside)
        beside.join()

    def _compare(self, sums: Sequence[_Sum]) -> None:
        """Learn which of the gradients there are on the mirror rank."""
        mine = [one.code() for one in sums]
        theirs = self._links.tell(mine)
        if len(theirs) != len(mine):
            raise DualPipeError(
                f"expected both copies of a rank's stages to have as many parameters to train, got "
                f"{len(mine)} here and {len(theirs)} on rank {self._links.incoming.peer} (pipeline "
                f"ranks)"
            )
        for one, code in zip(sums, theirs, strict=True):
            one.theirs = code > 0
            dtype = DTYPES[abs(code) - 1] if code else one.dtype
            if one.mine is None and one.dtype is None:
                one.dtype = dtype
            if dtype is not one.dtype and (one.theirs or one.mine is not None):
                raise DualPipeError(
                    f"expected gradients of one dtype in both copies of a stage, got {one.dtype} "
                    f"here and {dtype} on rank {self._links.incoming.peer} (pipeline ranks), for a "
                    f"parameter of shape {list(one.parameter.shape)}"
                )

    def _sum(self, sums: Sequence[_Sum], what: str, beside: _Beside) -> None:
        outgoing, incoming = self._links.outgoing, self._links.incoming
        messages = _messages(sums, min(_MESSAGE_BYTES, outgoing.piece_bytes))
        posted: deque[Arriving | Incoming] = deque()
        outgoing.follow()
        incoming.follow()
        for number, parts in enumerate(messages):
            # In lockstep with the mirror rank and not all at once: see _AHEAD, and exchange.py on
            # what waits for the whole device.
            while number + len(posted) < min(number + _AHEAD, len(messages)):
                ahead = number + len(posted)
                mine = [p.of.mine[p.span] for p in messages[ahead] if p.of.mine is not None]
                outgoing.send(mine, f"{what}, message {ahead}", follow=False)
                theirs = [p for p in messages[ahead] if p.of.theirs]
                posted.append(incoming.receive([((p.stop - p.start,), p.of.dtype) for p in theirs]))
            added = [part for part in parts if part.of.theirs]
            lacking = [part.of for part in added if part.of.total is None]
            if lacking:
                with beside.at_home():
                    for summed in lacking:
                        summed.allocate()
                incoming.follow()  # for their memory
            incoming.add(
                posted.popleft(),
                f"the copy's {what}, message {number}",
                [None if part.of.mine is None else part.of.mine[part.span] for part in added],
                [part.of.total[part.span] for part in added],
            )
            for part in added:
                part.of.end(part)
        incoming.join()


class _Beside:
    """The stream from which sums are launched, beside what the caller's has to do meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._home = self._side = None
        if device.type == "cuda":
            self._home, self._side = torch.cuda.current_stream(device), _side_stream(device)

    def after(self, event: Any) -> AbstractContextManager[Any]:
        """Make the stream current, behind ``event``."""
        if self._side is None:
            return nullcontext()
        self._side.wait_event(event)
        return torch.cuda.stream(self._side)

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Make the caller's stream current for the body, and let this one follow it."""
        if self._side is None:
            yield
            return
        with torch.cuda.stream(self._home):
            yield
        self._side.wait_stream(self._home)

    def join(self) -> None:
        """Let the caller's stream wait for this one."""
        if self._side is not None:
            self._home.wait_stream(self._side)


@cache
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


class _Sum:
    """A parameter's gradient here, and the one on the mirror rank, as it comes part by part.

    Attributes:
        parameter: whose it is.
        dtype: of the gradient; None if it may be any and there is none.
        mine: [elements], or None.
        theirs: whether there is one on the mirror rank.
        total: [elements], for the sum, once there is memory for it.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        grad = parameter.grad
        if grad is not None and grad.layout is not torch.strided:
            raise DualPipeError(
                f"expected dense gradients, to sum with those of the stage copies, got "
                f"{grad.layout} for a parameter of shape {list(parameter.shape)}"
            )
        self.parameter = parameter
        self._seen = None if grad is None else (grad, grad._version)
        self.dtype = parameter.grad_dtype if grad is None else grad.dtype
        self.mine = None if grad is None else plain(grad).view(-1)
        self.theirs = False
        self.total: Tensor | None = None

    def changed(self) -> bool:
        """Whether something was added since, or it is another gradient."""
        grad = self.parameter.grad
        seen, version = self._seen or (None, 0)
        return grad is not seen or (grad is not None and grad._version != version)

    def code(self) -> int:
        """Of the dtype, from 1 on, and less than 0 if there is no gradient; 0 for any."""
        if self.dtype is None:
            return 0
        code = 1 + DTYPES.index(self.dtype)
        return -code if self.mine is None else code

    def allocate(self, *, mine_only: bool = False) -> None:
        """Take memory for the sum. New: this rank's own gradient may still be on its way out."""
        if self.mine is not None or not mine_only:
            like = self.parameter
            self.total = torch.empty(like.numel(), dtype=self.dtype, device=like.device)

    def end(self, part: _Part) -> None:
        """With the last part, make the sum the gradient."""
        if part.stop == self.parameter.numel():
            self.parameter.grad = self.total.view(self.parameter.shape)
            # Additions may still read what was the gradient. A copy engine's channel keeps it; with
            # NCCL nothing is launched on its own stream until that waits for them (GradSums.run).
            self.mine = self.total = self._seen = None


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
