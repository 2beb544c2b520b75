"""Agreement between ranks: all go on, or all raise.

Here belongs what makes a collective operation all-or-nothing: each rank tells every other how it
fares in a message of fixed size, and all draw the same conclusion from the same list. It knows
nothing of experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext.agreement import group_size_and_rank
from dualpipe_ext.eplb.exchange import control_device, exchange
from dualpipe_ext.errors import DualPipeError

_AGREE_TAG, _CONFIRM_TAG = 4101, 4102
_STATUS_BYTES = 512
_DIGEST_BYTES = 16
_MAX_DIGESTS = 4
_TEXT_START = 2 + _MAX_DIGESTS * _DIGEST_BYTES

T = TypeVar("T")


class _Kind(IntEnum):
    MISSING = 0  # a buffer in which nothing has arrived
    READY = 1
    INVALID = 2  # a ValueError
    FAILED = 3  # any other error


@dataclass(frozen=True, slots=True)
class _Status:
    """How a rank fares. Encoded: kind, number of digests, the digests, UTF-8 text."""

    kind: _Kind
    digests: tuple[bytes, ...] = ()
    text: str = ""

    @classmethod
    def of(cls, error: Exception) -> _Status:
        text = " ".join(str(error).split())
        if isinstance(error, ValueError):
            return cls(_Kind.INVALID, text=text)
        return cls(_Kind.FAILED, text=f"{type(error).__name__}: {text}")

    def encode(self) -> Tensor:
        digests = b"".join(self.digests).ljust(_MAX_DIGESTS * _DIGEST_BYTES, b"\0")
        text = self.text.encode()[: _STATUS_BYTES - _TEXT_START]
        raw = bytes([self.kind, len(self.digests)]) + digests + text
        return torch.frombuffer(bytearray(raw.ljust(_STATUS_BYTES, b"\0")), dtype=torch.uint8)

    @classmethod
    def decode(cls, message: Tensor) -> _Status:
        raw = bytes(message.tolist())
        starts = [2 + i * _DIGEST_BYTES for i in range(raw[1])]
        # "ignore": the text may have been cut inside a character.
        text = raw[_TEXT_START:].rstrip(b"\0").decode(errors="ignore")
        return cls(_Kind(raw[0]), tuple(raw[s : s + _DIGEST_BYTES] for s in starts), text)


def _digest(value: object) -> bytes:
    return hashlib.sha256(repr(value).encode()).digest()[:_DIGEST_BYTES]


@dataclass(frozen=True, slots=True)
class Agreement:
    """One all-or-nothing operation of a group: prepare, act, confirm, then commit.

    Every rank calls :meth:`prepare`, :meth:`act` and :meth:`confirm` in this order; each returns on
    all ranks or raises on all. What the caller does after the last of them must not fail.

    Attributes:
        what: name of the operation, for messages.
        group: its ranks, by default the world.
        timeout_s: longest wait for a peer in each step, in seconds.
    """

    what: str
    group: dist.ProcessGroup | None
    timeout_s: float

    def prepare(self, fn: Callable[[], tuple[T, Mapping[str, object]]]) -> T:
        """Run ``fn``, which changes nothing that others see; agree that it went well everywhere.

        Args:
            fn: returns what it has prepared, and by name at most 4 values that must be the same on
                all ranks (compared through ``repr``).

        Returns:
            What ``fn`` prepared, if it succeeded on every rank and the values agree.

        Raises:
            ValueError: ``fn`` raised one on some rank (all raise it, with that rank's number), or
                the values differ.
            DualPipeError: ``fn`` failed otherwise on another rank. That rank raises its own error.
            CommTimeoutError: a peer did not answer.
        """
        own: Exception | None = None
        try:
            prepared, same = fn()
            mine = _Status(_Kind.READY, tuple(_digest(value) for value in same.values()))
        except Exception as error:  # whatever it is, the others must not wait for this rank
            own, mine = error, _Status.of(error)
        try:
            statuses = self._everyones(mine, "word that it is ready", _AGREE_TAG)
        except DualPipeError:
            if own is not None:
                raise own from None
            raise
        for rank, status in enumerate(statuses):
            if status.kind is _Kind.INVALID:
                raise ValueError(f"rank {rank}: {status.text}") from own
        if own is not None:
            raise own
        for rank, status in enumerate(statuses):
            if status.kind is _Kind.FAILED:
                raise DualPipeError(f"rank {rank} could not prepare {self.what}: {status.text}")
        for i, name in enumerate(same):
            values = [status.digests[i] for status in statuses]
            others = [rank for rank, value in enumerate(values) if value != values[0]]
            if others:
                raise ValueError(
                    f"expected the same {name} on all ranks, got ranks {others} "
                    f"to differ from rank 0"
                )
        return prepared

    def act(self, fn: Callable[[], None]) -> None:
        """Run the step that talks to peers, and tell them if it fails. The error goes on."""
        try:
            fn()
        except Exception as error:
            self._tell(error)
            raise

    def confirm(self) -> None:
        """Return once every rank has acted; raise if one has not."""
        text = "word that it has received everything"
        for rank, status in enumerate(self._everyones(_Status(_Kind.READY), text, _CONFIRM_TAG)):
            if status.kind is _Kind.FAILED:
                raise DualPipeError(f"rank {rank} failed in {self.what}: {status.text}")

    def _everyones(self, mine: _Status, text: str, tag: int) -> list[_Status]:
        """All ranks' statuses in rank order, the same list on every rank."""
        num_ranks, rank = group_size_and_rank(self.group)
        if num_ranks == 1:
            return [mine]
        peers = [peer for peer in range(num_ranks) if peer != rank]
        wire = control_device(self.group)
        message = mine.encode().to(wire)
        arrived = {
            peer: torch.zeros(_STATUS_BYTES, dtype=torch.uint8, device=wire) for peer in peers
        }
        try:
            exchange(
                dict.fromkeys(peers, message),
                arrived,
                self.group,
                timeout_s=self.timeout_s,
                what=text,
                tag=tag,
            )
        except DualPipeError:
            if wire.type == "cpu":
                self._raise_cause(arrived)
            raise
        # This rank's own goes the same way, so that a text too long is cut alike everywhere.
        arrived[rank] = message
        return [_Status.decode(arrived[r]) for r in range(num_ranks)]

    def _raise_cause(self, arrived: Mapping[int, Tensor]) -> None:
        """A peer that could still say why it failed is the cause; the others only fell silent."""
        for peer, message in arrived.items():
            status = _Status.decode(message)
            if status.kind is _Kind.FAILED:
                raise DualPipeError(f"rank {peer} failed in {self.what}: {status.text}") from None

    def _tell(self, error: Exception) -> None:
        """Spare the others the wait for this rank's confirmation, as far as they can be reached."""
        num_ranks, rank = group_size_and_rank(self.group)
        if num_ranks == 1 or control_device(self.group).type != "cpu":
            return  # NCCL knows no tags: a peer might take this message for the data it waits for
        status = _Status.of(error)
        message = _Status(_Kind.FAILED, text=status.text).encode()
        others = {peer: message for peer in range(num_ranks) if peer != rank}
        try:
            exchange(
                others, {}, self.group, timeout_s=self.timeout_s, what="an error", tag=_CONFIRM_TAG
            )
        except DualPipeError:
            return  # they have noticed already
