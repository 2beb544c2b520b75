"""Launch orders of a pipeline's pairs, which learn from how long the first pairs took.

What belongs here: :class:`Sample`, the marks of one timed pair, and :class:`PairOrders`, which
hands out the plain order until enough pairs have been timed, and then the one that
``launch_order.py`` finds for the times. Ranks that exchange tokens within their pairs need one
order: a rank that computes something else first is waited for by the others. So they agree on the
times, and all begin with the new order at the same pair. For that the host waits for its device,
and for those ranks, once for each kind of pair and number of communication SMs (three times at
most, if pairs do not have the same gradients).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

from dualpipe_ext.pipeline.launch_order import Launch, PairTimes, fill_gaps, interleave

if TYPE_CHECKING:
    from dualpipe_ext.pipeline.overlap import Phase

# The first pairs load kernels and fill the allocator.
WARM_UP = 2
NUM_SAMPLES = 3
# How often samples that are not of the same launches are taken again.
_TRIES = 3

Agree = Callable[[Sequence[float]], Sequence[float]]
"""Given as many numbers on every rank, returns the largest of all ranks for each."""


class Sample:
    """When the launches of one pair began and ended, by events on their streams.

    In one hardware queue a timed event holds up all that was launched behind it, until what it
    marks is over (as measured: docs/LOG.md). Such a pair overlaps nothing, and its times are those
    of launches alone.
    """

    def __init__(self) -> None:
        self._marks: dict[Launch, tuple[Any, Any]] = {}
        self.weights: dict[Launch, Hashable] = {}
        """Which weight each W is for."""

    def add(self, launch: Launch, begin: Any, end: Any) -> None:
        """Note a launch by its events, which can tell the time between them."""
        self._marks[launch] = begin, end

    def kind(self) -> int:
        """A number that only samples of the same launches share, with W's of a weight alike; never
        zero."""
        launches = sorted(self._marks)
        first: dict[Hashable, int] = {}
        weights = [first.setdefault(self.weights.get(w), len(first)) for w in launches]
        return 1 + zlib.crc32(repr([*map(tuple, launches), *weights]).encode())

    def seconds(self) -> dict[Launch, float]:
        """Of every launch. Waits until the device is through with all of them."""
        for _, end in self._marks.values():
            end.synchronize()
        return {
            launch: 1e-3 * begin.elapsed_time(end) for launch, (begin, end) in self._marks.items()
        }


class PairOrders:
    """Launch orders by kind of pair: the stages of both sides, and the names and streams of their
    phases.

    Names alone do not tell how long phases take: all layers have the same ones, but a stage may
    have an embedding in its first phase, or other layers than the next. A rank has two stages at
    most, so there are few kinds.

    Args:
        agree: makes times those of the slowest of the ranks that run the same pairs at the same
            time; by default this rank is alone.
        one_queue: see :func:`interleave`.
    """

    def __init__(self, agree: Agree = list, *, one_queue: bool = False) -> None:
        self._kinds: dict[tuple[Any, ...], _Kind] = {}
        self._agree = agree
        self._one_queue = one_queue

    def forget(self) -> None:
        """Measure again: what pairs run on has changed."""
        self._kinds.clear()

    def begin(
        self,
        forward: Sequence[Phase],
        backward: Sequence[Phase],
        *,
        may_time: bool,
        stages: tuple[Hashable, Hashable] = (None, None),
    ) -> tuple[Sequence[Launch], Sample | None]:
        """The order of the next pair of these phases, and what to note its times in, if anything.

        Args:
            forward: as in :func:`interleave`.
            backward: as in :func:`interleave`.
            may_time: whether this pair could be timed. Orders come from times only.
            stages: that the two are of.
        """
        names = (tuple((p.name, p.stream) for p in side) for side in (forward, backward))
        key = (*stages, *names)
        kind = self._kinds.get(key)
        if kind is None:
            kind = _Kind(forward, backward, self._agree, one_queue=self._one_queue)
            self._kinds[key] = kind
        return kind.begin(may_time)


class _Kind:
    def __init__(
        self,
        forward: Sequence[Phase],
        backward: Sequence[Phase],
        agree: Agree,
        *,
        one_queue: bool,
    ) -> None:
        self._agree = agree
        self._one_queue = one_queue
        # Without what they compute: it may hold on to a micro-batch.
        self._forward, self._backward = (
            tuple(replace(phase, fn=tuple) for phase in side) for side in (forward, backward)
        )
        self._order = interleave(forward, backward, one_queue=one_queue)
        self._settled = False
        self._seen = 0
        self._samples: list[Sample] = []
        self._tries = 0

    def begin(self, may_time: bool) -> tuple[Sequence[Launch], Sample | None]:
        if self._settled or not may_time:
            return self._order, None
        self._seen += 1
        if self._seen <= WARM_UP:
            return self._order, None
        if len(self._samples) < NUM_SAMPLES:
            self._samples.append(Sample())
            return self._order, self._samples[-1]
        self._settle()
        return self._order, None

    def _settle(self) -> None:
        samples, self._samples = self._samples, []
        self._tries += 1
        self._settled = self._tries == _TRIES
        kinds = {sample.kind() for sample in samples}
        kind = kinds.pop() if len(kinds) == 1 else 0
        most, least = self._agree([kind, -kind])
        if kind == 0 or most != -least:
            return  # they, or another rank's, had not the same gradients to compute: once more
        times = self._times(samples)
        self._order = fill_gaps(self._forward, self._backward, times)
        self._settled = True

    def _times(self, samples: Sequence[Sample]) -> PairTimes:
        seconds = [sample.seconds() for sample in samples]
        launches = sorted(seconds[0])
        own = [median(s[launch] for s in seconds) for launch in launches]
        middle = dict(zip(launches, self._agree(own), strict=True))
        weights: list[list[Launch]] = [[] for _ in self._backward]
        for launch in sorted(launch for launch in middle if launch.op == "W"):
            weights[launch.index].append(launch)
        return PairTimes(
            forward=tuple(middle[Launch("F", index)] for index in range(len(self._forward))),
            backward=tuple(middle[Launch("B", index)] for index in range(len(self._backward))),
            weights=tuple(tuple(middle[launch] for launch in parts) for parts in weights),
            weight_of=samples[-1].weights,
            one_queue=self._one_queue,
        )
