"""What imbalance costs: steps without replicas and without rebalancing, beside those of a run.

The steps go on from the run's own weights and data, so the router sends tokens to the same experts;
only where these live differs: one slot each, in the order of their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dualpipe_ext.bench.record import percentiles
from dualpipe_ext.eplb import Placement, migrate
from dualpipe_ext.training.config import TrainConfig
from dualpipe_ext.training.trainer import StepReport, Trainer

COMPARED_STEPS = 20
# New memory, new connections: the first steps of a trainer are not like the others.
WARM_UP = 2


def unbalanced(config: TrainConfig) -> TrainConfig:
    """The same run with a slot for each expert, which it never leaves.

    Raises:
        ValueError: the experts alone do not divide over the expert-parallel ranks.
    """
    return replace(config, redundant_experts=0, rebalance_every=0)


@torch.no_grad()
def weights_without_replicas(trainer: Trainer) -> list[dict[str, Tensor]]:
    """The weights of this rank's stages as :func:`unbalanced` places them, on the CPU.

    A collective call after which ``trainer`` must not go on: its experts have moved, its maps and
    its optimizer do not know.
    """
    config, balancer = trainer.config, trainer.balancer
    balancer.close()  # what is on its way reads from the same weights
    each, slots = config.model.num_experts // config.ep, config.num_slots // config.ep
    # In the slots behind each rank's own experts may be anything: they are cut off.
    plain = [rank * each + min(i, each - 1) for rank in range(config.ep) for i in range(slots)]
    cut = set()
    for layer in balancer.layers:
        names, parameters = zip(*layer.expert_parameters(), strict=True)
        migrate(
            [p.data for p in parameters],
            balancer.placement.phy2log[layer.index],
            plain,
            balancer.group,
            timeout_s=config.timeout_s,
        )
        cut.update(names)
    return [
        {
            name: (value[:each] if f"{position}.{name}" in cut else value).cpu().clone()
            for name, value in stage.state_dict().items()
        }
        for position, stage in enumerate(trainer.stages)
    ]


def run_unbalanced(
    config: TrainConfig,
    text: bytes,
    weights: Sequence[dict[str, Tensor]],
    *,
    steps: int,
    device: torch.device,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> list[StepReport]:
    """Take steps from the end of a run, without replicas and without rebalancing.

    Args:
        config: the run's.
        text: training text.
        weights: from :func:`weights_without_replicas`; their trainer may be gone.
        steps: to take.
        device: this rank's device.
        on_step: told of each.
    """
    trainer = Trainer(unbalanced(config), text, device=device)
    model = config.model
    for stage, saved in zip(trainer.stages, weights, strict=True):
        stage.load_state_dict(saved)
    trainer.optimizer.reset_masters()
    trainer.balancer.install(Placement.identity(model.num_layers, model.num_experts))
    trainer.steps_done = config.steps
    reports = []
    for _ in range(steps):
        reports.append(trainer.step())
        on_step(reports[-1])
    trainer.close()
    return reports


@dataclass(frozen=True, slots=True)
class Comparison:
    """Steps of a run and those without balancing, warm-up left out of both.

    Attributes:
        balanced_s, unbalanced_s: p20, p50 and p80 of the step time in seconds.
        balanced, unbalanced: mean balance of the experts, 0 to 1.
        steps: compared, of either.
    """

    balanced_s: dict[str, float]
    unbalanced_s: dict[str, float]
    balanced: float
    unbalanced: float
    steps: int

    @classmethod
    def of(cls, run: Sequence[dict[str, float]], without: Sequence[dict[str, float]]) -> Comparison:
        """Compare the last steps of ``run`` with as many of ``without`` (rows of metrics)."""
        run, without = (list(rows[min(WARM_UP, len(rows) - 1) :]) for rows in (run, without))
        steps = min(len(run), len(without))
        run, without = run[-steps:], without[-steps:]
        return cls(
            *(percentiles([row["seconds"] for row in rows]) for rows in (run, without)),
            *(sum(row["balance"] for row in rows) / steps for rows in (run, without)),
            steps=steps,
        )

    @property
    def speedup(self) -> float:
        """Median step time without balancing over that with it."""
        return self.unbalanced_s["p50"] / self.balanced_s["p50"]

    def rows(self) -> dict[str, str]:
        """As lines of a summary."""
        return {
            f"step time, last {self.steps} steps": _times(self.balanced_s),
            "the same, unbalanced": _times(self.unbalanced_s),
            "expert balance of these": f"{self.balanced:.3f}, unbalanced {self.unbalanced:.3f}",
            "speed-up over unbalanced": f"{self.speedup:.3f}x",
        }


def _times(seconds: dict[str, float]) -> str:
    return "{p50:.4f} s (p20 {p20:.4f}, p80 {p80:.4f})".format(**seconds)
