"""How long a rank's actions took and how long it waited for its peers.

What belongs here: :class:`Stopwatch`, which marks points in time on the device's own clock, and
:class:`StepRecord`, what the runtime reports of a recorded step. Times are in seconds since the
rank's step began: by the host's clock on the CPU, by CUDA events of the compute stream on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ActionTime:
    """One action (or pair) of a step.

    Attributes:
        label: in torch's notation, such as ``3F7``.
        wait_s: time spent waiting for its inputs, which ends at ``start_s``.
        start_s: when it began to compute.
        end_s: when it had computed and posted its results.
    """

    label: str
    wait_s: float
    start_s: float
    end_s: float


@dataclass(frozen=True)
class StepRecord:
    """What one rank did in one step.

    Attributes:
        actions: in execution order.
        span_s: from the beginning of the step to the end of its last action.
    """

    actions: tuple[ActionTime, ...]
    span_s: float

    @property
    def busy_s(self) -> float:
        """Time spent computing."""
        return sum(action.end_s - action.start_s for action in self.actions)

    @property
    def wait_s(self) -> float:
        """Time spent waiting for inputs from other ranks."""
        return sum(action.wait_s for action in self.actions)

    def bubble(self, span_s: float | None = None) -> float:
        """The share of the span in which this rank did not compute.

        Args:
            span_s: of the whole pipeline, the largest ``span_s`` of its ranks; by default the
                rank's own, which leaves out the time a rank is done before others.
        """
        span = self.span_s if span_s is None else span_s
        return 1.0 - self.busy_s / span if span > 0 else 0.0


class Stopwatch:
    """Marks points in time; the differences are known once the device is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows: list[tuple[str, Any, Any, Any]] = []
        self._begin = self.mark()

    def mark(self) -> Any:
        """Now, on the device's clock."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def add(self, label: str, asked: Any, start: Any, end: Any) -> None:
        """Note an action by its marks: inputs asked for, inputs there, done."""
        self._rows.append((label, asked, start, end))

    def record(self) -> StepRecord:
        """The times of all actions noted; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        times = [(row[0], *map(self._since_begin, row[1:])) for row in self._rows]
        actions = [
            ActionTime(label, start - asked, start, end) for label, asked, start, end in times
        ]
        return StepRecord(tuple(actions), _last_end(actions))

    def _since_begin(self, mark: Any) -> float:
        if self._device.type != "cuda":
            return mark - self._begin
        return self._begin.elapsed_time(mark) / 1e3


def _last_end(actions: Sequence[ActionTime]) -> float:
    return actions[-1].end_s if actions else 0.0
