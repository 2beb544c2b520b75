"""Where a benchmark is, for whoever waits for it."""

from __future__ import annotations

import sys

from dualpipe_ext.bench.ranks import Ranks


def say(ranks: Ranks, what: str, step: str = "") -> None:
    """Show where the run is, in one line of rank 0's stderr; "" takes it away."""
    if ranks.rank != 0:
        return
    if sys.stderr.isatty():
        text = f"{what}: {step}" if step else what
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    elif what and not step:
        print(what, file=sys.stderr, flush=True)
