"""What was wrong with a route, told at the same call on every rank.

A GPU reports a mistake when it gets to the route, and keeps the first one until the host has taken
it. Hosts of several ranks are not equally far ahead of their GPUs. If each raised as soon as it saw
a report, one would leave out a call that others have made, which would then wait for it. So a call
raises only where all ranks have the same reports: when every route before a certain one, the same
on all ranks, has ended.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualpipe_ext.ep.transport import (
    RouteOptions,
    TransportConfig,
    describe_output,
    describe_setting,
    settings_differ,
    too_many_rows,
)
from dualpipe_ext.timeouts import wait_for_event

PERIOD = 32
"""Routes from one look back to the next."""

# A rank's reports: of routes for which the host does not wait, of those for which it does, and of
# those in graphs.
UNWATCHED, WATCHED, CAPTURED = _KINDS = range(3)


class RouteFaults:
    """The reports of one rank, and when to tell of them.

    A mistake in route n, for which the host did not wait, is told before the route that follows the
    end of the period after n's, or behind the next route for which the host waits. The host is
    2 * :data:`PERIOD` routes ahead of its GPU at most, and so waits only if it is far ahead.

    Attributes:
        reports: ``RouteReports`` of csrc/api, one for each of the kinds above.
    """

    def __init__(self, core: Any, config: TransportConfig) -> None:
        self.reports = core.RouteReports(len(_KINDS))
        self._config = config
        self._routes = 0
        # Ends of periods that nobody has looked back at: how many routes, and what follows them.
        self._ends: list[tuple[int, torch.cuda.Event]] = []

    def forget(self) -> None:
        """Begin anew; all routes have ended."""
        for kind in _KINDS:
            self.reports.take_fault(kind)
        self._routes = 0
        self._ends.clear()

    def check(self) -> None:
        """Raise what there is now, which may be on this rank only."""
        if self.reports.any_fault():
            for kind in _KINDS:
                self._raise(self.reports.take_fault(kind))

    def raise_mismatch(self) -> None:
        """Raise, without taking it, that ranks asked for different layouts.

        A rank that did not wait to learn of it has gone on to a dispatch that others have left out:
        its time-out follows from that.
        """
        for kind in _KINDS:
            fault = self.reports.take_fault(kind, keep=True)
            if fault is not None and fault["fault"] == "mismatch":
                self._raise(fault)

    def before_route(self, limit_s: float) -> None:
        """Called before every route that is not captured. May wait for earlier ones.

        Raises:
            ValueError: something was wrong with one of them.
            CommTimeoutError: they did not end within ``limit_s``.
        """
        if len(self._ends) < 2:
            return
        routes, finished = self._ends.pop(0)
        late = (
            f"rank {self._config.rank}, dispatch: expected the device to finish those of earlier "
            f"calls within {limit_s:g} s"
        )
        wait_for_event(finished, limit_s, late)
        fault = self.reports.take_fault(UNWATCHED, routes % 2**32)
        if fault is None:
            return
        # Of later routes a GPU may have reported by now, or not: nobody tells of them.
        torch.cuda.synchronize()
        self.reports.take_fault(UNWATCHED)
        self._raise(fault)

    def after_route(self) -> None:
        """Called behind it, on its stream."""
        self._routes += 1
        if self._routes % PERIOD == 0:
            finished = torch.cuda.Event()
            finished.record()
            self._ends.append((self._routes, finished))

    def after_wait(self, options: RouteOptions, topk_idx: Tensor) -> None:
        """Called when the host has waited for a route, and so for all before it."""
        earlier, captured, own = map(self.reports.take_fault, (UNWATCHED, CAPTURED, WATCHED))
        self._raise(earlier)
        self._raise(captured)
        self._raise(own, options, topk_idx)

    def _raise(
        self,
        fault: dict[str, Any] | None,
        options: RouteOptions | None = None,
        topk_idx: Tensor | None = None,
    ) -> None:
        """Raise what a report tells; ``options`` and ``topk_idx`` of the route, if it is known."""
        if fault is None:
            return
        rank = fault["rank"]
        if fault["fault"] == "bad_ids":
            limits = f"expected expert ids from -1 to {self._config.num_experts - 1} in topk_idx"
            if rank != self._config.rank or topk_idx is None:
                raise ValueError(f"{limits}, got {fault['count']} others at rank {rank}")
            bad = (topk_idx < -1) | (topk_idx >= self._config.num_experts)
            token, choice = bad.nonzero()[0].tolist()
            value = int(topk_idx[token, choice])
            raise ValueError(f"{limits}, got {value} at topk_idx[{token}, {choice}]")
        if fault["fault"] == "overflow":
            raise too_many_rows(fault["layout"], fault["limit"], rank, fault["count"])
        theirs = describe_setting(fault["layout"], fault["alignment"])
        mine = "another"
        if options is not None:
            mine = describe_setting(*options.setting)
            if mine == theirs:  # what differs is another thing
                mine += describe_output(options.zero_copy, options.limit is not None)
                theirs += describe_output(fault["zero_copy"], fault["limit"] >= 0)
        raise settings_differ(self._config.rank, mine, rank, theirs)
