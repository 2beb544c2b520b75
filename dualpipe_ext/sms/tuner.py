"""Finding the number of communication SMs on the first steps of training.

What belongs here: which numbers are tried, for how long, and how all ranks come to the same choice.
The times are those of real steps; since results have the same bits with every number, the steps
are not lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_low

from dualpipe_ext.sms.partition import SMPartition

# The copy engines, then what fills the link for rows that stay as they arrive (8), what the kernels
# divide among roles (16 and more), and what copies for every expert can use.
NUMBERS = (0, 8, 16, 24, 32, 64)
# Steps before anything is tried: memory is allocated and kernels are compiled in them.
WARM_UP = 2
# Steps with a number that are not counted: before each one that is, and before the first round.
SETTLE = 1
# Rounds over all numbers, two by two: one of each two goes there and one goes back.
ROUNDS = 6
# How many usual deviations a difference must be. Of three values, the outer two are some 0.7
# standard deviations from the middle one, and the difference of two such middles has about one:
# twice that.
_DEVIATIONS = 3.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A number that was tried, the same on all ranks.

    Attributes:
        comm_sms: the number.
        seconds: step time of the slowest rank; infinite if it could not be tried.
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
        noise: differences of up to so many seconds say nothing.
    """

    candidates: tuple[Candidate, ...]
    best: int | None
    noise: float = 0.0


def num_steps(num_candidates: int) -> int:
    """Steps that tuning takes.

    >>> num_steps(6)
    80
    """
    return WARM_UP + num_candidates * (SETTLE + ROUNDS * (SETTLE + 1))


def rounds_of(numbers: Sequence[int]) -> list[tuple[int, ...]]:
    """The numbers in the order of each round: there and back, back and there, there and back.

    Early steps drift: caches warm up, the router learns. Over two rounds, one there and one back,
    what changes evenly with time meets all numbers alike; what changes less and less favours those
    in the middle of the two, which are other ones in the next two.

    >>> rounds_of([0, 8])
    [(0, 8), (8, 0), (8, 0), (0, 8), (0, 8), (8, 0)]
    """
    there, back = tuple(numbers), tuple(reversed(numbers))
    return [back if round_ % 4 in (1, 2) else there for round_ in range(ROUNDS)]


def compare(times: Mapping[int, Sequence[float]]) -> tuple[dict[int, float], float]:
    """What a step takes with each number, and which differences say nothing.

    A time counts by its distance from the middle of its round, which takes out what changes from
    round to round; the mean of two rounds is one value. The median of a number's values is what it
    takes, and how far its values are from that is noise, of which the median over all numbers
    counts: neither depends on single steps that went wrong.

    Args:
        times: of each number, one per round.

    Returns:
        Seconds by number, and the noise in seconds.

    Steps that get faster from round to round, and 8 is faster than 0 by one:

    >>> compare({0: [9.0, 8.0, 7.0, 6.0, 5.0, 5.0], 8: [8.0, 7.0, 6.0, 5.0, 4.0, 4.0]})
    ({0: 6.5, 8: 5.5}, 0.0)
    """
    middles = [median(round_) for round_ in zip(*times.values(), strict=True)]
    taken, deviations = {}, []
    for number, seconds in times.items():
        apart = [one - middle for one, middle in zip(seconds, middles, strict=True)]
        values = [(there + back) / 2 for there, back in zip(apart[::2], apart[1::2], strict=True)]
        middle = median(values)
        taken[number] = median(middles) + middle
        # Without the middle one itself.
        deviations += sorted(abs(value - middle) for value in values)[1:]
    return taken, _DEVIATIONS * median_low(deviations)


def choose(seconds: Mapping[int, float], noise: float) -> int:
    """The fewest SMs of the numbers that are as fast as the fastest but for noise.

    >>> choose({0: 5.0, 8: 3.2, 16: 3.0}, noise=0.5)
    8
    """
    return min(n for n, taken in seconds.items() if taken <= min(seconds.values()) + noise)


class SMTuner:
    """Tries numbers in turn, in several rounds (:func:`rounds_of`), and fixes one.

    That is the one with the fewest SMs of those that are as fast as the fastest but for noise: SMs
    that gain nothing are left to compute.

    Args:
        partition: is set to each number in turn, and to the best at the end. All ranks take steps
            together, so all change it between the same two steps.
        numbers: to try, each once.
        prepare: called once for each number that fits every rank's GPU, after the warm-up: returns
            why it cannot be tried, None if it can. It may be collective.
        agree: given as many floats on every rank, returns the largest of all ranks for each.
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
        self.result: Tuning | None = None
        self._run = _Trials(partition, tuple(numbers), prepare, agree, forget).steps()
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


@dataclass(frozen=True, slots=True)
class _Trials:
    """What :class:`SMTuner` does from step to step; its arguments.

    Apart from it, which holds the generator: one that is dropped before it is done is freed, with
    the buffer that it prepares, when its last reference goes.
    """

    partition: SMPartition
    numbers: tuple[int, ...]
    prepare: Callable[[int], str | None]
    agree: Callable[[Sequence[float]], Sequence[float]]
    forget: Callable[[], object]

    def steps(self) -> Generator[None, float, Tuning]:
        """Takes the time of a step at every yield."""
        for _ in range(WARM_UP):
            yield
        # Pairs keep their plain launch order meanwhile: learning takes longer than a visit.
        self.partition.trying = True
        # Preparing may be collective: only what every rank gets to prepare.
        fits = self._usable(reasons := [self._unfit(number) for number in self.numbers])
        for place, number in enumerate(self.numbers):
            if number in fits:
                reasons[place] = self.prepare(number) or ""
        usable = self._usable(reasons)
        usable = [number for number in usable if number in fits]
        times: dict[int, list[float]] = {number: [] for number in usable}
        # Alone there is nothing to choose; it is set all the same.
        if len(usable) > 1:
            # Each number once for nothing: its memory is allocated and its kernels are loaded.
            for number in usable:
                self.partition.set(number)
                for _ in range(SETTLE):
                    yield
            for order in rounds_of(usable):
                for number in order:
                    times[number].append((yield from self._visit(number)))
        return self._conclude(reasons, times)

    def _visit(self, number: int) -> Generator[None, float, float]:
        """Steps with a number; returns what the last took."""
        self.partition.set(number)
        for _ in range(SETTLE):
            yield
        return (yield)

    def _unfit(self, number: int) -> str:
        try:
            self.partition.check(number)
        except ValueError as error:  # the GPU has fewer
            return str(error)
        return ""

    def _usable(self, reasons: Sequence[str]) -> list[int]:
        """What every rank can try."""
        failed = self.agree([1.0 if reason else 0.0 for reason in reasons])
        return [number for number, bad in zip(self.numbers, failed, strict=True) if not bad]

    def _conclude(self, reasons: Sequence[str], times: dict[int, list[float]]) -> Tuning:
        seconds: dict[int, float] = {}
        noise, best = 0.0, next(iter(times), None)
        if len(times) > 1:
            seconds, noise = compare(self._slowest(times))
            best = choose(seconds, noise)
        candidates = tuple(
            Candidate(number, seconds.get(number, math.inf), self._told(number, reason, times))
            for number, reason in zip(self.numbers, reasons, strict=True)
        )
        self.partition.trying = False
        if best is not None:
            self.partition.set(best)
        self.forget()
        return Tuning(candidates, best, noise)

    def _slowest(self, times: dict[int, list[float]]) -> dict[int, Sequence[float]]:
        """Of each step, the time of the slowest rank: all ranks go on from the same values."""
        agreed = self.agree([one for number in times for one in times[number]])
        return {n: agreed[i * ROUNDS : (i + 1) * ROUNDS] for i, n in enumerate(times)}

    @staticmethod
    def _told(number: int, reason: str, times: dict[int, list[float]]) -> str:
        if number in times:
            return "" if times[number] else "nothing to compare it with"
        return reason or "not on every rank"
