"""Stage-to-stage sends between GPUs of one host: memory that the ranks share, and lanes over it.

What belongs here: what a :class:`~dualpipe_ext.pipeline.copy_channel.Lane` is on a GPU, and the
memory behind it. Bytes and flags are moved by copy engines; a kernel of one thread waits for a
flag, with a bound (csrc/comm/flag_wait.cu).

Every rank has one allocation of the same size, which its peers write into. R ranks, a line is 128
bytes:

    state              one line, this rank's own: its abort word
    ends               per peer four lines:
      room flag          set by the peer: pieces that it has read of what this rank sent it
      sent word          this rank's own: what goes to the peer's piece flag
      piece flag         set by the peer: pieces that it has sent
      read word          this rank's own: what goes to the peer's room flag
    rings              one for every rank that sends to this one, in their order
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext import core
from dualpipe_ext.pipeline.copy_channel import CopyChannel, Failure, Mark
from dualpipe_ext.pipeline.ring import ALIGNMENT, MIN_BYTES

_LINE = 128
_ROOM_FLAG, _SENT_WORD, _PIECE_FLAG, _READ_WORD = range(4)
_POLL_S = 100e-6
_CLOSE_S = 10.0

# What could not be given back because the device was still at it.
_stuck: list[object] = []


def unavailable(group: dist.ProcessGroup, device: torch.device, timeout_s: float) -> str | None:
    """Why the ranks of ``group`` cannot send by copy engine, in one line; None if they can.

    All ranks come to the same answer; collective, if they are on GPUs, all or none of them.
    """
    if device.type != "cuda":
        return "the stages are not on GPUs"
    from dualpipe_ext.ep import memory  # only where it is used, as it brings in all of ep

    with torch.cuda.device(device):
        return memory.unavailable(_ranks(group, timeout_s))


def layout(num_ranks: int, links: Sequence[tuple[int, int]], ring_bytes: int) -> SendLayout:
    """Where everything is, on every rank.

    Args:
        num_ranks: R.
        links: (source, destination), all pairs with messages.
        ring_bytes: of a ring, at least; rounded up to a whole number of ``MIN_BYTES``.
    """
    return SendLayout(num_ranks, links, -(-ring_bytes // MIN_BYTES) * MIN_BYTES)


class SendLayout:
    """Offsets in a rank's memory, in bytes; see the module."""

    def __init__(self, num_ranks: int, links: Sequence[tuple[int, int]], ring_bytes: int) -> None:
        self.ring_bytes = ring_bytes
        self._sources: dict[int, list[int]] = {}
        for source, destination in sorted(links):
            self._sources.setdefault(destination, []).append(source)
        ends = _LINE * (1 + 4 * num_ranks)
        self._rings = -(-ends // ALIGNMENT) * ALIGNMENT
        self.control_bytes = self._rings
        self.bytes = self._rings + ring_bytes * max(map(len, self._sources.values()), default=0)

    def end(self, peer: int, what: int) -> int:
        """Of a flag or word for ``peer``."""
        return _LINE * (1 + 4 * peer + what)

    def ring(self, source: int, destination: int) -> int:
        """Of the ring for what ``source`` sends, at ``destination``."""
        return self._rings + self._sources[destination].index(source) * self.ring_bytes


class _Abort:
    """This rank's abort word: once it is set, no wait of the rank goes on.

    Args:
        word: int32 [1], in the rank's memory.
    """

    def __init__(self, word: Tensor) -> None:
        self.word = word
        self.stream = _new_stream(word.device)
        self._one = torch.ones_like(word)
        torch.cuda.current_stream(word.device).synchronize()

    def set(self) -> None:
        """Not waiting for anything. By copy engine: waits may have taken the SMs."""
        _copy(self.word.data_ptr(), self._one.data_ptr(), 4, self.stream)


class SendMemory:
    """One rank's part of the memory, and everything that uses it.

    Args:
        own: uint8 [layout.bytes], this rank's memory, zero at first.
        everyone: [R] the memory of all ranks as seen from here, by pipeline rank.
        keep: what must live as long as the memory is used.
        rank: this pipeline rank.
        where: offsets.
        timeout_s: bound of every wait, in seconds.
    """

    def __init__(
        self,
        own: Tensor,
        everyone: Sequence[Tensor],
        keep: object,
        *,
        rank: int,
        where: SendLayout,
        timeout_s: float,
    ) -> None:
        self.core = core.module()
        self.own, self.everyone, self.rank, self.where = own, list(everyone), rank, where
        self.device = own.device
        self.timeout_ns = int(timeout_s * 1e9)
        self.reports = self.core.ErrorChannel(1)
        self._abort = _Abort(own[:4].view(torch.int32))
        self.streams: list[torch.cuda.ExternalStream] = [self._abort.stream]
        self._closing = threading.Lock()
        self._end = weakref.finalize(
            self, _end, self._abort, self.streams, (own, everyone, keep, self.reports)
        )
        # A process that ends takes what waits on its device along.
        self._end.atexit = False

    def new_stream(self) -> torch.cuda.ExternalStream:
        """A stream that is nobody else's: what waits on it holds up nothing but the lane."""
        stream = _new_stream(self.device)
        self.streams.append(stream)
        return stream

    def failed(self) -> Tensor:
        """bool [], in the order of the current stream: whether a wait of this rank has failed."""
        return self._abort.word.ne(0).view(())

    def close(self, *, abort: bool) -> None:
        """End all lanes: waits until nothing is under way on them, for seconds at most."""
        # Each thread has a current device of its own.
        with self._closing, torch.cuda.device(self.device):
            if not self._end.alive:
                return
            if abort:
                self._abort.set()
            deadline = time.monotonic() + _CLOSE_S
            while not all(stream.query() for stream in self.streams):
                if time.monotonic() > deadline:
                    _stuck.append(self._end.detach())
                    return
                time.sleep(_POLL_S)
            self._end()


class GpuLane:
    """One end of a channel on a GPU: a :class:`~dualpipe_ext.pipeline.copy_channel.Lane`.

    Args:
        memory: of this rank.
        source: pipeline rank that sends.
        destination: pipeline rank that receives.
    """

    def __init__(self, memory: SendMemory, source: int, destination: int) -> None:
        where, rank = memory.where, memory.rank
        self._memory = memory
        self._sends = rank == source
        self._peer = destination if self._sends else source
        self._stream = memory.new_stream()
        start = where.ring(source, destination)
        self.ring = memory.everyone[destination][start : start + where.ring_bytes]
        mine = (_ROOM_FLAG, _SENT_WORD) if self._sends else (_PIECE_FLAG, _READ_WORD)
        theirs = _PIECE_FLAG if self._sends else _ROOM_FLAG
        own, other = memory.own.data_ptr(), memory.everyone[self._peer].data_ptr()
        self._flag, self._word = (own + where.end(self._peer, what) for what in mine)
        self._their_flag = other + where.end(rank, theirs)

    def follow(self) -> None:
        self._stream.wait_event(torch.cuda.current_stream(self._memory.device).record_event())

    def acquire(self, expected: int, number: int) -> None:
        memory = self._memory
        with torch.cuda.device(memory.device):
            memory.core.flag_wait(
                memory.reports,
                state=memory.own.data_ptr(),
                flag=self._flag,
                expected=expected % 2**32,
                word=self._word,
                number=number % 2**32,
                for_room=self._sends,
                rank=memory.rank,
                peer=self._peer,
                timeout_ns=memory.timeout_ns,
                stream=self._stream.cuda_stream,
            )

    def copy(self, to: Tensor, source: Tensor) -> None:
        assert to.numel() == source.numel()
        _copy(to.data_ptr(), source.data_ptr(), to.numel(), self._stream)

    def add(self, total: Tensor, mine: Tensor | None, other: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            total.copy_(other) if mine is None else torch.add(mine, other, out=total)

    def signal(self) -> None:
        _copy(self._their_flag, self._word, 4, self._stream)

    def mark(self) -> Mark:
        return self._stream.record_event()

    def join(self, mark: Any) -> None:
        torch.cuda.current_stream(self._memory.device).wait_event(mark)

    def blank(self, tensor: Tensor) -> None:
        tensor.masked_fill_(self._memory.failed(), 0)

    def failure(self) -> Failure | None:
        record = self._memory.reports.read(0)
        if record is None:
            return None
        return Failure(record["phase"] == "send (room)", record["peer"], record["epoch"])

    def close(self, *, abort: bool) -> None:
        self._memory.close(abort=abort)


def open_channels(
    group: dist.ProcessGroup,
    pipeline_ranks: Sequence[int],
    links: Sequence[tuple[int, int]],
    *,
    device: torch.device,
    ring_bytes: int,
    timeout_s: float,
) -> list[CopyChannel]:
    """This rank's channels, both ways; collective over ``group``.

    Args:
        group: ranks that reach each other's memory (:func:`unavailable`).
        pipeline_ranks: [R] the pipeline rank of every group rank.
        links: (source, destination) in pipeline ranks, equal on all ranks.
        device: of this rank.
        ring_bytes: memory per channel for what is on its way, equal on all ranks.
        timeout_s: longest wait for another rank, in seconds.
    """
    from dualpipe_ext.ep import memory  # see unavailable

    where = layout(group.size(), links, ring_bytes)
    rank = pipeline_ranks[group.rank()]
    with torch.cuda.device(device):
        peers = memory.allocate(where.bytes, _ranks(group, timeout_s))
    everyone = [peers.everyone[pipeline_ranks.index(r)] for r in range(group.size())]
    shared = SendMemory(
        peers.own, everyone, peers.keep, rank=rank, where=where, timeout_s=timeout_s
    )
    siblings: dict[tuple[bool, int], CopyChannel] = {}
    return [
        CopyChannel(
            GpuLane(shared, source, destination),
            source,
            destination,
            rank=rank,
            device=device,
            timeout_s=timeout_s,
            siblings=siblings,
        )
        for source, destination in sorted(links)
        if rank in (source, destination)
    ]


def _ranks(group: dist.ProcessGroup, timeout_s: float) -> Any:
    from dualpipe_ext.ep.transport import Ranks

    return Ranks(group=group, rank=group.rank(), num_ranks=group.size(), timeout_s=timeout_s)


def _new_stream(device: torch.device) -> torch.cuda.ExternalStream:
    with torch.cuda.device(device):
        return torch.cuda.ExternalStream(core.module().create_stream(), device=device)


def _copy(to: int, source: int, num_bytes: int, stream: torch.cuda.ExternalStream) -> None:
    """From address to address."""
    core.module().copy(
        to=to,
        source=source,
        bytes=num_bytes,
        stream=stream.cuda_stream,
    )


def _end(abort: _Abort, streams: list[torch.cuda.ExternalStream], memory: object) -> None:
    """Give streams and memory back once nothing uses them any more."""
    try:
        with torch.cuda.device(abort.word.device):
            abort.set()  # of a pipeline that was dropped in the middle of a step
            deadline = time.monotonic() + _CLOSE_S
            while not all(stream.query() for stream in streams):
                if time.monotonic() > deadline:
                    _stuck.append((streams[:], memory))
                    return
                time.sleep(_POLL_S)
            for stream in streams:
                core.module().destroy_stream(stream.cuda_stream)
    except RuntimeError:
        pass  # the device is lost: nothing left to give back
    streams.clear()
    del memory
