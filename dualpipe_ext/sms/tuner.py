"""Finding the number of communication SMs on the first steps of training.

What belongs here: which numbers are tried, for how long, and how all ranks come to the same choice.
The times are those of real steps; since results have the same bits with every number, the steps
are not lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from statistics import median

from dualpipe_ext.sms.partition import SMPartition

# The copy engines, then what fills the link for rows that stay as they arrive (8), what the kernels
# divide among roles (16 and more), and what copies for every expert can use.
NUMBERS = (0, 8, 16, 24, 32, 64)
# Steps before anything is tried: memory is allocated and kernels are compiled in them.
WARM_UP = 2
# Of each number, twice: steps that are not counted, then steps that are.
SETTLE, TIMED = 1, 2


@dataclass(frozen=True, slots=True)
class Candidate:
    """A number that was tried, the same on all ranks.

    Attributes:
        comm_sms: the number.
        seconds: median step time of the slowest rank; infinite if it could not be tried.
        reason: why not, as this rank knows it; "" otherwise.
    """

    comm_sms: int
    seconds: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Tuning:
    """What came out.

    Attributes:
        candidates: in the order in which they were given.
        best: the number that is in force from now on; None if none could be tried.
    """

    candidates: tuple[Candidate, ...]
    best: int | None


def num_steps(num_candidates: int) -> int:
    """Steps that tuning takes.

    >>> num_steps(6)
    38
    """
    return WARM_UP + 2 * num_candidates * (SETTLE + TIMED)


class SMTuner:
    """Tries numbers one after the other, there and back, and fixes the best.

    There and back, because early steps drift (caches warm up, the router learns): what changes
    evenly with time then meets all numbers alike.

    Args:
        partition: is set to each number in turn, and to the best at the end. All ranks take steps
            together, so all change it between the same two steps.
        numbers: to try, each once; on a tie the first one wins.
        prepare: called once for each number that fits every rank's GPU, after the warm-up: returns
            why it cannot be tried, None if it can. It may be collective.
        agree: given one number per candidate, returns the largest of all ranks for each.
        forget: called at the end: gives up what ``prepare`` has made for the others.
    """

    def __init__(
        self,
        partition: SMPartition,
        numbers: Sequence[int],
        *,
        prepare: Callable[[int], str | None],
        agree: Callable[[Sequence[float]], Sequence[float]],
        forget: Callable[[], object] = lambda: None,
    ) -> None:
        if not numbers or len(set(numbers)) != len(numbers):
            raise ValueError(f"expected numbers to try, each once, got {list(numbers)}")
        self._partition, self._numbers = partition, tuple(numbers)
        self._prepare, self._agree, self._forget = prepare, agree, forget
        self.result: Tuning | None = None
        self._run = self._steps()
        next(self._run)

    @property
    def done(self) -> bool:
        """Whether the number is fixed."""
        return self.result is not None

    def observe(self, seconds: float) -> None:
        """After every step: what it took on this rank, the device included. May be collective."""
        if self.done:
            return
        try:
            self._run.send(seconds)
        except StopIteration as end:
            self.result = end.value

    def _steps(self) -> Generator[None, float, Tuning]:
        """Takes the time of a step at every yield."""
        for _ in range(WARM_UP):
            yield
        # Pairs keep their plain launch order meanwhile: learning takes longer than a visit.
        self._partition.trying = True
        # Preparing may be collective: only what every rank gets to prepare.
        fits = self._usable(reasons := [self._unfit(number) for number in self._numbers])
        for place, number in enumerate(self._numbers):
            if number in fits:
                reasons[place] = self._prepare(number) or ""
        usable = self._usable(reasons)
        usable = [number for number in usable if number in fits]
        times: dict[int, list[float]] = {number: [] for number in usable}
        # Alone there is nothing to choose; it is set all the same.
        for number in [*usable, *reversed(usable)] if len(usable) > 1 else ():
            self._partition.set(number)
            for _ in range(SETTLE):
                yield
            for _ in range(TIMED):
                times[number].append((yield))
        return self._conclude(reasons, times)

    def _unfit(self, number: int) -> str:
        try:
            self._partition.check(number)
        except ValueError as error:  # the GPU has fewer
            return str(error)
        return ""

    def _usable(self, reasons: Sequence[str]) -> list[int]:
        """What every rank can try."""
        failed = self._agree([1.0 if reason else 0.0 for reason in reasons])
        return [number for number, bad in zip(self._numbers, failed, strict=True) if not bad]

    def _conclude(self, reasons: Sequence[str], times: dict[int, list[float]]) -> Tuning:
        mine = [median(times[n]) if times.get(n) else math.inf for n in self._numbers]
        seconds = self._agree(mine) if len(times) > 1 else mine
        candidates = tuple(
            Candidate(number, value, self._told(number, reason, times))
            for number, value, reason in zip(self._numbers, seconds, reasons, strict=True)
        )
        self._partition.trying = False
        best = min(times, key=lambda n: seconds[self._numbers.index(n)], default=None)
        if best is not None:
            self._partition.set(best)
        self._forget()
        return Tuning(candidates, best)

    @staticmethod
    def _told(number: int, reason: str, times: dict[int, list[float]]) -> str:
        if number in times:
            return "" if times[number] else "nothing to compare it with"
        return reason or "not on every rank"
