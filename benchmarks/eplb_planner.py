"""How fast is the planner kernel, and how good are the plans? Protocol: dualpipe_ext/bench/eplb.py.

    python benchmarks/eplb_planner.py [--rounds 20]

Appends a row for each case to benchmarks/results/eplb_planner.csv.
"""

from __future__ import annotations

import argparse
import sys

from common.record import append

from dualpipe_ext.bench.eplb import CASES, measure, print_rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    rows = [measure(case, rounds=options.rounds) for case in CASES]
    print_rows(rows)
    for row in rows:
        path = append(
            "eplb_planner", " ".join(["python benchmarks/eplb_planner.py", *arguments]), row
        )
    print(f"recorded in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
