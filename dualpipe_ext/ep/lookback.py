"""When to tell what was wrong with a route that the host did not wait for: everywhere at once.

A GPU reports a mistake when it gets to the route, and hosts of several ranks are not equally far
ahead of their GPUs. If each raised as soon as it saw a report, one would leave out a call that
others have made, which would then wait for it.
"""

from __future__ import annotations

import torch

PERIOD = 32
"""Routes from one look back to the next."""


class Lookback:
    """Counts the routes of one rank; every :data:`PERIOD` of them it waits for those before.

    What was wrong with route n, counted from 1, is told before the route that follows the end of
    the period after n's: the same one on every rank. The host is 2 * :data:`PERIOD` routes ahead of
    its GPU at most, and so waits only if it is far ahead.
    """

    def __init__(self) -> None:
        self._routes = 0
        # Ends of periods that nobody has looked back at: how many routes, and what follows them.
        self._ends: list[tuple[int, torch.cuda.Event]] = []

    def before_route(self) -> int | None:
        """The last route of those that may be told of now, modulo 2^32; None for no route."""
        if len(self._ends) < 2:
            return None
        routes, finished = self._ends.pop(0)
        finished.synchronize()
        return routes % 2**32

    def after_route(self) -> None:
        """One has been launched on the current stream, and will run once: not into a graph."""
        self._routes += 1
        if self._routes % PERIOD == 0:
            finished = torch.cuda.Event()
            finished.record()
            self._ends.append((self._routes, finished))
