"""Which schedule for my cluster: the schedules side by side, in the numbers that decide.

What belongs here: :func:`compare` and the row it returns per schedule. Drawing is in ``draw.py``,
the table on the terminal in ``cli/schedule.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dualpipe_ext.pipeline.plan import KINDS, build_plan, normalise_kind
from dualpipe_ext.pipeline.simulate import Durations, Simulation, simulate


@dataclass(frozen=True, slots=True)
class Score:
    """One schedule's row in a comparison; a share is 1/R of the model (see ``simulate.py``).

    Attributes:
        kind: the schedule.
        makespan: time of one step, in the unit of the durations.
        bubble: idle time of a rank in it, on average over ranks.
        bubble_ratio: bubble over makespan, 0 to 1.
        peak_activations: most activations any rank holds at once, in shares of one chunk.
        parameter_copies: most parameters any rank holds, in shares.
        problem: why the schedule cannot run in this shape; empty if it can. The numbers are NaN
            then.
    """

    kind: str
    makespan: float = math.nan
    bubble: float = math.nan
    bubble_ratio: float = math.nan
    peak_activations: float = math.nan
    parameter_copies: float = math.nan
    problem: str = ""


def score(simulation: Simulation) -> Score:
    """The numbers of one simulation."""
    return Score(
        kind=simulation.plan.kind,
        makespan=simulation.makespan,
        bubble=simulation.mean_bubble,
        bubble_ratio=simulation.bubble_ratio,
        peak_activations=float(simulation.peak_activations.max()),
        parameter_copies=float(simulation.parameter_copies.max()),
    )


def compare(
    kinds: Sequence[str] = KINDS,
    *,
    num_ranks: int,
    num_chunks: int,
    durations: Durations | None = None,
) -> tuple[Score, ...]:
    """Simulate several schedules of the same model on the same ranks, with the same chunks.

    Every schedule gets the same work per rank and chunk, whatever number of stages it cuts the
    model into, so that the makespans can be compared. A thousand ranks with two thousand chunks
    take seconds for each kind.

    Args:
        kinds: schedules to compare, as ``build_plan`` takes them.
        num_ranks, num_chunks: the shape. A kind that does not exist for it gets a row whose
            ``problem`` says what would work.
        durations: times of the operations, of one share.

    Raises:
        ValueError: a kind is unknown, or ``durations.stage_scale`` does not fit its stages.
    """
    return tuple(
        try_kind(kind, num_ranks=num_ranks, num_chunks=num_chunks, durations=durations)[0]
        for kind in kinds
    )


def try_kind(
    kind: str, *, num_ranks: int, num_chunks: int, durations: Durations | None = None
) -> tuple[Score, Simulation | None]:
    """One row of :func:`compare`, and its simulation unless there is a problem."""
    name = normalise_kind(kind)
    try:
        plan = build_plan(name, num_ranks=num_ranks, num_chunks=num_chunks)
    except ValueError as error:
        return Score(kind=name, problem=str(error)), None
    simulation = simulate(plan, durations)
    return score(simulation), simulation
