"""Plans and simulations in other programs' formats.

What belongs here: the action CSV of ``torch.distributed.pipelining`` (:func:`write_csv`,
:func:`read_csv`) and the trace JSON of Chrome and Perfetto (:func:`write_trace`). No torch.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from dualpipe_ext.files import replacing
from dualpipe_ext.pipeline.plan import Action, Op, Pair, Plan, check_plan, parts
from dualpipe_ext.pipeline.simulate import Simulation

_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")
_PAIR = re.compile(r"\(\s*(\d+F\d+)\s*;\s*(\d+B\d+)\s*\)OVERLAP_F_B")


def write_csv(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write the plan as torch's compute-only action CSV: a row per rank, a cell per step.

    ``torch.distributed.pipelining``'s schedule runtime loads and executes it
    (``_PipelineScheduleRuntime._load_csv``), adding the communication itself. It knows one pipe
    only: it parses the file of a plan with two (DualPipe) but cannot execute it, because it would
    send the last stage of the first pipe's outputs to the first stage of the second.
    """
    with replacing(path) as file:
        for steps in plan.actions:
            file.write((",".join(map(str, steps)) + "\n").encode())


def read_csv(path: str | os.PathLike[str], *, kind: str = "csv", num_pipes: int = 1) -> Plan:
    """Read a compute-only action CSV, from :func:`write_csv` or from torch, as a checked plan.

    Args:
        path: the file. Empty cells (torch writes them for idle steps) are skipped.
        kind: the name that the plan gets.
        num_pipes: equal, contiguous parts that its stages are divided into: 2 for DualPipe.

    Raises:
        ValueError: the file is no action CSV, or the plan in it cannot be executed.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [[cell.strip() for cell in row if cell.strip()] for row in csv.reader(file)]
    except UnicodeDecodeError:
        raise ValueError(f"expected a CSV of pipeline actions, got a binary file {path}") from None
    actions = tuple(
        tuple(_parse(cell, f"row {row} of {path}") for cell in cells)
        for row, cells in enumerate(rows, start=1)
    )
    owner: dict[int, int] = {}
    num_chunks = 0
    for rank, steps in enumerate(actions):
        for action in (action for step in steps for action in parts(step)):
            owner.setdefault(action.stage, rank)
            num_chunks = max(num_chunks, action.chunk + 1)
    num_stages = len(owner)
    if not owner or max(owner) >= num_stages:
        raise ValueError(f"expected actions for every stage from 0 up in {path}, got {_gap(owner)}")
    if num_pipes < 1 or num_stages % num_pipes:
        raise ValueError(f"expected num_pipes to divide {num_stages} stages, got {num_pipes}")
    depth = num_stages // num_pipes
    plan = Plan(
        kind=kind,
        num_ranks=len(actions),
        num_chunks=num_chunks * num_pipes,
        actions=actions,
        stage_rank=tuple(owner[stage] for stage in range(num_stages)),
        pipes=tuple(range(first, first + depth) for first in range(0, num_stages, depth)),
    )
    check_plan(plan)
    return plan


def _gap(owner: dict[int, int]) -> str:
    if not owner:
        return "no action"
    return f"none for stage {min(set(range(max(owner))) - set(owner))}"


def _parse(cell: str, where: str) -> Action | Pair:
    if _ACTION.fullmatch(cell):
        return _parse_action(cell)
    if match := _PAIR.fullmatch(cell):
        forward, backward = match.groups()
        return Pair(_parse_action(forward), _parse_action(backward))
    raise ValueError(
        f"expected a compute action such as 3F7 or (3F7;4B2)OVERLAP_F_B, got {cell!r} in {where}"
    )


def _parse_action(text: str) -> Action:
    match = _ACTION.fullmatch(text)
    assert match is not None
    stage, op, chunk = match.groups()
    return Action(Op(op), int(stage), int(chunk))


_CATEGORY = {Op.F: "forward", Op.B: "backward", Op.I: "backward input", Op.W: "backward weights"}


def write_trace(
    simulations: Simulation | Sequence[Simulation],
    path: str | os.PathLike[str],
    *,
    unit_us: float = 1000.0,
) -> None:
    """Write a trace for chrome://tracing or ui.perfetto.dev: a process per plan, a thread per rank.

    Args:
        simulations: one simulation, or several to see side by side.
        path: the JSON file.
        unit_us: microseconds that one unit of the durations stands for; the default shows it as
            a millisecond.
    """
    several = [simulations] if isinstance(simulations, Simulation) else list(simulations)
    with replacing(path) as file:
        file.write(b'{"displayTimeUnit": "ms", "traceEvents": [')
        separator = b"\n"
        for process, simulation in enumerate(several):
            for rank in range(simulation.plan.num_ranks):
                for event in _events(simulation, process, rank, unit_us):
                    file.write(separator + json.dumps(event).encode())
                    separator = b",\n"
        file.write(b"\n]}\n")


def _events(
    simulation: Simulation, process: int, rank: int, unit_us: float
) -> list[dict[str, Any]]:
    place = {"pid": process, "tid": rank}
    plan = simulation.plan
    named = f"{plan.kind}, {plan.num_ranks} ranks, {plan.num_chunks} chunks"
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", **place, "args": {"name": named}},
        {"ph": "M", "name": "thread_name", **place, "args": {"name": f"rank {rank}"}},
    ]
    for step, start, end in simulation.timeline(rank):
        actions = parts(step)
        event = {
            "ph": "X",
            "name": "&".join(f"{action.op}{action.chunk}" for action in actions),
            "cat": " and ".join(_CATEGORY[action.op] for action in actions),
            "ts": start * unit_us,
            "dur": (end - start) * unit_us,
            "args": {str(action.op): f"stage {action.stage}" for action in actions},
        }
        events.append(place | event)
    return events
