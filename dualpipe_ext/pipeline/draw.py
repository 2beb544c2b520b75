"""Pictures of schedules: ranks as rows, time to the right, a coloured cell per operation.

What belongs here: :func:`draw` and what it is made of. Times come from ``simulate.py``. Plans of up
to a few thousand cells are drawn cell by cell with the chunk's number in each; larger ones as an
image in which a pixel has the mean colour of what its rank does in its span of time.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch

from dualpipe_ext.files import check_picture, replacing
from dualpipe_ext.pipeline.plan import Action, Op, Plan, ProgramActions, parts
from dualpipe_ext.pipeline.simulate import Durations, Simulation, simulate

_NAMES = {
    "dualpipe": "DualPipe",
    "dualpipev": "DualPipeV",
    "1f1b": "1F1B",
    "zb1p": "ZB1P (ZB-H1)",
    "zbv": "ZB-V",
}
# Light for the first stage of a rank, dark for the second: the other direction, or the way back.
_COLOURS = {
    Op.F: ("#ffdf9e", "#f5b041"),
    Op.B: ("#b5e3c0", "#5fbe85"),
    Op.I: ("#aee0ef", "#52b4d6"),
    Op.W: ("#dccff3", "#ab8fe0"),
}
_LABELS = {
    Op.F: "forward",
    Op.B: "backward",
    Op.I: "backward for input",
    Op.W: "backward for weights",
}
_IDLE = "#eceef2"
_INK = "#20242b"
_PALE_INK = "#5b6470"

_MOST_CELLS = 20_000  # more are drawn as an image
_MOST_ROWS = 256  # of an image; of more ranks an even selection is shown
_IMAGE_COLUMNS = 1600
_INCHES_PER_CELL = 0.2  # width of the shortest common cell, if the picture stays below the widest
_WIDTH_RANGE = (9.0, 26.0)
_ROW_INCHES = 0.27


def draw(
    what: Plan | Simulation | Sequence[Plan | Simulation],
    path: str | os.PathLike[str],
    *,
    durations: Durations | None = None,
) -> None:
    """Draw one schedule, or several below each other on one time axis.

    The same input gives the same SVG, byte for byte.

    Args:
        what: plans, which are simulated first, or simulations.
        path: the picture; its suffix, .svg, .png or .pdf, is its format.
        durations: times for simulating plans.

    Raises:
        ValueError: another suffix, no schedule, or a folder that does not exist.
    """
    suffix = check_picture(path)
    several = [what] if isinstance(what, (Plan, Simulation)) else list(what)
    if not several:
        raise ValueError("expected at least one schedule to draw, got none")
    simulations = [
        simulate(item, durations) if isinstance(item, Plan) else item for item in several
    ]
    picture = io.BytesIO()
    # A fixed salt and no date: identifiers inside an SVG are otherwise new in every run.
    with rc_context({"svg.hashsalt": "dualpipe", "font.family": "DejaVu Sans"}):
        figure = _figure(simulations)
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(suffix[1:])
        figure.savefig(picture, format=suffix[1:], dpi=160, metadata=metadata)
    with replacing(path) as file:
        file.write(picture.getvalue())


class _Cell(NamedTuple):
    """A coloured rectangle: one action, or one half of a pair."""

    action: Action
    rank: int
    start: float
    end: float
    top: float  # 0 is the upper edge of the rank's row, 1 its lower edge
    bottom: float


@dataclass(frozen=True, slots=True)
class _Scale:
    """Size of the picture: inches per unit of time, and of the whole."""

    inches_per_time: float
    width: float
    longest: float


def _figure(simulations: list[Simulation]) -> Figure:
    scale = _scale(simulations)
    rows = [min(simulation.plan.num_ranks, _MOST_ROWS) for simulation in simulations]
    # Rows of an image are thinner: they have no text.
    heights = [
        count * (_ROW_INCHES if _fits(simulation) else min(_ROW_INCHES, 3.2 / count))
        for count, simulation in zip(rows, simulations, strict=True)
    ]
    note = _shade_note(simulations)
    gap, foot, left, right = 0.42, 0.42, 0.62, 0.18
    head = 0.48 if note else 0.28
    height = head + sum(heights) + gap * len(heights) + foot
    width = left + scale.width + right
    figure = Figure(figsize=(width, height), facecolor="white")
    top = height - head
    for simulation, tall in zip(simulations, heights, strict=True):
        top -= gap
        box = (left / width, (top - tall) / height, scale.width / width, tall / height)
        axes = figure.add_axes(box)
        _panel(axes, simulation, scale)
        top -= tall
    axes.tick_params(axis="x", labelbottom=True)
    axes.set_xlabel("time", fontsize=9, color=_INK, labelpad=2)
    _legend(figure, simulations, left / width, 1 - 0.12 / height)
    figure.text(left / width, 1 - 0.37 / height, note, fontsize=8.5, color=_PALE_INK, va="top")
    return figure


def _scale(simulations: list[Simulation]) -> _Scale:
    longest = max(simulation.makespan for simulation in simulations) or 1.0
    shortest = longest
    for simulation in filter(_fits, simulations):
        for starts, ends in zip(simulation.starts, simulation.ends, strict=True):
            lasting = (ends - starts)[ends > starts]
            shortest = min(shortest, float(lasting.min(initial=shortest)))
    low, high = _WIDTH_RANGE
    width = min(max(_INCHES_PER_CELL * longest / shortest, low), high)
    return _Scale(width / longest, width, longest)


def _fits(simulation: Simulation) -> bool:
    return sum(map(len, simulation.starts)) <= _MOST_CELLS


def _panel(axes: Axes, simulation: Simulation, scale: _Scale) -> None:
    num_ranks = simulation.plan.num_ranks
    axes.set_xlim(0, scale.longest)
    axes.set_ylim(num_ranks, 0)
    axes.set_title(_title(simulation), loc="left", fontsize=10, color=_INK, pad=5)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, labelsize=8, labelcolor=_INK, pad=3, labelbottom=False)
    every = 1 + (num_ranks - 1) // (32 if _fits(simulation) else 8)
    ticks = range(0, num_ranks, every)
    axes.set_yticks([rank + 0.5 for rank in ticks], [f"rank {rank}" for rank in ticks])
    if _fits(simulation):
        _draw_cells(axes, simulation, scale)
    else:
        _draw_image(axes, simulation)


def _title(simulation: Simulation) -> str:
    plan = simulation.plan
    return (
        f"{_NAMES.get(plan.kind, plan.kind)}: {plan.num_ranks} ranks, {plan.num_chunks} chunks, "
        f"time {simulation.makespan:.4g}, bubble {simulation.mean_bubble:.4g} "
        f"({simulation.bubble_ratio:.1%}), peak activations "
        f"{simulation.peak_activations.max():.4g}, parameters "
        f"{simulation.parameter_copies.max():.3g}×"
    )


def _draw_cells(axes: Axes, simulation: Simulation, scale: _Scale) -> None:
    plan = simulation.plan
    makespan = simulation.makespan
    idle = [_corners(0, makespan, rank, rank + 1) for rank in range(plan.num_ranks)]
    axes.add_collection(PolyCollection(idle, facecolors=_IDLE, edgecolors="white", linewidths=1.0))
    shade = {
        stage: index % 2
        for rank in range(plan.num_ranks)
        for index, stage in enumerate(plan.stages_of(rank))
    }
    cells = [cell for rank in range(plan.num_ranks) for cell in _cells(simulation, rank)]
    corners = [
        _corners(cell.start, cell.end, cell.rank + cell.top, cell.rank + cell.bottom)
        for cell in cells
    ]
    colours = [_COLOURS[cell.action.op][shade[cell.action.stage]] for cell in cells]
    axes.add_collection(PolyCollection(corners, facecolors=colours, linewidths=0))
    # Outlines go around steps, so that the halves of a pair stay together.
    outlines = [_corners(cell.start, cell.end, cell.rank, cell.rank + 1) for cell in cells]
    axes.add_collection(
        PolyCollection(outlines, facecolors="none", edgecolors="white", linewidths=1.0)
    )
    # Chunks of the second direction are numbered on from those of the first, as is customary.
    first = {
        stage: plan.pipe_of(stage) * plan.chunks_of_pipe(0) for stage in range(plan.num_stages)
    }
    for cell in cells:
        number = str(cell.action.chunk + first[cell.action.stage])
        size = _font_size(len(number), cell, scale)
        if size:
            middle = (cell.start + cell.end) / 2, cell.rank + (cell.top + cell.bottom) / 2
            axes.text(
                *middle,
                number,
                fontsize=size,
                color=_INK,
                ha="center",
                va="center_baseline",
                clip_on=True,
            )


def _cells(simulation: Simulation, rank: int) -> list[_Cell]:
    cells = []
    for step, start, end in simulation.timeline(rank):
        actions = parts(step)
        for index, action in enumerate(actions):
            top, bottom = index / len(actions), (index + 1) / len(actions)
            cells.append(_Cell(action, rank, start, end, top, bottom))
    return cells


def _corners(left: float, right: float, top: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _font_size(digits: int, cell: _Cell, scale: _Scale) -> float:
    """Points that fit the cell; 0 if what fits is too small to read."""
    wide = (cell.end - cell.start) * scale.inches_per_time * 72
    tall = (cell.bottom - cell.top) * _ROW_INCHES * 72
    # A digit of DejaVu Sans is 0.64 of the font size wide and 0.73 tall.
    size = min(8.0, 0.86 * wide / (0.64 * digits), 0.80 * tall / 0.73)
    return size if size >= 3.5 else 0.0


def _draw_image(axes: Axes, simulation: Simulation) -> None:
    plan = simulation.plan
    num_rows = min(plan.num_ranks, _MOST_ROWS)
    edges = np.linspace(0, axes.get_xlim()[1], _IMAGE_COLUMNS + 1)
    image = np.ones((num_rows, _IMAGE_COLUMNS, 3))
    for row in range(num_rows):
        rank = row * plan.num_ranks // num_rows
        image[row] = _pixel_row(simulation, rank, edges)
    axes.imshow(
        image,
        extent=(0, axes.get_xlim()[1], plan.num_ranks, 0),
        aspect="auto",
        interpolation="nearest",
    )


def _pixel_row(simulation: Simulation, rank: int, edges: np.ndarray) -> np.ndarray:
    """[columns, 3] the mean colour of the rank within each span of time, white past the end."""
    starts, ends = simulation.starts[rank], simulation.ends[rank]
    letters = np.frombuffer(_letters(simulation.plan, rank).encode("ascii"), dtype=np.uint8)
    knots = np.stack((starts, ends), axis=1).ravel()
    width = np.diff(edges)
    within = np.clip(simulation.makespan - edges[:-1], 0, width)
    colour = (width - within)[:, None] * np.ones(3)
    idle = within.copy()
    for letter in np.unique(letters):
        lasting = np.where(letters == letter, ends - starts, 0.0)
        after = np.cumsum(lasting)
        so_far = np.stack((after - lasting, after), axis=1).ravel()
        spent = np.diff(np.interp(edges, knots, so_far))
        colour += spent[:, None] * _letter_colour(chr(letter))
        idle -= spent
    colour += np.clip(idle, 0, None)[:, None] * np.array(to_rgb(_IDLE))
    return np.clip(colour / width[:, None], 0, 1)


def _letters(plan: Plan, rank: int) -> str:
    """A letter per step, as in ``programs.py``."""
    if isinstance(plan.actions, ProgramActions):
        return plan.actions.programs[rank]
    second = {stage: index % 2 for index, stage in enumerate(plan.stages_of(rank))}
    letters = []
    for step in plan.actions[rank]:
        actions = parts(step)
        letter = actions[0].op.value if len(actions) == 1 else "X"
        letters.append(letter.lower() if second[actions[0].stage] else letter)
    return "".join(letters)


def _letter_colour(letter: str) -> np.ndarray:
    slot = int(letter.islower())
    if letter in "Xx":
        colours = [_COLOURS[Op.F][slot], _COLOURS[Op.B][1 - slot]]
    else:
        colours = [_COLOURS[Op(letter.upper())][slot]]
    return np.mean([to_rgb(colour) for colour in colours], axis=0)


def _legend(figure: Figure, simulations: list[Simulation], left: float, top: float) -> None:
    letters = {
        letter
        for simulation in simulations
        for rank in {0, simulation.plan.num_ranks - 1}
        for letter in _letters(simulation.plan, rank)
    }
    two_stages = any(letter.islower() for letter in letters)
    used = {letter.upper() for letter in letters}
    if "X" in used:
        used |= {"F", "B"}
    handles: list[Any] = []
    labels = []
    for op in Op:
        if op.value in used:
            shades = _COLOURS[op][: 1 + two_stages]
            handles.append(tuple(Patch(facecolor=shade) for shade in shades))
            labels.append(_LABELS[op])
    if "X" in used:
        handles.append((Patch(facecolor=_COLOURS[Op.F][0]), Patch(facecolor=_COLOURS[Op.B][1])))
        labels.append("both overlapped: one cell, halved")
    handles.append((Patch(facecolor=_IDLE),))
    labels.append("idle")
    figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(left, top),
        borderaxespad=0,
        borderpad=0,
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
        handlelength=2.4,
        handletextpad=0.5,
        columnspacing=1.6,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
    )


def _shade_note(simulations: list[Simulation]) -> str:
    """What light and dark mean in this picture; empty if it has one shade only."""
    meanings = {}
    for plan in (simulation.plan for simulation in simulations):
        if plan.has_copies:
            meanings["chunks that enter at rank 0"] = "chunks that enter at the last rank"
        elif plan.num_stages > plan.num_ranks:
            meanings["first stage of a rank"] = "its second stage"
    if not meanings:
        return ""
    return f"light: {' or '.join(meanings)};  dark: {' or '.join(meanings.values())}"
