"""How balanced do experts stay while their loads drift, and how many of them move for it?

Loads drift as a stationary log-normal walk (sigma 1: what DeepSeek-R1 shows) and are re-balanced a
thousand times, globally, by three planners that see the same loads: DeepSeek's rules, the same with
its GPUs and slots renumbered to move as little as possible, and the balanced policy starting from
the placement in force.

Counted: experts' weights that a GPU receives from another (one that it has already is free), per
layer and re-balancing; balancedness (mean over maximum GPU load) under the loads that a plan was
made for, and under those one draw later, when it is replaced. Both are means over all layers and
re-balancings. Before anything is recorded, every plan is checked: a valid placement, no expert
twice on a GPU, balancedness as recomputed in float64, never above the bound.

    python benchmarks/eplb_drift.py [--rebalances 1000] [--memory 100] [--tolerance 0.02]

Appends a row to benchmarks/results/eplb_drift.csv.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from dualpipe_ext.bench.record import append, results_file
from dualpipe_ext.eplb import Placement, PlacementPlan, balancedness, drifting_loads, plan_placement
from dualpipe_ext.eplb.moves import experts_received, keep_slots, rename_gpus

EXPERTS, SLOTS, GPUS = 256, 288, 32


@dataclass
class Tally:
    """Sums over re-balancings of one planner."""

    placement: Placement | None = None
    moves: float = 0.0
    planned: list[float] = field(default_factory=list)
    stale: list[float] = field(default_factory=list)

    def switch(self, placement: Placement, loads: Tensor) -> None:
        if self.placement is not None:
            old, new = self.placement.phy2log, placement.phy2log
            self.stale.append(float(balancedness(loads, self.placement, GPUS).mean()))
            self.moves += float(experts_received(old, new, GPUS).sum()) / len(loads)
        self.placement = placement
        self.planned.append(float(balancedness(loads, placement, GPUS).mean()))

    def summary(self) -> dict[str, float]:
        return {
            "moves": round(self.moves / len(self.stale), 2),
            "balance": round(sum(self.planned) / len(self.planned), 4),
            "balance_one_draw_later": round(sum(self.stale) / len(self.stale), 4),
        }


def check(plan: PlacementPlan, loads: Tensor) -> None:
    """Raise if the plan is not what it says."""
    placement = plan.placement.validate()
    by_gpu = placement.phy2log.view(len(loads), GPUS, -1)
    shares = (loads.double() / placement.logcnt).gather(1, placement.phy2log)
    gpu = shares.view_as(by_gpu).sum(2)
    torch.testing.assert_close((gpu.mean(1) / gpu.amax(1)).float(), plan.after)
    if bool((plan.after > plan.bound * (1 + 1e-6)).any()):
        raise ValueError("expected no plan above the bound")
    if plan.policy == "balanced":
        ordered = by_gpu.sort(dim=2).values
        if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
            raise ValueError("expected no expert twice on a GPU")


def renumbered(placement: Placement, old: Placement | None) -> Placement:
    if old is None:
        return placement
    new = rename_gpus(old.phy2log, placement.phy2log, GPUS, EXPERTS)
    return Placement.from_phy2log(keep_slots(old.phy2log, new, GPUS), EXPERTS)


def simulate(
    rebalances: int, *, layers: int, memory: float, tolerance: float, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Moves and balance of every planner over as many re-balancings."""
    tallies = {name: Tally() for name in ("reference", "reference_renumbered", "balanced")}
    drift = drifting_loads(layers, EXPERTS, seed=seed, memory=memory)
    for loads in islice(drift, rebalances + 1):
        reference = plan_placement(loads, SLOTS, GPUS, policy="reference")
        balanced = plan_placement(
            loads, SLOTS, GPUS, current=tallies["balanced"].placement, tolerance=tolerance
        )
        for plan in (reference, balanced):
            check(plan, loads)
        tallies["reference"].switch(reference.placement, loads)
        again = renumbered(reference.placement, tallies["reference_renumbered"].placement)
        tallies["reference_renumbered"].switch(again, loads)
        tallies["balanced"].switch(balanced.placement, loads)
    return {name: tally.summary() for name, tally in tallies.items()}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rebalances", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--memory", type=float, default=100.0, help="draws that loads correlate")
    parser.add_argument("--tolerance", type=float, default=0.02)
    options = parser.parse_args(arguments)
    found = simulate(
        options.rebalances,
        layers=options.layers,
        memory=options.memory,
        tolerance=options.tolerance,
    )
    for name, figures in found.items():
        print(f"{name:22}", *(f"{key} {value:g}" for key, value in figures.items()))
    share = found["balanced"]["moves"] / found["reference"]["moves"]
    print(f"the balanced policy moves {share:.1%} of what the reference moves")
    given = {key: getattr(options, key) for key in ("rebalances", "layers", "memory", "tolerance")}
    row = {
        **given,
        **{f"{n}_{key}": v for n, figures in found.items() for key, v in figures.items()},
        "share_of_moves": round(share, 4),
    }
    command = " ".join(["python benchmarks/eplb_drift.py", *arguments])
    path = append(results_file("eplb_drift"), command, [row])
    print(f"recorded in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
