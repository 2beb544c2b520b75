"""A whole run as one rank lives it: set up, resume, train, save, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from dualpipe_ext.pipeline import simulate
from dualpipe_ext.profiling.capture import overlap_of
from dualpipe_ext.profiling.report import OverlapReport
from dualpipe_ext.training import checkpoint
from dualpipe_ext.training.compare import (
    COMPARED_STEPS,
    WARM_UP,
    Comparison,
    run_unbalanced,
    weights_without_replicas,
)
from dualpipe_ext.training.config import TrainConfig
from dualpipe_ext.training.data import load_text
from dualpipe_ext.training.progress import (
    Metrics,
    ProgressDisplay,
    as_facts,
    plot_loss,
    show_summary,
    summarize,
)
from dualpipe_ext.training.trainer import StepReport, Trainer
from dualpipe_ext.training.tuning import described, times_tried, tuning_lines


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Where a run reads and writes; nothing here changes what it computes.

    Attributes:
        out: the run's folder: metrics.csv, loss.png, summary.json, checkpoints/.
        data: training text, or ``None`` for the standard library's.
        resume: a checkpoint to go on from.
        save_every: steps between checkpoints; 0 for the last step only.
        compare_unbalanced: take some steps without replicas and rebalancing after the run, into
            unbalanced.csv, and show what they cost beside the run's.
    """

    out: Path
    data: Path | None = None
    resume: Path | None = None
    save_every: int = 0
    compare_unbalanced: bool = False

    def __post_init__(self) -> None:
        if self.save_every < 0:
            raise ValueError(f"expected save_every of at least 0, got {self.save_every}")


def run(config: TrainConfig, options: RunOptions) -> list[float]:
    """Train; called on every rank with the process group initialised. Returns the losses."""
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    text = load_text(options.data)
    trainer = Trainer(config, text, device=device)
    if options.resume is not None:
        checkpoint.check_layout(options.resume, config.layout())
        trainer.load_state_dict(checkpoint.load(options.resume))
    trainer.start_tuning()
    losses: list[float] = []
    with _Reporter(trainer, options) as reporter:
        while trainer.steps_done < config.steps:
            # The last step, for what a profile may cost is paid from then on; so not if others
            # are to be compared with it.
            profiled = trainer.steps_done + 1 == config.steps and not options.compare_unbalanced
            report = reporter.profiled(trainer.step) if profiled else trainer.step()
            losses.append(report.loss)
            reporter.step(report, trainer)
            last = trainer.steps_done == config.steps
            if last or (options.save_every and trainer.steps_done % options.save_every == 0):
                checkpoint.save(
                    options.out / "checkpoints",
                    trainer.steps_done,
                    config.layout(),
                    trainer.state_dict(),
                )
        reporter.end_of_steps()
        if not options.compare_unbalanced:
            trainer.close()
            reporter.finish()
            return losses
        weights = weights_without_replicas(trainer)
        # Both sides of the comparison communicate alike.
        if trainer.partition.comm_sms is not None:
            config = replace(config, comm_sms=trainer.partition.comm_sms)
        trainer.close()
        del trainer  # its memory is needed for the next one
        steps = WARM_UP + min(COMPARED_STEPS, config.steps)
        with reporter.unbalanced(steps) as on_step:
            run_unbalanced(config, text, weights, steps=steps, device=device, on_step=on_step)
        reporter.finish()
    return losses


class _Reporter:
    """Rank 0 shows and records the run; on the other ranks everything here does nothing."""

    def __init__(self, trainer: Trainer, options: RunOptions) -> None:
        self._options = options
        self._active = dist.get_rank() == 0
        if not self._active:
            return
        self._facts = _facts_of(trainer)
        self._told_tuning = False
        self._on_gpu = trainer.device.type == "cuda"
        self._hidden: dict[str, str] = {}
        self._predicted_bubble = simulate(trainer.plan).bubble_ratio
        self._comparison: Comparison | None = None
        options.out.mkdir(parents=True, exist_ok=True)
        self._console = Console()
        self._metrics = Metrics(options.out / "metrics.csv", steps_done=trainer.steps_done)
        self._display = ProgressDisplay(
            self._console, steps=trainer.config.steps, steps_done=trainer.steps_done
        )

    def __enter__(self) -> _Reporter:
        if self._active:
            for name, value in self._facts.items():
                self._console.print(f"{name:>13}  {value}", highlight=False)
            self._display.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._active:
            self._display.__exit__(*exc)
            self._metrics.close()

    def step(self, report: StepReport, trainer: Trainer) -> None:
        if not self._active:
            return
        self._metrics.add(report)
        self._display.update(report)
        tuner = trainer.tuner
        if tuner is not None and tuner.done and not self._told_tuning:
            self._told_tuning = True
            head = f"step {report.step:>5}/{trainer.config.steps}  SMs that communicate:"
            self._console.print(head, highlight=False)
            for line in tuning_lines(tuner.result):
                self._console.print(f"            {line}", highlight=False, soft_wrap=True)
            self._facts = {**_facts_of(trainer), "SMs tried": times_tried(tuner.result)}

    def profiled(self, step: Callable[[], StepReport]) -> StepReport:
        """Take a step and see how much of its communication is hidden, on rank 0's GPU."""
        if not self._active or not self._on_gpu:
            return step()
        report, overlap = overlap_of(step)
        self._hidden = {"communication hidden": hidden_share(overlap)}
        return report

    def end_of_steps(self) -> None:
        """The run itself is over."""
        if self._active:
            self._display.__exit__()

    @contextmanager
    def unbalanced(self, steps: int) -> Iterator[Callable[[StepReport], None]]:
        """Record the steps of the comparison; gives what takes their reports."""
        if not self._active:
            yield lambda report: None
            return
        self._console.print(
            f"{steps} more steps without replicas and rebalancing, to compare", highlight=False
        )
        metrics = Metrics(self._options.out / "unbalanced.csv", steps_done=0)
        try:
            yield metrics.add
        finally:
            metrics.close()
        self._comparison = Comparison.of(self._metrics.rows, metrics.rows)

    def finish(self) -> None:
        """Draw the plot, show the summary and save it."""
        if not self._active or not self._metrics.rows:
            return
        out = self._options.out
        plot_loss(self._metrics.rows, out / "loss.png", title=self._facts["schedule"])
        summary = summarize(
            self._metrics.rows, self._facts, predicted_bubble=self._predicted_bubble
        )
        summary.update(self._hidden)
        if self._comparison is not None:
            summary.update(self._comparison.rows())
        show_summary(self._console, summary, out / "summary.json")
        self._console.print(f"saved in {out}", highlight=False)


def hidden_share(overlap: OverlapReport | None) -> str:
    """The row of the summary; None where it could not be measured."""
    if overlap is None:
        return "not known: the profiler saw no GPU"
    if not overlap.communication_us:
        return "nothing communicates"
    waiting = overlap.waiting_us / overlap.communication_us
    return f"{overlap.hidden:.1%} of the last step's, {waiting:.0%} of it waiting for ranks"


def _facts_of(trainer: Trainer) -> dict[str, str]:
    config = trainer.config
    where = (
        torch.cuda.get_device_name() if trainer.device.type == "cuda" else "CPU"
    ) + f", torch {torch.__version__}"
    return as_facts(
        schedule=f"{config.schedule}, {config.pp} pipeline x {config.ep} expert-parallel ranks",
        transport=trainer.buffer.transport,
        stage_sends=trainer.pipeline.transport,
        communication=described(trainer.partition, trainer.tuner),
        experts=(
            f"{config.model.num_experts} (top {config.model.top_k}) "
            f"in {config.num_slots} slots per layer"
        ),
        device=where,
    )
