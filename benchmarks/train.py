"""How fast does the training command train on this machine, and does it learn?

Counted: tokens of a step over all ranks, divided by the wall-clock time of the whole step (data,
forward, backward, reductions, optimizer, rebalancing), as the slowest rank sees it. The first three
steps are left out. Percentiles are over steps. Before anything is recorded, the loss must have
fallen below the entropy of the text's byte frequencies: more than that can only be learned from
context.

    python benchmarks/train.py [arguments of `dualpipe train`, on the default text]

Appends a row to benchmarks/results/train.csv and leaves the run's folder in build/benchmarks.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from dualpipe_ext.bench.record import append, percentiles, results_file
from dualpipe_ext.training.data import load_text
from dualpipe_ext.training.progress import read_metrics

_WARM_UP = 3
_LAST = 30


def byte_entropy(text: bytes) -> float:
    """Nats per byte of a text whose bytes are independent but as frequent as in ``text``."""
    shares = torch.frombuffer(bytearray(text), dtype=torch.uint8).bincount().double() / len(text)
    return float(torch.special.entr(shares).sum())


def main(arguments: list[str]) -> int:
    out = Path("build/benchmarks/train")
    shutil.rmtree(out, ignore_errors=True)
    command = ["dualpipe", "train", *arguments]
    program = [sys.executable, "-m", "dualpipe_ext", "train", *arguments, "--out", str(out)]
    done = subprocess.run(program, check=False)
    if done.returncode:
        return done.returncode
    rows = read_metrics(out / "metrics.csv")
    last = [row["loss"] for row in rows[-_LAST:]]
    loss = sum(last) / len(last)
    bound = byte_entropy(load_text(None))
    if not loss < bound:
        print(f"expected a loss below {bound:.4f}, got {loss:.4f}: no row is recorded")
        return 1
    steady = rows[_WARM_UP:]
    speeds = percentiles([row["tokens"] / row["seconds"] for row in steady])
    row = {
        "steps": len(rows),
        "loss_first": round(rows[0]["loss"], 4),
        f"loss_mean_of_last_{_LAST}": round(loss, 4),
        **{f"tokens_per_s_{name}": round(value) for name, value in speeds.items()},
        "bubble": round(sum(row["bubble"] for row in steady) / len(steady), 4),
        "expert_balance": round(sum(row["balance"] for row in rows[-_LAST:]) / len(last), 4),
    }
    path = append(results_file("train"), " ".join(command), [row])
    print(f"recorded in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
