"""Lanes on a simulated device, for tests of channels without a GPU.

Every stream is a queue of operations, and which stream goes on next is drawn at random: what the
order of streams and flags does not guarantee will go wrong sooner or later. The host's time passes
only where a test says so.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dualpipe_ext.pipeline.copy_channel import CopyChannel, Failure

CPU = torch.device("cpu")


class Stream:
    """Operations in order; one that returns False is not done yet.

    Args:
        shared: of streams that the driver has mapped to one queue of the hardware: what was
            launched earlier, on whichever, comes first.
    """

    def __init__(self, shared: deque[Stream] | None = None) -> None:
        self.queue: deque[Callable[[], bool | None]] = deque()
        self.put_in = self.done = 0
        self.shared = shared

    def put(self, operation: Callable[[], bool | None]) -> None:
        self.queue.append(operation)
        self.put_in += 1
        if self.shared is not None:
            self.shared.append(self)

    def advance(self) -> bool:
        if not self.queue or (self.shared is not None and self.shared[0] is not self):
            return False
        if self.queue[0]() is False:
            return False
        if self.shared is not None:
            self.shared.popleft()
        self.queue.popleft()
        self.done += 1
        return True


@dataclass(frozen=True)
class Event:
    stream: Stream
    place: int

    def query(self) -> bool:
        return self.stream.done >= self.place


@dataclass
class Rank:
    """A rank's device; the flags are what a peer sets."""

    index: int
    memory: dict[int, Tensor] = field(default_factory=dict)  # rings by source
    flags: dict[tuple[bool, int], int] = field(default_factory=dict)  # by (sends, peer)
    current: Stream = field(default_factory=Stream)
    expired: bool = False  # every wait of this rank that is pending fails now
    failure: Failure | None = None


class World:
    """Ranks and all their streams.

    Args:
        num_ranks: of them.
        links: (source, destination) of the channels.
        ring_bytes: of every channel's ring.
        seed: of the order in which streams go on.
        first: number before that of the first piece.
        one_queue: every rank's streams share a queue (``CUDA_DEVICE_MAX_CONNECTIONS=1``).
    """

    def __init__(
        self,
        num_ranks: int,
        links: list[tuple[int, int]],
        *,
        ring_bytes: int,
        seed: int,
        first: int = 0,
        one_queue: bool = False,
    ) -> None:
        self.rng = random.Random(seed)
        self.ranks = [Rank(index) for index in range(num_ranks)]
        for rank in self.ranks if one_queue else ():
            rank.current.shared = deque()
        self.streams = [rank.current for rank in self.ranks]
        self.closed: list[bool] = []
        self._running: threading.Semaphore | None = None
        siblings: list[dict[tuple[bool, int], CopyChannel]] = [{} for _ in self.ranks]
        self.channels: dict[tuple[int, int, int], CopyChannel] = {}
        for source, destination in links:
            self.ranks[destination].memory[source] = torch.zeros(ring_bytes, dtype=torch.uint8)
            for here in (source, destination):
                channel = CopyChannel(
                    SimulatedLane(self, here, source, destination, first),
                    source,
                    destination,
                    rank=here,
                    device=CPU,
                    timeout_s=5,
                    siblings=siblings[here],
                )
                channel._ring._number = channel._ring._after = first
                self.channels[here, source, destination] = channel

    def advance(self, most: int = 10**9) -> bool:
        """Let up to ``most`` operations happen; returns whether any did."""
        happened = False
        for _ in range(most):
            for stream in self.rng.sample(self.streams, len(self.streams)):
                if stream.advance():
                    happened = True
                    break
            else:
                break
        return happened

    def pause(self) -> None:
        """Called by a host that :meth:`run` runs: others have their turn."""
        own = self._running
        assert own is not None
        self._turn.release()
        own.acquire()

    def run(self, hosts: Sequence[Callable[[], None]]) -> None:
        """Run the hosts and all streams, one at a time and in random order, to their end."""
        self._turn = threading.Semaphore(0)
        waiting = {threading.Semaphore(0): host for host in hosts}
        errors: list[BaseException] = []

        def live(own: threading.Semaphore, host: Callable[[], None]) -> None:
            own.acquire()
            try:
                host()
            except BaseException as error:
                errors.append(error)
            del waiting[own]
            self._turn.release()

        for own, host in waiting.items():
            threading.Thread(target=live, args=(own, host), daemon=True).start()
        idle = 0  # turns in which nothing has happened
        while waiting and not errors:
            happened = self.rng.random() < 0.5 and self.advance(self.rng.randint(1, 40))
            before = sum(stream.put_in for stream in self.streams), len(waiting)
            self._running = self.rng.choice(list(waiting))
            self._running.release()
            self._turn.acquire()
            happened |= before != (sum(stream.put_in for stream in self.streams), len(waiting))
            idle = 0 if happened else idle + 1
            assert idle < 200, "nothing can go on"
        if errors:
            raise errors[0]
        self.advance()
        assert not any(stream.queue for stream in self.streams), "nothing can go on"


class SimulatedLane:
    def __init__(self, world: World, here: int, source: int, destination: int, first: int) -> None:
        self._world = world
        self._rank = world.ranks[here]
        self._sends = here == source
        self._peer = destination if self._sends else source
        self._stream = Stream(self._rank.current.shared)
        world.streams.append(self._stream)
        self._word = first % 2**32
        self._rank.flags[self._sends, self._peer] = first % 2**32
        self.ring = world.ranks[destination].memory[source]

    def follow(self) -> None:
        self._stream.put(Event(self._rank.current, self._rank.current.put_in).query)

    def acquire(self, expected: int, number: int) -> None:
        rank = self._rank

        def wait() -> bool:
            seen = rank.flags[self._sends, self._peer]
            reached = (seen - expected) % 2**32 < 2**31
            if not reached and not rank.expired and rank.failure is None:
                return False
            if not reached and rank.failure is None:
                rank.failure = Failure(self._sends, self._peer, number % 2**32)
            if rank.failure is None:
                self._word = number % 2**32
            return True

        self._stream.put(wait)

    def copy(self, to: Tensor, source: Tensor) -> None:
        assert to.shape == source.shape
        assert to.is_contiguous()
        assert source.is_contiguous()
        # In two parts, so that others can come in between.
        half = to.numel() // 2
        self._stream.put(lambda: to[:half].copy_(source[:half]) is not None)
        self._stream.put(lambda: to[half:].copy_(source[half:]) is not None)

    def add(self, total: Tensor, mine: Tensor | None, other: Tensor) -> None:
        def compute() -> None:
            total.copy_(other if mine is None else mine + other)

        self._stream.put(compute)

    def signal(self) -> None:
        flags, key = self._world.ranks[self._peer].flags, (not self._sends, self._rank.index)
        self._stream.put(lambda: flags.update({key: self._word}))

    def mark(self) -> Event:
        return Event(self._stream, self._stream.put_in)

    def join(self, mark: Event) -> None:
        self._rank.current.put(mark.query)

    def blank(self, tensor: Tensor) -> None:
        def zero() -> None:
            if self._rank.failure is not None:
                tensor.zero_()

        self._rank.current.put(zero)

    def failure(self) -> Failure | None:
        return self._rank.failure

    def close(self, *, abort: bool) -> None:
        self._world.closed.append(abort)
