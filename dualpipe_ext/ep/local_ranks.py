"""Virtual ranks: several expert-parallel ranks as threads of one process, on one GPU.

They run the kernels that ranks of a real group run, so one GPU can test eight ranks, and
compute-sanitizer and profilers can watch them. The threads share a stream; where ranks would each
launch a kernel, one launch acts for all of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from dualpipe_ext.errors import CommTimeoutError, DualPipeError
from dualpipe_ext.timeouts import check_timeout

T = TypeVar("T")

# Which run a thread belongs to: a thread that outlives its run must not disturb the next one.
_this_thread = threading.local()


class LocalRanks:
    """``num_ranks`` virtual ranks.

    Args:
        num_ranks: R.
        timeout_s: longest wait of one thread for another, in seconds; also how long the other
            ranks may go on once one has ended.
        run_timeout_s: longest time of one :meth:`run`, in seconds.

    Example:

    >>> def rank_program(member):
    ...     return member.gather(10 * member.rank)
    >>> LocalRanks(2).run(rank_program)
    [[0, 10], [0, 10]]
    """

    def __init__(
        self, num_ranks: int, *, timeout_s: float = 30.0, run_timeout_s: float = 3600.0
    ) -> None:
        if not isinstance(num_ranks, int) or isinstance(num_ranks, bool) or num_ranks < 1:
            raise ValueError(f"expected num_ranks of at least 1, got {num_ranks!r}")
        check_timeout(timeout_s)
        check_timeout(run_timeout_s)
        self.num_ranks = num_ranks
        self.timeout_s = timeout_s
        self.run_timeout_s = run_timeout_s

    def run(self, fn: Callable[..., T], *args: object) -> list[T]:
        """Call ``fn(member, *args)`` for every rank, each in a thread; returns the results by rank.

        The threads use the current device and the current stream of the caller. What a run left
        behind (a ``Buffer``, tensors) can be used in the next one, also after a failure.

        Raises:
            BaseException: what the first rank to fail raised; the others are stopped at their next
                meeting, with ``CommTimeoutError``. A rank that has no meeting within ``timeout_s``
                is left behind: it is stopped at its next one.
            CommTimeoutError: ranks did not meet or end in time.
        """
        run = _Run(self)
        stream = torch.cuda.current_stream() if torch.cuda.is_available() else None

        def body(rank: int) -> None:
            _this_thread.run = run
            try:
                # A backward must run in its rank's thread: ranks meet in it, and autograd's own
                # thread serves one of them at a time.
                with torch.cuda.stream(stream), torch.autograd.set_multithreading_enabled(False):
                    result = fn(LocalRank(self, rank), *args)
                run.end(rank, result)
            except BaseException as error:  # handed to the caller below
                run.fail(rank, error)

        try:
            for rank in range(self.num_ranks):
                # Daemons: a rank that hangs outside of our waits must not keep the process alive.
                threading.Thread(target=body, args=(rank,), name=f"rank{rank}", daemon=True).start()
            return run.results()
        except BaseException as error:
            # Ctrl-C among them: whoever still runs is stopped too.
            run.fail(None, error)
            raise


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
        """Wait for all ranks; rank 0's thread calls ``act`` with what they brought, by rank.

        Returns:
            What ``act`` returned, in every rank; what it raised is raised in every rank.

        Raises:
            CommTimeoutError: a rank failed, returned, or did not come in time. No rank can meet
                again in this run.
            DualPipeError: the ranks came with different functions; raised in every rank.
        """
        run = getattr(_this_thread, "run", None)
        if run is None or run.ranks is not self._ranks:
            raise ValueError("expected a call in a thread of this LocalRanks' run, got another")
        return run.meet(self.rank, item, act)


class _Meeting:
    """One ``together``: what the ranks brought, and what came of it."""

    def __init__(self) -> None:
        self.brought: dict[int, tuple[Any, Callable[[Sequence[Any]], Any]]] = {}
        self.done = False
        self.value: Any = None
        self.error: BaseException | None = None

    def act(self) -> None:
        items, acts = zip(*(self.brought[rank] for rank in sorted(self.brought)), strict=True)
        names = [getattr(act, "__qualname__", type(act).__name__) for act in acts]
        try:
            if len(set(names)) > 1:
                # A rank has left a call that the others are still in.
                raise DualPipeError(
                    f"expected virtual ranks to meet for the same call, got {', '.join(names)}"
                )
            self.value = acts[0](list(items))
        except BaseException as error:  # raised in every rank
            self.error = error


class _Run:
    """One call of ``LocalRanks.run``: who is where, and what failed first."""

    def __init__(self, ranks: LocalRanks) -> None:
        self.ranks = ranks
        self._meeting = _Meeting()
        self._ended: dict[int, Any] = {}
        self._first_end: float | None = None
        self._failure: tuple[int | None, BaseException] | None = None
        # One lock; who waits for what is woken for nothing else, as every wake-up costs a switch.
        lock = threading.RLock()
        self._all_here = threading.Condition(lock)
        self._acted = threading.Condition(lock)
        self._over = threading.Condition(lock)

    def meet(self, rank: int, item: object, act: Callable[[Sequence[Any]], T]) -> T:
        with self._all_here:
            meeting = self._meeting
            meeting.brought[rank] = (item, act)
            if len(meeting.brought) == self.ranks.num_ranks:
                self._meeting = _Meeting()
                self._all_here.notify_all()
            if rank == 0:
                self._wait(self._all_here, rank, meeting, lambda: self._meeting is not meeting)
            else:
                self._wait(self._acted, rank, meeting, lambda: meeting.done)
        if rank == 0:
            meeting.act()
            with self._acted:
                meeting.done = True
                self._acted.notify_all()
        if meeting.error is not None:
            raise meeting.error
        return meeting.value

    def _wait(
        self,
        condition: threading.Condition,
        rank: int,
        meeting: _Meeting,
        ready: Callable[[], bool],
    ) -> None:
        """Wait for ``ready``, or raise when it cannot come any more."""

        def hopeless() -> bool:
            return self._failure is not None or bool(self._ended.keys() - meeting.brought.keys())

        timeout_s = self.ranks.timeout_s
        in_time = condition.wait_for(lambda: ready() or hopeless(), timeout_s)
        if not in_time and self._meeting is not meeting:
            # All are here and rank 0 acts; its own waits are bounded, so this one is, too.
            in_time = condition.wait_for(lambda: ready() or hopeless(), timeout_s)
        if ready():
            return
        missing = sorted(set(range(self.ranks.num_ranks)) - meeting.brought.keys())
        who = f"virtual ranks {missing}" if missing else "virtual rank 0"
        wanted = f"virtual rank {rank}: expected {who} to meet it within {timeout_s:g} s"
        if self._failure is not None:
            failed, cause = self._failure
            by = "the run was stopped" if failed is None else f"rank {failed} failed"
            raise CommTimeoutError(f"{wanted}, but {by}: {type(cause).__name__}: {_line(cause)}")
        returned = sorted(self._ended.keys() - meeting.brought.keys())
        why = "nobody came" if not in_time else f"ranks {returned} have returned"
        error = CommTimeoutError(f"{wanted}, but {why}")
        # Its item lies in a meeting that it has left: nobody may meet there any more.
        self.fail(None, error)
        raise error

    def end(self, rank: int, result: object) -> None:
        with self._over:
            self._ended[rank] = result
            self._wake_all()

    def fail(self, rank: int | None, error: BaseException) -> None:
        """``rank`` is over (None: no rank's end, but no meeting is possible any more)."""
        with self._over:
            if self._failure is None or self._failure == (None, error):
                self._failure = (rank, error)
            if rank is not None:
                self._ended[rank] = None
            self._wake_all()

    def _wake_all(self) -> None:
        if self._first_end is None:
            self._first_end = time.monotonic()
        for condition in (self._all_here, self._acted, self._over):
            condition.notify_all()

    def results(self) -> list[Any]:
        """Wait for all ranks to end; what they returned, or raise what failed first."""
        deadline = time.monotonic() + self.ranks.run_timeout_s
        num_ranks = self.ranks.num_ranks
        with self._over:
            while len(self._ended) < num_ranks:
                if self._first_end is not None:
                    deadline = min(deadline, self._first_end + self.ranks.timeout_s)
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    break
                self._over.wait(left_s)
            running = sorted(set(range(num_ranks)) - self._ended.keys())
            if self._failure is not None:
                rank, error = self._failure
                if rank is not None and hasattr(error, "add_note"):  # Python 3.11
                    left = f"; ranks {running} had to be left running" if running else ""
                    error.add_note(f"(raised in virtual rank {rank}{left})")
                raise error
            if running:
                raise CommTimeoutError(
                    f"expected {num_ranks} virtual ranks to end within "
                    f"{self.ranks.run_timeout_s:g} s, and {self.ranks.timeout_s:g} s after the "
                    f"first, but ranks {running} still run"
                )
            return [self._ended[rank] for rank in range(num_ranks)]


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
