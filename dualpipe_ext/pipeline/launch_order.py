"""The order in which a pair is launched: the forward of one chunk beside the backward of another.

What belongs here: turns of the two sides (:func:`interleave`), where deferred weight gradients go
(between them, or, once it is known how long everything takes, where the compute stream would wait:
:func:`fill_gaps`), and the model of two streams that tells which order ends first
(:func:`predicted_span`). Pure data: nothing is launched here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from dualpipe_ext.pipeline.overlap import Phase

# How much longer than a gap a weight gradient may be to go there, as a share of its time. Which
# is best depends on how the pieces happen to fit: all are tried.
_OVERHANGS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Launch(NamedTuple):
    """One launch of a pair: F or B of a phase, or W, its deferred weight gradients."""

    op: Literal["F", "B", "W"]
    index: int
    # W: which of the phase's gradients, in the order they were deferred; None for all that are left
    part: int | None = None


@dataclass(frozen=True, slots=True)
class PairTimes:
    """How long each launch of a pair takes, in seconds.

    Attributes:
        forward: of every phase.
        backward: of every phase, without deferred weight gradients.
        weights: of every phase's deferred weight gradients, in the order they were deferred.
        weight_of: which weight each of these is for; those of one weight keep their order, in which
            they are added up. What is not in it is for a weight of its own.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    weight_of: Mapping[Launch, Hashable] = field(default_factory=dict)

    def of(self, launch: Launch) -> float:
        """Seconds of a launch."""
        if launch.op != "W":
            return (self.forward if launch.op == "F" else self.backward)[launch.index]
        parts = self.weights[launch.index]
        return sum(parts) if launch.part is None else parts[launch.part]


def interleave(forward: Sequence[Phase], backward: Sequence[Phase]) -> list[Launch]:
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
    """
    forward_runs = _runs(forward, range(len(forward)))
    backward_runs = _runs(backward, range(len(backward) - 1, -1, -1))
    order: list[Launch] = []
    owed: list[Launch] = []
    while forward_runs or backward_runs:
        alone = bool(forward_runs and backward_runs) and forward_runs[0][0] == backward_runs[0][0]
        if backward_runs:
            stream, indices = backward_runs.popleft()
            order += [Launch("B", index) for index in indices]
            if stream == "compute":
                owed += [Launch("W", index) for index in indices]
            if stream == "comm" or all(kind == "compute" for kind, _ in backward_runs):
                order += owed
                owed = []
        if forward_runs and not alone:
            _, indices = forward_runs.popleft()
            order += [Launch("F", index) for index in indices]
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
    gradients, the one that ends first by :func:`predicted_span`; the one of :func:`interleave` is
    among them.

    Args:
        forward: as in :func:`interleave`.
        backward: as in :func:`interleave`.
        times: of these phases.

    Returns:
        Every F and B once, and every weight gradient that was timed.
    """
    turns = interleave(forward, backward)
    orders = [turns, *(_fill(turns, forward, backward, times, o) for o in _OVERHANGS)]
    # min() takes the first of equals.
    return min(orders, key=lambda order: predicted_span(order, forward, backward, times))


def predicted_span(
    order: Sequence[Launch],
    forward: Sequence[Phase],
    backward: Sequence[Phase],
    times: PairTimes,
) -> float:
    """Seconds from the first launch to the end of the last: two streams, each in launch order, and
    every F and B behind the one before it on its side."""
    streams = _Streams(forward, backward, times)
    for launch in order:
        streams.run(launch)
    return max(streams.free.values())


class _Streams:
    """When each stream and each side is through with what it was given so far."""

    def __init__(
        self, forward: Sequence[Phase], backward: Sequence[Phase], times: PairTimes
    ) -> None:
        self._sides = {"F": forward, "B": backward, "W": backward}
        self._times = times
        self.free = {"compute": 0.0, "comm": 0.0}
        self._done = {"F": 0.0, "B": 0.0}

    def stream_of(self, launch: Launch) -> str:
        return self._sides[launch.op][launch.index].stream

    def gap_before(self, launch: Launch) -> float:
        """How long the stream of an F or B would wait for the one before it."""
        return self._done[launch.op] - self.free[self.stream_of(launch)]

    def run(self, launch: Launch) -> None:
        stream = self.stream_of(launch)
        # A weight gradient waits for its own backward alone, which ran before it on its stream.
        begin = max(self.free[stream], self._done.get(launch.op, 0.0))
        self.free[stream] = end = begin + self._times.of(launch)
        if launch.op != "W":
            self._done[launch.op] = end


def _fill(
    turns: Sequence[Launch],
    forward: Sequence[Phase],
    backward: Sequence[Phase],
    times: PairTimes,
    overhang: float,
) -> list[Launch]:
    """The turns, and in each gap of the compute stream the longest weight gradients that fit."""
    streams = _Streams(forward, backward, times)
    order: list[Launch] = []
    owed: list[Launch] = []

    def run(launch: Launch) -> None:
        streams.run(launch)
        order.append(launch)

    for launch in turns:
        if launch.op == "W":
            continue
        computes = streams.stream_of(launch) == "compute"
        while computes and owed and (room := streams.gap_before(launch)) > 0:
            first = {times.weight_of.get(w, w): w for w in reversed(owed)}.values()
            fitting = [w for w in first if (1 - overhang) * times.of(w) <= room]
            if not fitting:
                break
            longest = max(fitting, key=times.of)
            owed.remove(longest)
            run(longest)
        run(launch)
        if launch.op == "B" and computes:
            parts = range(len(times.weights[launch.index]))
            owed += [Launch("W", launch.index, part) for part in parts]
    for launch in owed:
        run(launch)
    return order
