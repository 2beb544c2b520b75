"""The order in which a pair is launched: the forward of one chunk beside the backward of another.

What belongs here: turns of the two sides (:func:`interleave`), where deferred weight gradients go
(between them, or, once it is known how long everything takes, where the compute stream would wait,
be it in the next pair: :func:`fill_gaps`), and the model of two streams that tells which order ends
first (:func:`predicted_span`). Pure data: nothing is launched here.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import fmean
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from dualpipe_ext.pipeline.overlap import Phase

# How much longer than a gap a weight gradient may be to go there, as a share of its time. Which
# is best depends on how the pieces happen to fit: all are tried.
_OVERHANGS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Times of what communicates include waits for SMs and for other ranks, which are longer or shorter
# in another order: as shares of them, how long it may take. Orders are made for all of these, and
# judged by all.
_COMM_SHARES = (0.8, 0.9, 1.0, 1.1)
# Share of a pair that leaving weight gradients to the next one must save: what they are computed
# from stays in memory until then.
_WORTH_LEAVING = 0.005


class Launch(NamedTuple):
    """One launch of a pair: F or B of a phase, or W, its deferred weight gradients.

    L stands for those that the pair before has left. An order that has it leaves those weight
    gradients to the next pair that it does not name.
    """

    op: Literal["F", "B", "W", "L"]
    index: int
    # W: which of the phase's gradients, in the order they were deferred; None for all that are left
    part: int | None = None


LEFT = Launch("L", 0)


@dataclass(frozen=True, slots=True)
class PairTimes:
    """How long each launch of a pair takes, in seconds.

    Attributes:
        forward: of every phase.
        backward: of every phase, without deferred weight gradients.
        weights: of every phase's deferred weight gradients, in the order they were deferred.
        weight_of: which weight each of these is for; those of one weight keep their order, in which
            they are added up. What is not in it is for a weight of its own.
        one_queue: both streams share a hardware queue; see :func:`interleave`.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    weight_of: Mapping[Launch, Hashable] = field(default_factory=dict)
    one_queue: bool = False

    def of(self, launch: Launch) -> float:
        """Seconds of a launch."""
        if launch.op != "W":
            return (self.forward if launch.op == "F" else self.backward)[launch.index]
        parts = self.weights[launch.index]
        return sum(parts) if launch.part is None else parts[launch.part]

    def pieces(self, index: int) -> list[Launch]:
        """The deferred weight gradients of phase ``index``, one by one."""
        return [Launch("W", index, part) for part in range(len(self.weights[index]))]

    def with_comm(
        self, share: float, forward: Sequence[Phase], backward: Sequence[Phase]
    ) -> PairTimes:
        """With ``share`` of the times of what communicates."""

        def changed(times: Sequence[float], phases: Sequence[Phase]) -> tuple[float, ...]:
            return tuple(
                share * seconds if phase.stream == "comm" else seconds
                for seconds, phase in zip(times, phases, strict=True)
            )

        return replace(
            self,
            forward=changed(self.forward, forward),
            backward=changed(self.backward, backward),
        )


def interleave(
    forward: Sequence[Phase], backward: Sequence[Phase], *, one_queue: bool = False
) -> list[Launch]:
    """The order in which a pair's phases are launched.

    Each side is cut into runs of phases on the same stream. The two sides take turns, backward
    first, so that in every turn one communicates while the other computes; where both would use
    the same stream, the backward goes ahead alone until they do not. Weight gradients fill in
    behind the next communication of the backward, or follow at once if there is none left. For one
    layer of attention, dispatch, mlp and combine this is the order of DeepSeek-V3's published
    profile: combine(B), attention(F), mlp(B), dispatch(F), dispatch(B), mlp(W), mlp(F),
    attention(B), attention(W), combine(F).

    Args:
        forward: the phases whose forward runs, first to last.
        backward: the phases whose backward runs, given first to last and run last to first.
        one_queue: both streams share a hardware queue, in which a launch begins behind all that
            were launched before it have begun: in every turn what communicates goes first.
            (Otherwise the order within a turn matters to the host alone, which may have to wait for
            the number of rows that a dispatch brings: then it has launched compute before.)
    """
    forward_runs = _runs(forward, range(len(forward)))
    backward_runs = _runs(backward, range(len(backward) - 1, -1, -1))
    order: list[Launch] = []
    owed: list[Launch] = []
    while forward_runs or backward_runs:
        alone = bool(forward_runs and backward_runs) and forward_runs[0][0] == backward_runs[0][0]
        turn: list[Launch] = []
        if backward_runs:
            stream, indices = backward_runs.popleft()
            turn += [Launch("B", index) for index in indices]
            if stream == "compute":
                owed += [Launch("W", index) for index in indices]
            if stream == "comm" or all(kind == "compute" for kind, _ in backward_runs):
                turn += owed
                owed = []
        if forward_runs and not alone:
            stream, indices = forward_runs.popleft()
            run = [Launch("F", index) for index in indices]
            turn = run + turn if one_queue and stream == "comm" else turn + run
        order += turn
    return order


def _runs(phases: Sequence[Phase], indices: range) -> deque[tuple[str, list[int]]]:
    runs: deque[tuple[str, list[int]]] = deque()
    for index in indices:
        if not runs or runs[-1][0] != phases[index].stream:
            runs.append((phases[index].stream, []))
        runs[-1][1].append(index)
    return runs


def fill_gaps(
    forward: Sequence[Phase], backward: Sequence[Phase], times: PairTimes
) -> list[Launch]:
    """:func:`interleave`, with weight gradients where the compute stream would wait otherwise.

    The two sides take the same turns, so communication is launched in the same order whatever the
    times: ranks that measure different ones stay in step. Of several ways to place the weight
    gradients, the one that ends first by :func:`mean_span`; the one of :func:`interleave` is among
    them.

    A pair begins with communication of its backward that only its forward can hide: no weight
    gradient is there yet. Where that is too short, some are left to the next pair for this place.

    Args:
        forward: as in :func:`interleave`.
        backward: as in :func:`interleave`.
        times: of these phases.

    Returns:
        Every F and B once, and every weight gradient that was timed; or :data:`LEFT`, once, and all
        but those that are left to the next pair.
    """
    turns = interleave(forward, backward, one_queue=times.one_queue)
    guesses = _guesses(forward, backward, times)

    def filled(cases: Iterable[tuple[PairTimes, Set[Launch]]]) -> list[tuple[Launch, ...]]:
        found = (
            tuple(_fill(turns, forward, backward, guess, overhang, left))
            for guess, left in cases
            for overhang in _OVERHANGS
        )
        return list(dict.fromkeys(found))

    @cache
    def span(order: tuple[Launch, ...]) -> float:
        return mean_span(order, forward, backward, times)

    # min() takes the first of equals.
    best = min([tuple(turns), *filled((guess, frozenset()) for guess in guesses)], key=span)
    limit = (1 - _WORTH_LEAVING) * span(best)
    leaving = filled(
        (guess, left)
        for guess in guesses
        for left in _what_to_leave(turns, forward, backward, guess)
    )
    # Those that leave least come first: what it is computed from stays in memory.
    leaving.sort(key=lambda order: sum(map(times.of, _not_in(order, times))))
    enough = min(map(span, leaving), default=math.inf) + _WORTH_LEAVING * span(best)
    return list(next((o for o in leaving if span(o) <= min(enough, limit)), best))


def predicted_span(
    order: Sequence[Launch],
    forward: Sequence[Phase],
    backward: Sequence[Phase],
    times: PairTimes,
) -> float:
    """Seconds from the first launch to the end of the last: two streams, each in launch order, and
    every F and B behind the one before it on its side.

    With one hardware queue, also behind the beginning of all that was launched before. A launch
    that communicates is taken for one kernel, and one that computes for so many that the last
    begins when it ends.

    What an order leaves to the next pair, the pair before has left to it.
    """
    streams = _Streams(forward, backward, times)
    left = _not_in(order, times)
    for launch in order:
        if launch == LEFT:
            streams.run_left(left)
        else:
            streams.run(launch)
    return max(streams.free.values())


def mean_span(
    order: Sequence[Launch],
    forward: Sequence[Phase],
    backward: Sequence[Phase],
    times: PairTimes,
) -> float:
    """The mean of :func:`predicted_span`, in seconds, over how long communication may take."""
    guesses = _guesses(forward, backward, times)
    return fmean(predicted_span(order, forward, backward, guess) for guess in guesses)


def _guesses(
    forward: Sequence[Phase], backward: Sequence[Phase], times: PairTimes
) -> list[PairTimes]:
    return [times.with_comm(share, forward, backward) for share in _COMM_SHARES]


def _not_in(order: Sequence[Launch], times: PairTimes) -> list[Launch]:
    """The weight gradients, one by one, that the order does not name."""
    named = set(order)
    return [
        piece
        for index in range(len(times.weights))
        if Launch("W", index) not in named
        for piece in times.pieces(index)
        if piece not in named
    ]


class _Streams:
    """When each stream and each side is through with what it was given so far."""

    def __init__(
        self, forward: Sequence[Phase], backward: Sequence[Phase], times: PairTimes
    ) -> None:
        self._sides = {"F": forward, "B": backward, "W": backward}
        self._times = times
        self.free = {"compute": 0.0, "comm": 0.0}
        self._done = {"F": 0.0, "B": 0.0}
        self._queue = 0.0  # when the last kernel of the launch before began, in one queue

    def stream_of(self, launch: Launch) -> str:
        return self._sides[launch.op][launch.index].stream

    def gap_before(self, launch: Launch) -> float:
        """How long the stream of an F or B would wait for the one before it."""
        return self._done[launch.op] - self._ready(self.stream_of(launch))

    def run(self, launch: Launch) -> None:
        stream = self.stream_of(launch)
        # A weight gradient waits for its own backward alone, which ran before it on its stream.
        begin = max(self._ready(stream), self._done.get(launch.op, 0.0))
        end = self._take(stream, begin, self._times.of(launch))
        if launch.op != "W":
            self._done[launch.op] = end

    def run_left(self, left: Sequence[Launch]) -> None:
        """Weight gradients of the pair before: as many as this one leaves."""
        self._take("compute", self._ready("compute"), sum(map(self._times.of, left)))

    def _ready(self, stream: str) -> float:
        return max(self.free[stream], self._queue)

    def _take(self, stream: str, begin: float, seconds: float) -> float:
        self.free[stream] = end = begin + seconds
        if self._times.one_queue:
            self._queue = begin if stream == "comm" else end
        return end


def _fill(
    turns: Sequence[Launch],
    forward: Sequence[Phase],
    backward: Sequence[Phase],
    times: PairTimes,
    overhang: float,
    left: Set[Launch] = frozenset(),
) -> list[Launch]:
    """The turns, and in each gap of the compute stream the longest weight gradients that fit.

    Those in ``left`` are not launched; in the first gap those that the pair before has left are.
    """
    streams = _Streams(forward, backward, times)
    order: list[Launch] = []
    owed: list[Launch] = []

    def run(launch: Launch) -> None:
        streams.run(launch)
        order.append(launch)

    def run_left() -> None:
        if left and LEFT not in order:
            streams.run_left(sorted(left))
            order.append(LEFT)

    for launch in turns:
        if launch.op == "W":
            continue
        computes = streams.stream_of(launch) == "compute"
        if computes and streams.gap_before(launch) > 0:
            run_left()
        while computes and owed and (room := streams.gap_before(launch)) > 0:
            first = {times.weight_of.get(w, w): w for w in reversed(owed)}.values()
            longest = _longest(first, times, room, overhang)
            if longest is None:
                break
            owed.remove(longest)
            run(longest)
        run(launch)
        if launch.op == "B" and computes:
            owed += [w for w in times.pieces(launch.index) if w not in left]
    run_left()
    for launch in owed:
        run(launch)
    return order


def _longest(
    among: Iterable[Launch], times: PairTimes, room: float, overhang: float
) -> Launch | None:
    """The longest that is no longer than the room, or only by a share of itself."""
    fitting = [w for w in among if (1 - overhang) * times.of(w) <= room]
    return max(fitting, key=times.of, default=None)


def _what_to_leave(
    turns: Sequence[Launch],
    forward: Sequence[Phase],
    backward: Sequence[Phase],
    times: PairTimes,
) -> Iterator[frozenset[Launch]]:
    """Weight gradients that might fill the first gap of the next pair.

    Of those that are there last, for which memory waits for the shortest time, or of more, up to
    all. Gradients of one weight are added up in their order, so a weight that has several in a pair
    is left out.
    """
    room = _first_gap(turns, forward, backward, times)
    num = Counter(times.weight_of.values())
    pool: list[Launch] = []
    seen: set[frozenset[Launch]] = set()
    for index in range(len(times.weights)):  # a backward ends with the first phase
        pool += [w for w in times.pieces(index) if num[times.weight_of.get(w)] <= 1]
        for overhang in _OVERHANGS:
            among, left, rest = [*pool], set(), room
            while rest > 0 and (longest := _longest(among, times, rest, overhang)) is not None:
                among.remove(longest)
                left.add(longest)
                rest -= times.of(longest)
            if left and frozenset(left) not in seen:
                seen.add(frozenset(left))
                yield frozenset(left)


def _first_gap(
    turns: Sequence[Launch],
    forward: Sequence[Phase],
    backward: Sequence[Phase],
    times: PairTimes,
) -> float:
    """How long the compute stream waits when it does for the first time; 0 if a weight gradient
    could run by then."""
    streams = _Streams(forward, backward, times)
    for launch in turns:
        if launch.op == "W":
            break
        computes = streams.stream_of(launch) == "compute"
        if computes and (gap := streams.gap_before(launch)) > 0:
            return gap
        streams.run(launch)
        if computes and launch.op == "B" and times.weights[launch.index]:
            break
    return 0.0
