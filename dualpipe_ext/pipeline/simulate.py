"""Time: when each step of a plan starts and ends, what idles meanwhile, and what must be held.

What belongs here: the durations of operations (:class:`Durations`), running a plan against them
(:func:`simulate`) and its results (:class:`Simulation`). NumPy, no torch.

Shape legend: R ranks, S virtual stages, C chunks of one pipe, N steps of all ranks together (a
step is an action or an overlapped pair), plus one closing entry per rank in the flat arrays.

**Units.** One *share* is the work of one rank on one micro-batch when the model is spread evenly
over the ranks, 1/R of the model. Durations are those of a share, so that schedules are compared for
the same model on the same ranks. A stage of 1F1B, ZB1P and DualPipe is one share; a stage of
DualPipeV and ZB-V is half a share, because a rank has two. Activations are counted in shares too:
1 is what the forward of one micro-batch through 1/R of the model leaves for its backward.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dualpipe_ext.pipeline.plan import Action, Op, Pair, Plan, ProgramActions, check_plan, parts

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Durations:
    """How long operations take, in any one unit of time; each field is a number once constructed.

    Attributes:
        F: forward of one share.
        B: full backward; by default I + W, that is 2F if those are not given either.
        I: backward for the gradient of the input; by default B - W, or half of B.
        W: backward for the gradients of the weights; by default B - I, or half of B.
        FB: an overlapped pair of a forward and a full backward. By default F + B: nothing hidden.
            Give the measured time of a pair to see what the overlap is worth.
        comm: from the end of a step on one rank until the rank of the next stage can use its
            result. It delays the receiver only, and is nothing between stages of one rank.
        stage_scale: per model stage, its work in shares, for models that are not spread evenly (a
            head on the last stage, say). By default 1 each, or 1/2 each where ranks have two.
    """

    F: float = 1.0
    B: float = None  # type: ignore[assignment]
    I: float = None  # type: ignore[assignment] # noqa: E741
    W: float = None  # type: ignore[assignment]
    FB: float = None  # type: ignore[assignment]
    comm: float = 0.0
    stage_scale: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_time("F", self.F)
        full, for_input, for_weights = self.B, self.I, self.W
        if full is None:
            for_input = self.F if for_input is None else for_input
            for_weights = self.F if for_weights is None else for_weights
            full = for_input + for_weights
        elif for_input is None:
            for_weights = full / 2 if for_weights is None else for_weights
            for_input = full - for_weights
        elif for_weights is None:
            for_weights = full - for_input
        if for_input < 0 or for_weights < 0:
            raise ValueError(
                f"expected a split of B = {full:g} into I and W of at least 0, "
                f"got I = {for_input:g} and W = {for_weights:g}"
            )
        resolved = {
            "B": full,
            "I": for_input,
            "W": for_weights,
            "FB": self.F + full if self.FB is None else self.FB,
            "comm": self.comm,
        }
        for name, value in resolved.items():
            _check_time(name, value)
            object.__setattr__(self, name, value)
        if self.F + self.B == 0:
            raise ValueError("expected a positive F or B, got 0 for both")
        for scale in self.stage_scale or ():
            _check_time("stage_scale", scale)


def _check_time(name: str, value: float) -> None:
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"expected {name} to be a finite time of at least 0, got {value:g}")


class Span(NamedTuple):
    """One step on the time axis."""

    step: Action | Pair
    start: float
    end: float


@dataclass(frozen=True, slots=True, eq=False)
class Simulation:
    """What :func:`simulate` found.

    Attributes:
        plan, durations: what was simulated.
        starts, ends: per rank, the start and end of its steps in execution order, float64.
        busy: [R] time each rank computes.
        peak_activations: [R] most activations a rank holds at once, in shares. A chunk's are held
            from the start of its forward to the end of its full backward, or of its W where the
            backward is split; those of a pair's two chunks are held together.
        parameter_copies: [R] parameters a rank holds, in shares: 2 for DualPipe, else 1.
    """

    plan: Plan
    durations: Durations
    starts: tuple[Floats, ...]
    ends: tuple[Floats, ...]
    busy: Floats
    peak_activations: Floats
    parameter_copies: Floats

    @property
    def makespan(self) -> float:
        """Time from the first start to the last end."""
        return max((float(ends[-1]) for ends in self.ends if ends.size), default=0.0)

    @property
    def bubble(self) -> Floats:
        """[R] idle time of each rank within the makespan."""
        return self.makespan - self.busy

    @property
    def mean_bubble(self) -> float:
        """Idle time of a rank, on average; of every rank alike if the model is spread evenly."""
        return float(self.bubble.mean())

    @property
    def bubble_ratio(self) -> float:
        """The part of all ranks' time that is idle, 0 to 1."""
        return self.mean_bubble / self.makespan if self.makespan else 0.0

    def timeline(self, rank: int) -> tuple[Span, ...]:
        """The steps of ``rank`` with their times, in execution order."""
        starts, ends = self.starts[rank].tolist(), self.ends[rank].tolist()
        return tuple(map(Span, self.plan.actions[rank], starts, ends))


def simulate(plan: Plan, durations: Durations | None = None) -> Simulation:
    """Execute ``plan`` on paper: each rank does its steps in order, each as early as it can.

    A step starts when the rank has ended the one before and its inputs have arrived; a pair starts
    when both its inputs have and delivers both results at its end.

    Args:
        plan: any plan; one that is not from ``build_plan`` is checked first.
        durations: times of the operations; ``Durations()`` (F = I = W = 1, B = 2) if not given.

    Raises:
        ValueError: the plan is not executable, or ``stage_scale`` does not fit it.
    """
    durations = durations or Durations()
    scale = _stage_scale(plan, durations)
    if isinstance(plan.actions, ProgramActions):
        layout = _layout_of_programs(plan, plan.actions)
    else:
        check_plan(plan)
        layout = _layout_of_actions(plan)
    cost = _step_costs(layout, durations, scale)
    end = _run(plan, layout, cost, durations.comm)
    start = end - cost
    slices = [slice(low, high - 1) for low, high in itertools.pairwise(layout.base)]
    parameters = np.zeros(plan.num_ranks)
    np.add.at(parameters, np.array(plan.stage_rank), scale)
    return Simulation(
        plan=plan,
        durations=durations,
        starts=tuple(start[steps] for steps in slices),
        ends=tuple(end[steps] for steps in slices),
        busy=np.add.reduceat(cost, layout.base[:-1]),
        peak_activations=_peak_activations(layout, scale),
        parameter_copies=parameters,
    )


def _stage_scale(plan: Plan, durations: Durations) -> Floats:
    """[S] the work of each virtual stage, in shares."""
    depth = len(plan.pipes[0])
    if durations.stage_scale is None:
        return np.full(plan.num_stages, plan.num_ranks / depth)
    if len(durations.stage_scale) != depth:
        raise ValueError(
            f"expected stage_scale for {depth} model stages of {plan.kind} on {plan.num_ranks} "
            f"ranks, got {len(durations.stage_scale)}"
        )
    return np.tile(np.array(durations.stage_scale, dtype=np.float64), len(plan.pipes))


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where each operation stands in the flat arrays over the steps of all ranks.

    base [R+1]: rank r's steps are base[r] .. base[r+1]-2; entry base[r+1]-1 closes the rank.
    forward, backward, weights [S, C]: the entry with the F, the B or I, and the W of a chunk on a
    stage. Where the backward is not split, weights names the B, too.
    """

    base: Ints
    forward: Ints
    backward: Ints
    weights: Ints


def _empty_layout(plan: Plan, lengths: list[int]) -> _Layout:
    shape = (plan.num_stages, plan.num_chunks // len(plan.pipes))
    base = np.concatenate(([0], np.cumsum(np.array(lengths, dtype=np.int64) + 1)))
    return _Layout(base, *(np.full(shape, -1, dtype=np.int64) for _ in range(3)))


def _layout_of_actions(plan: Plan) -> _Layout:
    layout = _empty_layout(plan, [len(steps) for steps in plan.actions])
    tables = {Op.F: layout.forward, Op.I: layout.backward, Op.W: layout.weights}
    for base, steps in zip(layout.base[:-1].tolist(), plan.actions, strict=True):
        for entry, step in enumerate(steps, start=base):
            for op, stage, chunk in parts(step):
                if op is Op.B:
                    layout.backward[stage, chunk] = layout.weights[stage, chunk] = entry
                else:
                    tables[op][stage, chunk] = entry
    return layout


def _any_of(*letters: str) -> npt.NDArray[np.bool_]:
    """[256] whether a byte is one of ``letters``."""
    table = np.zeros(256, dtype=np.bool_)
    table[[ord(letter) for letter in letters]] = True
    return table


# Per stage of a rank (0: its first, 1: its second), the letters of programs.py that act on it.
_FORWARD = (_any_of("F", "X"), _any_of("f", "x"))
_BACKWARD = (_any_of("B", "I", "x"), _any_of("b", "i", "X"))
_SPLIT = (_any_of("I"), _any_of("i"))
_WEIGHTS = (_any_of("W"), _any_of("w"))


def _layout_of_programs(plan: Plan, actions: ProgramActions) -> _Layout:
    """The same layout without expanding actions: on a stage each operation's k-th is chunk k."""
    layout = _empty_layout(plan, [len(program) for program in actions.programs])
    for base, program, stages in zip(
        layout.base[:-1].tolist(), actions.programs, actions.stages, strict=True
    ):
        letters = np.frombuffer(program.encode("ascii"), dtype=np.uint8)
        for slot, stage in enumerate(stages):
            backward = np.flatnonzero(_BACKWARD[slot][letters])
            layout.forward[stage] = base + np.flatnonzero(_FORWARD[slot][letters])
            layout.backward[stage] = layout.weights[stage] = base + backward
            split = np.flatnonzero(_SPLIT[slot][letters[backward]])
            layout.weights[stage, split] = base + np.flatnonzero(_WEIGHTS[slot][letters])
    return layout


def _step_costs(layout: _Layout, durations: Durations, scale: Floats) -> Floats:
    """[N + R] the duration of each entry; 0 for closing entries."""
    size = int(layout.base[-1])
    forward, backward = np.zeros(size), np.zeros(size)
    for stage, work in enumerate(scale.tolist()):
        split = layout.weights[stage] != layout.backward[stage]
        forward[layout.forward[stage]] = work * durations.F
        backward[layout.backward[stage]] = work * np.where(split, durations.I, durations.B)
        backward[layout.weights[stage][split]] = work * durations.W
    cost = forward + backward
    # In a pair of unequal stages the same part of the time is hidden as in one of equal stages.
    cost[_pairs(layout)] *= durations.FB / (durations.F + durations.B)
    return cost


def _pairs(layout: _Layout) -> npt.NDArray[np.bool_]:
    """[N + R] whether the entry is an overlapped pair."""
    forward, backward = np.zeros((2, int(layout.base[-1])), dtype=np.bool_)
    forward[layout.forward.ravel()] = True
    backward[layout.backward.ravel()] = True
    return forward & backward


def _run(plan: Plan, layout: _Layout, cost: Floats, comm: float) -> Floats:
    """[N + R] the end of each entry; infinite for closing entries.

    All ranks advance together, one entry a sweep where its inputs are there, so that the number of
    Python operations depends on the length of a rank's program and not on the number of ranks.
    """
    size = int(layout.base[-1])
    closing = layout.base[1:] - 1
    nothing, never = size, size + 1
    end = np.full(size + 2, np.inf)
    end[nothing] = 0.0
    sources = _sources(plan, layout, closing, nothing=nothing, never=never)
    at = layout.base[:-1].copy()
    clock = np.zeros(plan.num_ranks)
    while True:
        ready = clock
        for entries, away in sources:
            arrival = end[entries[at]]
            if comm:
                arrival += comm * away[at]
            ready = np.maximum(ready, arrival)
        finish = ready + cost[at]
        end[at] = finish  # still infinite where an input is missing
        ran = finish < np.inf
        if not ran.any():
            break
        np.copyto(clock, finish, where=ran)
        at += ran
    assert (at == closing).all(), "a checked plan does not deadlock"
    return end[:size]


def _sources(
    plan: Plan, layout: _Layout, closing: Ints, *, nothing: int, never: int
) -> list[tuple[Ints, npt.NDArray[np.bool_]]]:
    """Per input of an entry: [N + R] the entry it comes from, and whether from another rank.

    One input suffices for plans without pairs; with pairs it is two, for the forward and for the
    backward. Closing entries wait for ``never``.
    """
    size = int(layout.base[-1])
    forward = np.full(size, nothing, dtype=np.int64), np.zeros(size, dtype=np.bool_)
    forward[0][closing] = never
    backward = forward
    if _pairs(layout).any():
        backward = np.full(size, nothing, dtype=np.int64), np.zeros(size, dtype=np.bool_)
    for pipe in plan.pipes:
        for upper, lower in itertools.pairwise(pipe):
            away = plan.stage_rank[upper] != plan.stage_rank[lower]
            forward[0][layout.forward[lower]] = layout.forward[upper]
            forward[1][layout.forward[lower]] = away
            backward[0][layout.backward[upper]] = layout.backward[lower]
            backward[1][layout.backward[upper]] = away
    return [forward] if backward is forward else [forward, backward]


def _peak_activations(layout: _Layout, scale: Floats) -> Floats:
    """[R] most activations held at once, in shares; depends on the order only, not on times."""
    size = int(layout.base[-1])
    gained, freed = np.zeros(size), np.zeros(size)
    for stage, work in enumerate(scale.tolist()):
        gained[layout.forward[stage]] = work
        freed[layout.weights[stage]] = work
    # All that is gained in a rank is freed in it, so the running sum starts at 0 in each.
    held = np.cumsum(gained - freed) + freed
    return np.maximum.reduceat(held, layout.base[:-1])
