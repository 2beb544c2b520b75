"""The messages of one step on one rank: what is received ahead, and how shapes become known.

What belongs here: :class:`Exchange`, through which the runtime sends and receives by the name of a
message, and the header that tells a receiver the shapes.

The first outputs that cross a stage boundary in a step are preceded by a header with their number,
shapes and dtypes. The following ones have the same, unless the header announces that they vary:
then each has a header. Gradients need none: they have the shapes of the outputs they answer, and
exist for those that require one. Shapes that were declared (``TensorSpec``) need no header at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dualpipe_ext.errors import DualPipeError
from dualpipe_ext.pipeline import messages
from dualpipe_ext.pipeline.copy_channel import Arriving, CopyChannel
from dualpipe_ext.pipeline.p2p import Channel, Incoming
from dualpipe_ext.pipeline.plan import Action, Op, Plan

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_MAX_TENSORS = 16
_MAX_DIMS = 8
_PREFIX = 4  # number of chunks, training, varying, number of tensors
_ENTRY = 3 + _MAX_DIMS  # dtype, requires_grad, number of dimensions, dimensions
_HEADER = _PREFIX + _ENTRY * _MAX_TENSORS

AnyChannel = Channel | CopyChannel

# Messages to expect per channel beyond the one that is needed. None on CUDA: a receive of NCCL
# occupies the device until its sender sends, and loading a kernel or freeing memory waits for the
# whole device. A rank that did so with a receive posted ahead of its need could hold up the very
# sender. What copy engines bring comes without being expected.
_AHEAD = {"cpu": 2, "cuda": 0}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that crosses a stage boundary, and if a gradient comes back."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def __str__(self) -> str:
        grad = " with gradient" if self.requires_grad else ""
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}{grad}"


class Exchange:
    """Sends and receives the messages of one step.

    Args:
        plan: of the step.
        rank: this pipeline rank.
        outgoing: channel per receiving rank.
        incoming: channel per sending rank.
        device: where tensors are received.
        forward_only: an inference step: no gradients travel.
        varying: the outputs of this rank's stages may differ in shape from chunk to chunk. Stages
            that get varying inputs are taken to have varying outputs anyway.
        declared: shapes at every stage boundary, instead of headers.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        outgoing: dict[int, AnyChannel],
        incoming: dict[int, AnyChannel],
        *,
        device: torch.device,
        forward_only: bool,
        varying: bool,
        declared: tuple[TensorSpec, ...] | None,
    ) -> None:
        self._plan = plan
        self._outgoing, self._incoming = outgoing, incoming
        self._training = not forward_only
        self._device = device
        # Where shapes are declared, gradients come back for every output that can have one.
        self._declared = declared and tuple(self._as_declared(spec) for spec in declared)
        self._varying = dict.fromkeys(plan.stages_of(rank), varying)
        # By producing stage: what its outputs look like while they do not vary.
        self._boundary: dict[int, tuple[TensorSpec, ...]] = {}
        # By message: what crossed or will cross, for the gradients that come back.
        self._specs: dict[Action, tuple[TensorSpec, ...]] = {}
        self._inboxes = {
            peer: _Inbox(
                self,
                channel,
                messages.sent(plan, peer, forward_only=forward_only).get(rank, []),
                _AHEAD[device.type],
            )
            for peer, channel in incoming.items()
        }

    def mark_varying(self, stage: int) -> None:
        """Announce that the inputs, and so the outputs, of ``stage`` vary in shape."""
        self._varying[stage] = True

    def pass_on(self, stage: int) -> None:
        """Note that ``stage`` hands its outputs to the next stage, on this same rank."""
        if self._varying[stage]:
            self.mark_varying(stage + 1)

    def look_ahead(self) -> None:
        """Post receives for what is expected next, where that is safe."""
        for inbox in self._inboxes.values():
            inbox.advance()

    def receive(self, message: Action) -> tuple[list[Tensor], tuple[TensorSpec, ...]]:
        """The tensors of ``message`` and what they are; waits for them."""
        peer = self._plan.stage_rank[message.stage]
        tensors = self._inboxes[peer].take(message)
        if message.op is Op.F:
            # The gradients to send back.
            return tensors, self._specs[message]
        return tensors, self._specs.pop(_answered(message))

    def send_outputs(
        self, message: Action, outputs: Sequence[Any], needs_grad: Sequence[bool]
    ) -> None:
        """Send a stage's outputs to the next stage's rank."""
        specs = _specs_of(message, outputs, needs_grad, self._device)
        channel = self._outgoing[self._plan.stage_rank[message.stage + 1]]
        if self._declared is not None:
            specs = tuple(map(self._as_declared, specs))
            self._check_same(message, specs, self._declared, "declare those")
        else:
            varying = self._varying[message.stage]
            first = message.stage not in self._boundary
            known = self._boundary.setdefault(message.stage, specs)
            if not varying:
                self._check_same(message, specs, known, "pass dynamic_shapes=True")
            if first or varying:
                channel.send([self._header(specs, varying)], f"the header of {message}")
        channel.send(list(outputs), f"the outputs of {message}")
        if self._training:
            self._specs[message] = specs

    def send_grads(self, message: Action, grads: Sequence[Tensor | None]) -> None:
        """Send the gradients of a stage's inputs to the rank of the stage before."""
        specs = self._specs.pop(Action(Op.F, message.stage - 1, message.chunk))
        tensors = [
            torch.zeros(spec.shape, dtype=spec.dtype, device=self._device) if grad is None else grad
            for spec, grad in zip(specs, grads, strict=True)
            if spec.requires_grad
        ]
        channel = self._outgoing[self._plan.stage_rank[message.stage - 1]]
        channel.send(tensors, f"the input gradients of {message}")

    def release_sent(self) -> None:
        """Let go of what has been sent by now, without waiting for the rest."""
        for channel in self._outgoing.values():
            channel.release_sent()

    def finish(self) -> None:
        """Wait until everything is sent and, where nothing else would tell, has come."""
        for channel in (*self._outgoing.values(), *self._incoming.values()):
            channel.drain()

    def expected(self, message: Action) -> tuple[TensorSpec, ...] | None:
        """What the tensors of an incoming message are, or None if that is not known yet."""
        if message.op is Op.F:
            if self._declared is not None:
                return self._specs.setdefault(message, self._declared)
            known = self._boundary.get(message.stage)
            if known is None or self._varying[message.stage + 1]:
                return self._specs.get(message)
            return self._specs.setdefault(message, known)
        specs = self._specs.get(_answered(message))
        return None if specs is None else tuple(spec for spec in specs if spec.requires_grad)

    def _as_declared(self, spec: TensorSpec) -> TensorSpec:
        can = self._training and spec.dtype.is_floating_point
        return TensorSpec(tuple(spec.shape), spec.dtype, can)

    def _check_same(
        self,
        message: Action,
        specs: tuple[TensorSpec, ...],
        known: tuple[TensorSpec, ...],
        remedy: str,
    ) -> None:
        if specs != known:
            raise DualPipeError(
                f"expected the outputs of stage {message.stage} to be {_listed(known)}, got "
                f"{_listed(specs)} for chunk {message.chunk}; {remedy}"
            )

    def _header(self, specs: tuple[TensorSpec, ...], varying: bool) -> Tensor:
        row = [self._plan.num_chunks, int(self._training), int(varying), len(specs)]
        for spec in specs:
            row += [DTYPES.index(spec.dtype), int(spec.requires_grad), len(spec.shape)]
            row += [*spec.shape, *([0] * (_MAX_DIMS - len(spec.shape)))]
        row += [0] * (_HEADER - len(row))
        return torch.tensor(row, dtype=torch.int64, device=self._device)

    def learn(self, message: Action, header: Tensor, peer: int) -> None:
        """Take in the header of ``message``."""
        row = header.tolist()
        theirs, ours = tuple(row[:2]), (self._plan.num_chunks, int(self._training))
        if theirs != ours:
            told = [
                f"{chunks} chunks {'with' if training else 'without'} gradients"
                for chunks, training in (ours, theirs)
            ]
            raise DualPipeError(
                f"expected every rank to run the same step, got {told[0]} here and {told[1]} on "
                f"pipeline rank {peer}"
            )
        specs = []
        for index in range(row[3]):
            code, grad, dims, *shape = row[_PREFIX + _ENTRY * index :][:_ENTRY]
            specs.append(TensorSpec(tuple(shape[:dims]), DTYPES[code], bool(grad)))
        self._specs[message] = self._boundary[message.stage] = tuple(specs)
        if row[2]:
            self.mark_varying(message.stage + 1)


class _Inbox:
    """Incoming messages of one channel, received in the order their sender sends them."""

    def __init__(
        self, exchange: Exchange, channel: AnyChannel, expected: list[Action], ahead: int
    ) -> None:
        self._exchange = exchange
        self._channel = channel
        self._expected = deque(expected)
        self._ahead = ahead
        self._posted: dict[Action, Incoming | Arriving] = {}
        self._header: Incoming | Arriving | None = None  # of the first expected message

    def take(self, message: Action) -> list[Tensor]:
        """Wait for ``message``, which must be expected."""
        while message not in self._posted:
            self._post_next(wait=True)
        incoming = self._posted.pop(message)
        self.advance()
        kind = "the outputs" if message.op is Op.F else "the input gradients"
        return self._channel.wait(incoming, f"{kind} of {message}")

    def advance(self) -> None:
        """Post receives as far ahead as allowed and as shapes are known."""
        while self._expected and len(self._posted) < self._ahead and self._post_next(wait=False):
            pass

    def _post_next(self, *, wait: bool) -> bool:
        """Post the receive of the next message, or of its header; False if it has to wait."""
        message = self._expected[0]
        specs = self._exchange.expected(message)
        if specs is None and message.op is Op.B:
            # A gradient in answer to outputs that this rank has not sent yet.
            assert not wait
            return False
        if specs is None and self._header is None:
            self._header = self._channel.receive([((_HEADER,), torch.int64)])
            return True
        if specs is None:
            if not wait:
                return False
            what = f"the header of {message}"
            (header,) = self._channel.wait(self._header, what, on_host=True)
            self._exchange.learn(message, header, self._channel.peer)
            self._header = None
            return True
        self._expected.popleft()
        self._posted[message] = self._channel.receive([(s.shape, s.dtype) for s in specs])
        return True


def _answered(gradient: Action) -> Action:
    """The outputs that a message of gradients answers."""
    return Action(Op.F, gradient.stage - 1, gradient.chunk)


def _specs_of(
    message: Action, outputs: Sequence[Any], needs_grad: Sequence[bool], device: torch.device
) -> tuple[TensorSpec, ...]:
    bad = [type(x).__name__ for x in outputs if not isinstance(x, Tensor)]
    if bad:
        raise ValueError(f"expected stage {message.stage} to return tensors, got {bad[0]}")
    if any(hasattr(x, "to_local") for x in outputs):
        raise ValueError(
            f"expected stage {message.stage} to return plain tensors, got a DTensor: to_local() "
            "gives one"
        )
    elsewhere = [x.device for x in outputs if x.device != device]
    if elsewhere:
        raise ValueError(
            f"expected outputs of stage {message.stage} on {device}, got one on {elsewhere[0]}"
        )
    if len(outputs) > _MAX_TENSORS or any(x.dim() > _MAX_DIMS for x in outputs):
        raise ValueError(
            f"expected at most {_MAX_TENSORS} outputs of at most {_MAX_DIMS} dimensions from "
            f"stage {message.stage}, got {[list(x.shape) for x in outputs]}"
        )
    unknown = [x.dtype for x in outputs if x.dtype not in DTYPES]
    if unknown:
        raise ValueError(
            f"expected outputs of stage {message.stage} in a dtype that can be sent, got "
            f"{unknown[0]}"
        )
    return tuple(
        TensorSpec(tuple(x.shape), x.dtype, grad)
        for x, grad in zip(outputs, needs_grad, strict=True)
    )


def _listed(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(map(str, specs)) or "nothing"
