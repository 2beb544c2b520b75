"""How much balance does an uneven split of tokens over replicas save between two plans?

Loads drift as a stationary log-normal walk (sigma 1: what DeepSeek-R1 shows). A placement is
planned (balanced policy, globally, 256 experts in 288 slots on 32 GPUs) and then stays for a number
of draws, of which each is a step. Per step, three ways to spread tokens over the replicas that
there are: evenly; by weights for the loads of the step before, which is what a running model knows;
by weights for the loads themselves; and the bound that no weights exceed. Before anything is
recorded, the largest gap between the last two is checked, and that weights for the loads themselves
are never worse than even ones.

Counted: balancedness (mean over maximum GPU load), mean over layers and steps.

    python benchmarks/eplb_split.py [--steps 300] [--every 30] [--memory 1000]

Appends a row to benchmarks/results/eplb_split.csv.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice

import torch
from torch import Tensor

from dualpipe_ext.bench.record import append, results_file
from dualpipe_ext.eplb import balancedness, drifting_loads, plan_placement, split_replicas

EXPERTS, SLOTS, GPUS = 256, 288, 32
_LARGEST_GAP = 2e-3


def simulate(steps: int, *, every: int, layers: int, memory: float) -> dict[str, float]:
    """Mean balancedness of every way, and the largest gap to the bound."""
    found: dict[str, list[Tensor]] = {
        name: [] for name in ("even", "split_one_step_late", "split", "bound")
    }
    largest_gap = 0.0
    before = placement = None
    for step, loads in enumerate(islice(drifting_loads(layers, EXPERTS, memory=memory), steps + 1)):
        if placement is not None:
            late = split_replicas(before, placement, GPUS)
            now = split_replicas(loads, placement, GPUS)
            even = balancedness(loads, placement, GPUS)
            if bool((now.after < even * (1 - 1e-6)).any()):
                raise ValueError("expected weights that are no worse than even ones")
            largest_gap = max(largest_gap, float(now.gap.max()))
            found["even"].append(even)
            late_balance = balancedness(loads, placement, GPUS, weights=late.weights)
            found["split_one_step_late"].append(late_balance)
            found["split"].append(now.after)
            found["bound"].append(now.bound)
        if step % every == 0:
            placement = plan_placement(loads, SLOTS, GPUS).placement
        before = loads
    if largest_gap > _LARGEST_GAP:
        raise ValueError(f"expected a gap of at most {_LARGEST_GAP}, got {largest_gap}")
    means = {name: round(float(torch.stack(values).mean()), 4) for name, values in found.items()}
    return {**means, "largest_gap": float(f"{largest_gap:.1e}")}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=30, help="steps that a placement stays")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--memory", type=float, default=1000.0, help="draws that loads correlate")
    options = parser.parse_args(arguments)
    given = {key: getattr(options, key) for key in ("steps", "every", "layers", "memory")}
    figures = simulate(**given)
    for name, value in figures.items():
        print(f"{name:22} {value:g}")
    command = " ".join(["python benchmarks/eplb_split.py", *arguments])
    path = append(results_file("eplb_split"), command, [given | figures])
    print(f"recorded in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
