"""What does a dispatch or combine cost the host?

Everything that a call over NVLink does on the CPU runs, but for the CUDA runtime and the driver:
tensors are CPU tensors, and a launch ends where it would be given to the runtime
(``tests/ep/host_core.py``). So the figures leave out the launch itself, about 3 us a kernel, and
what allocations of GPU memory take longer; a server's cores may need twice as long. They tell
versions apart. Before a call is timed, it is checked that it launches one kernel (with the routing
two) that is given the call's own memory. Protocol: rounds in which every kind is measured once, 100
calls in a row, garbage collection off, results dropped at once as a loop would. Time is that of the
thread on its core: the wall clock would count other processes too.

Shapes do not matter (8 tokens x 1024, 16 experts, top-8, routing weights included). "handle": a
cached handle. "bounded": the routing is found in the call, with max_recv_tokens; "exact": without,
the wait for the GPU left out.

    python benchmarks/ep_host.py [--rounds 25]

Needs a C++ compiler, the headers of CUDA and pybind11. Appends rows to
benchmarks/results/ep_host.csv.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dualpipe_ext.bench.record import append, percentiles, results_file
from dualpipe_ext.bench.timing import no_garbage_collection
from dualpipe_ext.ep import Buffer, quantize
from tests.ep import host_core

TOKENS, HIDDEN, EXPERTS, TOP_K, RANKS = 8, 1024, 16, 8, 2
CALLS = 100


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of call; returns the tensor that its last kernel writes."""

    case: str
    routing: str
    call: Callable[[], torch.Tensor]
    grad: bool = False

    def __call__(self) -> torch.Tensor:
        with torch.set_grad_enabled(self.grad):
            return self.call()


def make_kinds() -> list[Kind]:
    """Every kind of call, on one buffer."""
    buffer = Buffer(
        hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=TOKENS, transport="nvlink"
    )
    x = torch.randn(TOKENS, HIDDEN).bfloat16()
    idx = torch.rand(TOKENS, EXPERTS).topk(TOP_K).indices
    weights = torch.rand(TOKENS, TOP_K)
    kinds = []

    def add(case: str, routing: str, grad: bool = False, x: Any = x, **how: Any) -> None:
        def call() -> torch.Tensor:
            return buffer.dispatch(x, topk_weights=weights, **how)[0].tokens

        kinds.append(Kind(case, routing, call, grad))

    for name in ("buffer", "token", "expert"):
        layout = {"layout": "expert"} if name == "expert" else {"zero_copy": name == "buffer"}
        bound = {"max_recv_tokens": RANKS * TOKENS * TOP_K if name == "expert" else RANKS * TOKENS}
        with torch.no_grad():
            _, handle = buffer.dispatch(x, idx, weights, **bound, **layout)
        for dtype, fp8 in (("bf16", False), ("fp8", True)):
            case = f"dispatch-{dtype}-{name}"
            add(case, "handle", fp8=fp8, handle=handle)
            add(case, "bounded", fp8=fp8, topk_idx=idx, **bound, **layout)
            add(case, "exact", fp8=fp8, topk_idx=idx, **layout)
        if name == "token":
            add("dispatch-quantised-token", "handle", x=tuple(quantize(x)), fp8=True, handle=handle)
            for dtype, fp8 in (("bf16", False), ("fp8", True)):
                case = f"dispatch-{dtype}-token"
                learns = x.clone().requires_grad_()
                add(case, "handle", grad=True, x=learns, fp8=fp8, handle=handle)
        if name != "buffer":
            rows = torch.randn(handle.num_rows, HIDDEN).bfloat16()
            for grad in (False, True):
                given = rows.clone().requires_grad_(grad)
                kinds.append(
                    Kind(
                        f"combine-{name}",
                        "handle",
                        lambda rows=given, handle=handle: buffer.combine(rows, handle)[0],
                        grad,
                    )
                )
    return kinds


def expect_right(kind: Kind, launches: ModuleType) -> None:
    """Raise unless the call launches what it should, on its own memory."""
    launches.take_launches()
    out = kind()
    told = launches.take_launches()
    operation = kind.case.partition("-")[0]
    wanted = [operation] if kind.routing == "handle" else ["route", operation]
    address = told[-1]["y" if operation == "combine" else "out_rows"]
    if [one["kernel"] for one in told] != wanted or address != out.data_ptr():
        raise RuntimeError(f"expected {wanted} into {out.data_ptr()}, got {told}")


def measure(rounds: int) -> list[dict[str, object]]:
    """A row for every kind."""
    with host_core.host_core() as launches, host_core.as_rank(0, RANKS):
        kinds = make_kinds()
        launches.keep_launches(True)
        for kind in kinds:
            expect_right(kind, launches)
        launches.keep_launches(False)
        found: list[list[float]] = [[] for _ in kinds]
        with no_garbage_collection():
            for _ in range(rounds):
                for kind, times in zip(kinds, found, strict=True):
                    times.append(microseconds(kind))
    rows = []
    for kind, times in zip(kinds, found, strict=True):
        us = {f"us_{name}": round(value, 2) for name, value in percentiles(times).items()}
        about = {"case": kind.case, "routing": kind.routing, "grad": kind.grad}
        rows.append({**about, "rounds": rounds, "calls": CALLS, **us})
    return rows


def microseconds(kind: Kind) -> float:
    """Per call."""
    call = kind.call
    with torch.set_grad_enabled(kind.grad):
        begin = time.thread_time()
        for _ in range(CALLS):
            call()
        return 1e6 * (time.thread_time() - begin) / CALLS


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args(arguments)
    if reason := host_core.why_unavailable():
        print(f"nothing to measure: {reason}", file=sys.stderr)
        return 0
    torch.set_num_threads(1)
    rows = measure(options.rounds)
    for row in rows:
        grad = "grad" if row["grad"] else ""
        print(f"{row['case']:26} {row['routing']:8} {grad:5} {row['us_p50']:8.1f} us")
    command = " ".join(["python benchmarks/ep_host.py", *arguments])
    print(f"recorded in {append(results_file('ep_host'), command, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
