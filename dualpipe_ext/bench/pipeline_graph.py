"""Forms of a pair as CUDA graphs: the host gives out a row of calls at once.

A chunk's backward reads what its forward left in memory, and a graph always reads the same memory.
So a graph of one call cannot follow itself: it would take up the chunk of the call before where it
has long been overwritten. Captured is a row of calls instead, first those that lead in, then those
that are measured, and replayed is always the whole row.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualpipe_ext.bench import timing
from dualpipe_ext.bench.pipeline_profile import NUM_CALLS, NUM_LEAD
from dualpipe_ext.bench.timing import Call, Series

# Rows that there is room for, over those that come: routing has a bound, for the host asks nobody.
ROOM = 1.1


def captured(start: Call, call: Call, stop: Call, pool: Any) -> Series:
    """A row of calls as graphs on the current stream, which must not be the default one.

    Args:
        start: runs the forward of the first chunk.
        call: runs the backward of the chunk before and the forward of the next.
        stop: runs what the last call has left, and forgets the chunk that waits for its backward.
        pool: of memory; its graphs must not run beside each other.

    Raises:
        Exception: what one of them, or CUDA, has against being captured.
    """

    row = Series.of(call, NUM_CALLS, num_lead=NUM_LEAD)

    def begin() -> None:
        start()
        row.lead()

    begin()  # what is loaded or allocated once
    stop()
    on = {"pool": pool, "stream": torch.cuda.current_stream()}
    lead, body = (timing.captured(part, **on) for part in (begin, row.body))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a graph without nodes: there may be nothing to run
        # Into a graph that nobody replays, for what it would read is not there.
        timing.captured(stop, **on)
    return Series(lead, body, NUM_CALLS)


def once(start: Call, call: Callable[[], Sequence[Tensor]], last: Call, pool: Any) -> list[Tensor]:
    """What ``call`` returns when all three are replayed as graphs; see :func:`captured`."""
    found: list[Tensor] = []
    on = {"pool": pool, "stream": torch.cuda.current_stream()}
    graphs = []  # kept: a pool is gone for good when no graph has it
    for part in (start, lambda: found.extend(call()), last):
        graphs.append(timing.captured(part, **on))
        graphs[-1]()
    torch.cuda.synchronize()
    return [tensor.clone() for tensor in found]
