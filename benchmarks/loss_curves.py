"""Does a run on many ranks learn what one process learns from the same batches?

    python benchmarks/loss_curves.py [--many FOLDER] [arguments of `dualpipe train`]

Trains twice: with the arguments, on all ranks; then in one process (on the first GPU, if there are
some), with the first run's batch, micro-batches and slots for replicas, and the same seed, so both
see the same tokens in every step. (One GPU has to hold micro-batches of all ranks: on GPUs give a
``--batch``, such as 128.) ``--many`` names the folder of a first run that is there already, perhaps
from a machine with more GPUs: its ``metrics.csv``, and ``layout.json`` of a checkpoint.
Expert parallelism, the schedule and the experts that move should change nothing but rounding; in
BF16 that decides close choices of experts otherwise, from which on the curves differ as those of
two seeds would.

Appends a row to benchmarks/results/loss_curves.csv, and leaves a picture of both and the runs'
folders in build/benchmarks/loss-curves. Exit code 1:
the means of the last tenth of the steps are more than 5% apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

from dualpipe_ext.bench.record import append, results_file
from dualpipe_ext.training.progress import read_metrics

_FOLDER = Path("build/benchmarks/loss-curves")
_SAME = 0.05
# Steps that a point of the drawn curves is the mean of.
_SMOOTH = 10


def main(command: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--many", type=Path, help="folder of a run on many ranks, instead of one")
    options, arguments = parser.parse_known_args(command)
    many, one = options.many or _FOLDER / "many", _FOLDER / "one"
    status = 0
    if options.many is None:
        shutil.rmtree(_FOLDER, ignore_errors=True)
        _FOLDER.mkdir(parents=True)
        status = _train([*arguments, "--out", str(many)])
    else:
        shutil.rmtree(one, ignore_errors=True)
    if status:
        return status
    layouts = sorted(many.glob("**/layout.json"))
    if not layouts or not (many / "metrics.csv").exists():
        print(f"expected metrics.csv and a layout.json in {many}, got none", file=sys.stderr)
        return 2
    layout = json.loads(layouts[-1].read_text())
    alone = ["--pp", "1", "--ep", "1", "--chunks", str(layout["num_chunks"])]
    alone += ["--batch", str(layout["batch"]), "--rebalance-every", "0"]
    alone += ["--redundant-experts", str(layout["redundant_experts"]), "--out", str(one)]
    status = _train([*_without_ranks(arguments), *alone], CUDA_VISIBLE_DEVICES=_first_gpu())
    if status:
        return status
    losses = [[row["loss"] for row in read_metrics(f / "metrics.csv")] for f in (many, one)]
    tail = max(1, len(losses[0]) // 10)
    ends = [fmean(loss[-tail:]) for loss in losses]
    name = f"{layout['pp']} pipeline x {layout['ep']} expert-parallel ranks"
    picture = _FOLDER / "loss-curves.png"
    _draw(dict(zip((name, "one process"), losses, strict=True)), picture)
    row = {
        "pp": layout["pp"],
        "ep": layout["ep"],
        "dtype": layout["dtype"],
        "steps": len(losses[0]),
        "first_loss": round(losses[0][0], 6),
        "first_loss_alone": round(losses[1][0], 6),
        "largest_difference_of_first_10": f"{_apart(losses, 10):.2e}",
        "last_tenth_mean": round(ends[0], 4),
        "last_tenth_mean_alone": round(ends[1], 4),
    }
    typed = " ".join(["python benchmarks/loss_curves.py", *command])
    print(f"recorded in {append(results_file('loss_curves'), typed, [row])}; {picture}")
    if abs(ends[0] / ends[1] - 1) <= _SAME:
        return 0
    print(f"expected ends within {_SAME:.0%} of each other, got {ends[0]:.4f} and {ends[1]:.4f}")
    return 1


def _train(arguments: list[str], **variables: str) -> int:
    program = [sys.executable, "-m", "dualpipe_ext", "train", *arguments]
    return subprocess.run(program, check=False, env=os.environ | variables).returncode


def _first_gpu() -> str:
    """As CUDA_VISIBLE_DEVICES names it: `dualpipe train` takes all GPUs that it sees."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


def _without_ranks(arguments: list[str]) -> list[str]:
    """Without the options that say how ranks share the work; each has a value behind it."""
    kept, given = [], iter(arguments)
    for argument in given:
        name, equals, _ = argument.partition("=")
        if name not in ("--pp", "--ep", "--schedule", "--stage-transport", "--rebalance-every"):
            kept.append(argument)
        elif not equals:
            next(given, None)
    return kept


def _apart(losses: list[list[float]], steps: int) -> float:
    pairs = list(zip(*losses, strict=True))[:steps]
    return max(abs(a - b) for a, b in pairs)


def _draw(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for (name, loss), color in zip(curves.items(), ("#1f4e9c", "#d9822b"), strict=True):
        axis.plot(range(1, len(loss) + 1), loss, color=color, alpha=0.25)
        means = [fmean(loss[max(0, i - _SMOOTH) : i]) for i in range(1, len(loss) + 1)]
        axis.plot(range(1, len(loss) + 1), means, color=color, label=name)
    axis.set(xlabel="step", ylabel=f"cross-entropy (nats per byte), and mean of {_SMOOTH}")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
