"""How fast is the planner kernel, and how good are the plans? The four cases of DeepSeek-V3's EPLB.

Protocol: lognormal loads (sigma 1). Before anything is timed, the maps of all planners are
compared bit for bit: the kernel with and without reading back, torch on the CPU, NumPy with all
layers together, and loops. Then rounds, in each of which every planner is timed once, so that a
drifting clock meets all alike; of the rounds the percentiles are reported.

- kernel: loads on the GPU to maps on the GPU, from a CUDA graph of ``_CALLS`` plans that is
  replayed between two events; per plan. What a training step would add to its own graph.
- eager: as many calls of ``rebalance_experts(..., sync=False)`` between two events; per call. The
  host may be slower than the GPU: then this is the host.
- checked: ``rebalance_experts`` and a wait for it, on the host's clock. It reads back one word per
  layer and node.
- torch, numpy, loops: on the CPU, from loads there to maps there, on the host's clock; torch with
  as many threads as it takes by itself.

Balance is mean over maximum GPU load, the mean of all layers; the bound is what no plan exceeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dualpipe_ext.bench.eplb_baselines import plan_one_by_one, plan_with_numpy
from dualpipe_ext.eplb import on_device, plan_placement, rebalance_experts, synthetic_loads
from dualpipe_ext.eplb.balanced import Sizes

Row = dict[str, object]
_CALLS = 20
_WARM_UP = 3
_ROUNDS_OF_LOOPS = 3
EXPERTS, GROUPS = 256, 8


@dataclass(frozen=True, slots=True)
class Case:
    """Layers of 256 experts in 8 groups; hierarchical where nodes divide the groups."""

    layers: int
    slots: int
    nodes: int
    gpus: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """As ``rebalance_experts`` takes them."""
        return self.slots, GROUPS, self.nodes, self.gpus

    @property
    def by_node(self) -> bool:
        return GROUPS % self.nodes == 0


CASES = (
    Case(58, 288, 4, 32),
    Case(58, 288, 18, 144),
    Case(58, 576, 36, 288),
    Case(61, 320, 40, 320),
)

# A planner that has run once, ready to be timed: seconds per plan of one round.
Timed = Callable[[], float]


def measure(case: Case, *, rounds: int = 20, balance: bool = True, seed: int = 0) -> Row:
    """Check, time and judge the planners of one case.

    Args:
        rounds: measurements of each planner; of loops three at most.
        balance: also make the balanced plan (seconds of CPU time in the largest case).
        seed: of the loads.

    Returns:
        What the case is; microseconds ``<planner>_us_p20``, ``_p50`` and ``_p80``, empty for those
        that need a GPU where there is none; ``numpy_over_kernel``, how many times as long NumPy
        takes; ``balance_reference``, ``balance_balanced`` and ``balance_bound``.

    Raises:
        AssertionError: two planners do not agree.
    """
    loads = synthetic_loads("lognormal", case.layers, EXPERTS, seed=seed)
    check(case, loads)
    seconds = _time(_planners(case, loads), rounds)
    row: Row = {
        "layers": case.layers,
        "experts": EXPERTS,
        "slots": case.slots,
        "nodes": case.nodes,
        "gpus": case.gpus,
        "policy": "hierarchical" if case.by_node else "global",
        "rounds": rounds,
    }
    for name in ("kernel", "eager", "checked", "torch", "numpy", "loops"):
        times = seconds.get(name)
        for percent in (20, 50, 80):
            value = "" if times is None else round(1e6 * float(np.percentile(times, percent)), 2)
            row[f"{name}_us_p{percent}"] = value
    kernel = row["kernel_us_p50"]
    row["numpy_over_kernel"] = "" if kernel == "" else round(row["numpy_us_p50"] / kernel, 1)
    return row | _balance(case, loads, balance)


def check(case: Case, loads: Tensor) -> None:
    """Raise AssertionError unless all planners give the same maps for ``loads`` [L, E]."""
    want = rebalance_experts(loads, *case.sizes)
    found = {
        planner.__name__: tuple(map(torch.from_numpy, planner(loads.numpy(), *case.sizes)))
        for planner in (plan_with_numpy, plan_one_by_one)
    }
    if _kernel_is_usable(case):
        on_gpu = loads.cuda()
        found["the kernel"] = rebalance_experts(on_gpu, *case.sizes)
        wide = rebalance_experts(on_gpu, *case.sizes, sync=False)
        width = want[1].shape[2]
        found["the kernel without sync"] = (wide[0], wide[1][..., :width], wide[2])
        if bool((wide[1][..., width:] != -1).any()):
            raise AssertionError("expected padding behind the last replica")
    for name, maps in found.items():
        for mine, theirs in zip(maps, want, strict=True):
            if not torch.equal(mine.cpu(), theirs):
                raise AssertionError(
                    f"expected the maps of rebalance_experts, got others of {name}"
                )


def _kernel_is_usable(case: Case) -> bool:
    groups_and_nodes = (GROUPS, case.nodes) if case.by_node else (1, 1)
    sizes = Sizes(case.slots, *groups_and_nodes, case.gpus)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return on_device.usable(device, EXPERTS, sizes)


def _planners(case: Case, loads: Tensor) -> dict[str, Timed]:
    as_numpy = loads.numpy()
    planners: dict[str, Timed] = {
        "torch": lambda: _on_host(lambda: rebalance_experts(loads, *case.sizes)),
        "numpy": lambda: _on_host(lambda: plan_with_numpy(as_numpy, *case.sizes)),
        "loops": lambda: _on_host(lambda: plan_one_by_one(as_numpy, *case.sizes)),
    }
    if not _kernel_is_usable(case):
        return planners
    on_gpu = loads.cuda()

    def plans() -> None:
        for _ in range(_CALLS):
            rebalance_experts(on_gpu, *case.sizes, sync=False)

    def checked() -> None:
        rebalance_experts(on_gpu, *case.sizes)
        torch.cuda.synchronize()

    plans()  # loads the kernel, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plans()
    return {
        "kernel": lambda: _on_gpu(graph.replay) / _CALLS,
        "eager": lambda: _on_gpu(plans) / _CALLS,
        "checked": lambda: _on_host(checked),
        **planners,
    }


def _time(planners: Mapping[str, Timed], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in planners}
    for name, timed in planners.items():
        # Loops take up to a second and nothing is compared with them closely.
        for _ in range(0 if name == "loops" else _WARM_UP):
            timed()
    for i in range(rounds):
        for name, timed in planners.items():
            if name != "loops" or i < _ROUNDS_OF_LOOPS:
                found[name].append(timed())
    return found


def _on_host(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _on_gpu(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def _balance(case: Case, loads: Tensor, balanced: bool) -> Row:
    row: Row = {}
    for policy in ("reference", "balanced"):
        if policy == "balanced" and not balanced:
            row["balance_balanced"] = ""
            continue
        plan = plan_placement(
            loads, case.slots, case.gpus, num_groups=GROUPS, num_nodes=case.nodes, policy=policy
        )
        row[f"balance_{policy}"] = round(float(plan.after.mean()), 4)
        row["balance_bound"] = round(float(plan.bound.mean()), 4)
    return {name: row[name] for name in ("balance_reference", "balance_balanced", "balance_bound")}


def print_rows(rows: list[Row]) -> None:
    """Medians and balance for the terminal, in 80 columns."""
    planners = ("kernel", "eager", "checked", "torch", "numpy", "loops")
    balances = ("reference", "balanced", "bound")
    times = Table("layers, slots / nodes / GPUs", title="A plan takes", box=None)
    balance = Table("layers, slots / nodes / GPUs", title="Mean / max GPU load", box=None)
    for table, columns in ((times, (*planners, "x NumPy")), (balance, balances)):
        table.title_justify = "left"
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        nodes = row["nodes"] if row["policy"] == "hierarchical" else "-"
        name = f"{row['layers']}, {row['slots']} / {nodes} / {row['gpus']}"
        medians = [_duration(row[f"{planner}_us_p50"]) for planner in planners]
        times.add_row(name, *medians, str(row["numpy_over_kernel"] or "-"))
        balance.add_row(name, *(str(row[f"balance_{of}"] or "-") for of in balances))
    console = Console()
    console.print(times)
    console.print(balance)


def _duration(us: object) -> str:
    if us == "":
        return "-"
    return f"{us:.1f}us" if us < 1000 else f"{us / 1000:.1f}ms"
