"""What a run shows while it trains and leaves behind: progress bar, metrics file, plot, summary."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dualpipe_ext.errors import CheckpointError
from dualpipe_ext.files import replacing
from dualpipe_ext.training.trainer import StepReport

_COLUMNS = [field.name for field in fields(StepReport)]


class Metrics:
    """A CSV with one row per step, flushed at each, so that a killed run keeps its history.

    Args:
        path: the file; rows up to ``steps_done`` are kept when a run goes on, later ones dropped.
        steps_done: steps the run had done before it starts now.
    """

    def __init__(self, path: Path, *, steps_done: int) -> None:
        self.rows: list[dict[str, float]] = []
        if steps_done and path.is_file():
            self.rows = [row for row in read_metrics(path) if row["step"] <= steps_done]
        with replacing(path) as raw, io.TextIOWrapper(raw, newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, _COLUMNS)

    def add(self, report: StepReport) -> None:
        """Append one step."""
        self.rows.append(asdict(report))
        self._writer.writerow(self.rows[-1])
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file, as numbers; one that a crash left incomplete is dropped.

    Raises:
        CheckpointError: the file is not one that :class:`Metrics` wrote.
    """
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != _COLUMNS:
                raise ValueError(f"the columns {reader.fieldnames}")
            whole = (row for row in reader if None not in (*row, *row.values()))
            return [{k: float(v) for k, v in row.items()} for row in whole]
    except (ValueError, csv.Error) as error:
        raise CheckpointError(f"expected a run's metrics in {path}, got {error}") from None


class ProgressDisplay:
    """A live bar on a terminal; elsewhere a line for about every twentieth of the run."""

    def __init__(self, console: Console, *, steps: int, steps_done: int) -> None:
        self._console = console
        self._steps = steps
        self._every = max(1, steps // 20)
        self._bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=steps_done, figures="")

    def __enter__(self) -> ProgressDisplay:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def update(self, report: StepReport) -> None:
        """Show one step, and what was decided after it about the experts' placement."""
        figures = (
            f"loss {report.loss:.4f}  {report.tokens / report.seconds:,.0f} tok/s  "
            f"bubble {report.bubble:.1%}  balance {report.balance:.2f}"
        )
        if self._console.is_terminal:
            self._bar.update(self._task, completed=report.step, figures=figures)
        elif report.step % self._every == 0 or report.step in (1, self._steps):
            self._console.print(f"step {report.step:>5}/{self._steps}  {figures}", highlight=False)
        if report.rebalance:
            decision = "experts move" if report.rebalance > 0 else "experts stay"
            self._console.print(
                f"step {report.step:>5}/{self._steps}  {decision}: {report.saved_s * 1e3:.3g} ms "
                f"saved until the next plan, {report.cost_s * 1e3:.3g} ms to move",
                highlight=False,
                soft_wrap=True,
            )


def plot_loss(rows: list[dict[str, float]], path: Path, *, title: str) -> None:
    """Draw loss and expert balance over the steps into ``path`` (.svg or .png)."""
    import matplotlib  # slow to import, and only rank 0 needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row["step"] for row in rows]
    figure, loss_axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    loss_axis.plot(steps, [row["loss"] for row in rows], color="#1f4e9c", label="loss")
    loss_axis.set(xlabel="step", ylabel="cross-entropy (nats per byte)", title=title)
    loss_axis.grid(alpha=0.3)
    balance_axis = loss_axis.twinx()
    balance_axis.plot(
        steps, [row["balance"] for row in rows], color="#d9822b", alpha=0.6, label="balance"
    )
    balance_axis.set(ylabel="expert balance (mean / max rank load)", ylim=(0, 1.02))
    handles = loss_axis.get_lines() + balance_axis.get_lines()
    loss_axis.legend(handles=handles, loc="center right")
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format=path.suffix[1:])
    pyplot.close(figure)


def summarize(
    rows: list[dict[str, float]], facts: Mapping[str, str], *, predicted_bubble: float
) -> dict[str, str]:
    """The figures of a finished run, as shown and as saved; speeds leave out the first steps."""
    # Means over the ends, since single batches differ by more than the loss falls in a few steps.
    tail = max(1, len(rows) // 10)
    steady = rows[min(len(rows) - 1, 2) :]
    seconds = sum(row["seconds"] for row in steady)

    def mean(key: str, part: list[dict[str, float]]) -> float:
        return sum(row[key] for row in part) / len(part)

    return {
        **facts,
        "steps": f"{int(rows[-1]['step'])}",
        "loss, first step": f"{rows[0]['loss']:.4f}",
        f"loss, mean of last {tail}": f"{mean('loss', rows[-tail:]):.4f}",
        "tokens/s": f"{sum(row['tokens'] for row in steady) / seconds:,.0f}",
        "bubble measured": f"{mean('bubble', steady):.1%}",
        "bubble of the plan, F = I = W": f"{predicted_bubble:.1%}",
        "expert balance": f"{mean('balance', rows[-tail:]):.3f}",
        "placements changed": _placements(rows),
    }


def _placements(rows: list[dict[str, float]]) -> str:
    begun = sum(row["rebalance"] > 0 for row in rows)
    asked = sum(row["rebalance"] != 0 for row in rows)
    moved, waited = (sum(row[key] for row in rows) for key in ("moved_bytes", "moves_wait_s"))
    return f"{begun} of {asked} times, {moved / 1e6:,.1f} MB moved, {waited:.2g} s waited for it"


def show_summary(console: Console, summary: Mapping[str, str], path: Path) -> None:
    """Print the summary as a table and save it as JSON in ``path``."""
    table = Table(title="training run", show_header=False)
    for name, value in summary.items():
        table.add_row(name, value)
    console.print(table)
    with replacing(path) as file:
        file.write((json.dumps(dict(summary), indent=1) + "\n").encode())


def as_facts(**facts: Any) -> dict[str, str]:
    """Keyword arguments as table rows: underscores become spaces, values text."""
    return {name.replace("_", " "): str(value) for name, value in facts.items()}
