"""Virtual ranks: several expert-parallel ranks as threads of one process, on one GPU.

They run the kernels that ranks of a real group run, so one GPU can test eight ranks, and
compute-sanitizer and profilers can watch them. The threads share a stream; where ranks would each
launch a kernel, one launch acts for all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from dualpipe_ext.errors import CommTimeoutError
from dualpipe_ext.timeouts import check_timeout

T = TypeVar("T")


class LocalRanks:
    """``num_ranks`` virtual ranks.

    Args:
        num_ranks: R.
        timeout_s: longest wait of one thread for another, in seconds.

    Example:

    >>> def rank_program(member):
    ...     return member.gather(10 * member.rank)
    >>> LocalRanks(2).run(rank_program)
    [[0, 10], [0, 10]]
    """

    def __init__(self, num_ranks: int, *, timeout_s: float = 30.0) -> None:
        if not isinstance(num_ranks, int) or num_ranks < 1:
            raise ValueError(f"expected num_ranks of at least 1, got {num_ranks!r}")
        check_timeout(timeout_s)
        self.num_ranks = num_ranks
        self.timeout_s = timeout_s
        self._barrier = threading.Barrier(num_ranks)
        self._given: list[Any] = [None] * num_ranks
        self._result: tuple[Any, BaseException | None] = (None, None)

    def run(self, fn: Callable[..., T], *args: object) -> list[T]:
        """Call ``fn(member, *args)`` for every rank, each in a thread; returns the results by rank.

        The threads use the current device and the current stream of the caller.

        Raises:
            BaseException: what the first rank to fail raised; the others are stopped at their next
                meeting.
        """
        results: list[Any] = [None] * self.num_ranks
        failures: list[tuple[int, BaseException]] = []
        on_gpu = torch.cuda.is_available()
        stream = torch.cuda.current_stream() if on_gpu else None

        def body(rank: int) -> None:
            try:
                # A backward must run in its rank's thread: ranks meet in it, and autograd's own
                # thread serves one of them at a time.
                with torch.cuda.stream(stream), torch.autograd.set_multithreading_enabled(False):
                    results[rank] = fn(LocalRank(self, rank), *args)
            except BaseException as error:  # handed to the caller below
                failures.append((rank, error))
                self._barrier.abort()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            self._barrier.reset()
            raise failures[0][1]
        return results

    def _meet(self, rank: int, item: object, act: Callable[[list[Any]], T]) -> T:
        """All ranks bring an item; one of them calls ``act`` with all; all get what it returned."""
        self._given[rank] = item
        if self._wait() == 0:
            try:
                self._result = act(list(self._given)), None
            except BaseException as error:  # raised in every rank below
                self._result = None, error
        self._wait()
        value, error = self._result
        # Nobody may start the next meeting before all have read this one's result.
        self._wait()
        if error is not None:
            raise error
        return value

    def _wait(self) -> int:
        try:
            return self._barrier.wait(self.timeout_s)
        except threading.BrokenBarrierError:
            raise CommTimeoutError(
                f"expected {self.num_ranks} virtual ranks to meet within {self.timeout_s:g} s; "
                "one has failed or stayed away"
            ) from None


class LocalRank:
    """One virtual rank's view of the others."""

    def __init__(self, ranks: LocalRanks, rank: int) -> None:
        self._ranks = ranks
        self.rank = rank
        self.num_ranks = ranks.num_ranks

    def gather(self, item: T) -> list[T]:
        """What every rank brought, by rank."""
        return self.together(item, list)

    def together(self, item: object, act: Callable[[Sequence[Any]], T]) -> T:
        """Wait for all ranks; one thread calls ``act`` with what they brought, by rank.

        Returns:
            What ``act`` returned, in every rank; what it raised is raised in every rank.
        """
        return self._ranks._meet(self.rank, item, act)
