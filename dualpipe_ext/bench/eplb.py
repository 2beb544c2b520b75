"""How fast is the planner kernel, and how good are the plans? The four cases of DeepSeek-V3's EPLB.

Protocol: lognormal loads (sigma 1). Before anything is timed, the maps of all planners are
compared bit for bit: the kernel with and without reading back and as the timed graph replays it,
torch on the CPU, NumPy with all layers together, and loops; and what claims not to wait for the GPU
runs once with torch.cuda.set_sync_debug_mode("error"). Then rounds, in each of which every planner
is timed once, so that a drifting clock meets all alike; of the rounds the percentiles are reported.

- kernel: loads on the GPU to maps on the GPU, from a CUDA graph of ``_CALLS`` plans that is
  replayed between two events; per plan. What a training step would add to its own graph.
- eager: as many calls of ``rebalance_experts(..., sync=False)`` between two events; per call. The
  host may be slower than the GPU: then this is the host.
- checked: ``rebalance_experts`` and a wait for it, on the host's clock. It reads back one word per
  layer and node.
- torch, numpy, loops: on the CPU, from loads there to maps there, on the host's clock; torch with
  as many threads as it takes by itself.
- split_graph, split_torch: ``split_replicas`` over the reference's placement, from a graph on the
  GPU as the kernel's, and on the CPU as torch's.

Balance is mean over maximum GPU load, the mean of all layers; the bound is what no plan exceeds.
reference and balanced plan the case as it is (by node where nodes divide the groups), global plans
the same loads without nodes, reference_split splits loads unevenly over the reference's replicas.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dualpipe_ext.bench.eplb_baselines import plan_one_by_one, plan_with_numpy
from dualpipe_ext.eplb import (
    Placement,
    on_device,
    plan_placement,
    rebalance_experts,
    split_replicas,
    synthetic_loads,
)
from dualpipe_ext.eplb.balanced import Sizes

Row = dict[str, object]
_CALLS = 20
_WARM_UP = 3
_ROUNDS_OF_LOOPS = 3
EXPERTS, GROUPS = 256, 8
_TIMED = ("kernel", "eager", "checked", "torch", "numpy", "loops", "split_graph", "split_torch")


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
        balance: also make the balanced plans (seconds of CPU time in the largest case).
        seed: of the loads.

    Returns:
        What the case is; microseconds ``<planner>_us_p20``, ``_p50`` and ``_p80``, empty for those
        that need a GPU where there is none; ``numpy_over_kernel`` and ``loops_over_kernel``, how
        many times as long the others take; ``balance_reference``, ``_balanced``, ``_bound``,
        ``_global``, ``_global_bound`` and ``_reference_split``.

    Raises:
        AssertionError: two planners do not agree, or one waits for the GPU that must not.
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
    for name in _TIMED:
        times = seconds.get(name)
        for percent in (20, 50, 80):
            value = "" if times is None else round(1e6 * float(np.percentile(times, percent)), 2)
            row[f"{name}_us_p{percent}"] = value
    kernel = row["kernel_us_p50"]
    for name in ("numpy", "loops"):
        ratio = "" if kernel == "" else round(row[f"{name}_us_p50"] / kernel, 1)
        row[f"{name}_over_kernel"] = ratio
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
        with _no_wait():
            wide = rebalance_experts(on_gpu, *case.sizes, sync=False)
        width = want[1].shape[2]
        found["the kernel without sync"] = (wide[0], wide[1][..., :width], wide[2])
        if bool((wide[1][..., width:] != -1).any()):
            raise AssertionError("expected padding behind the last replica")
    _compare(found, want)


def _compare(found: Mapping[str, tuple[Tensor, ...]], want: tuple[Tensor, ...]) -> None:
    for name, maps in found.items():
        for mine, theirs in zip(maps, want, strict=True):
            if not torch.equal(mine.cpu(), theirs):
                raise AssertionError(
                    f"expected the maps of rebalance_experts, got others of {name}"
                )


@contextlib.contextmanager
def _no_wait() -> Iterator[None]:
    """Raise AssertionError where the body waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        raise AssertionError(f"expected no wait for the GPU, got: {error}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _kernel_is_usable(case: Case) -> bool:
    groups_and_nodes = (GROUPS, case.nodes) if case.by_node else (1, 1)
    sizes = Sizes(case.slots, *groups_and_nodes, case.gpus)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return on_device.usable(device, EXPERTS, sizes)


def _planners(case: Case, loads: Tensor) -> dict[str, Timed]:
    as_numpy = loads.numpy()
    maps = rebalance_experts(loads, *case.sizes)
    placement = Placement(*maps)
    planners: dict[str, Timed] = {
        "split_torch": lambda: _on_host(lambda: split_replicas(loads, placement, case.gpus)),
        "torch": lambda: _on_host(lambda: rebalance_experts(loads, *case.sizes)),
        "numpy": lambda: _on_host(lambda: plan_with_numpy(as_numpy, *case.sizes)),
        "loops": lambda: _on_host(lambda: plan_one_by_one(as_numpy, *case.sizes)),
    }
    if not _kernel_is_usable(case):
        return planners
    on_gpu = loads.cuda()

    gpu_placement = placement.to(on_gpu.device)

    def plans() -> tuple[Tensor, ...]:
        for _ in range(_CALLS):
            planned = rebalance_experts(on_gpu, *case.sizes, sync=False)
        return planned

    def splits() -> tuple[Tensor, ...]:
        for _ in range(_CALLS):
            weights = split_replicas(on_gpu, gpu_placement, case.gpus).weights
        return (weights,)

    def checked() -> None:
        rebalance_experts(on_gpu, *case.sizes)
        torch.cuda.synchronize()

    graph = _captured(plans)
    planned = graph.written
    width = placement.log2phy.shape[2]
    _compare({"the graph": (planned[0], planned[1][..., :width], planned[2])}, maps)
    split_graph = _captured(splits)
    want = split_replicas(loads, placement, case.gpus).weights
    torch.testing.assert_close(split_graph.written[0].cpu(), want, rtol=0, atol=1e-3)
    return {
        "kernel": lambda: _on_gpu(graph.replay) / _CALLS,
        "eager": lambda: _on_gpu(plans) / _CALLS,
        "checked": lambda: _on_host(checked),
        "split_graph": lambda: _on_gpu(split_graph.replay) / _CALLS,
        **planners,
    }


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    """Calls in a graph."""

    graph: torch.cuda.CUDAGraph
    written: tuple[Tensor, ...]
    """What the calls returned; every replay writes it again."""
    calls: Callable[[], object]
    """Kept for what they read: a graph knows only addresses."""

    def replay(self) -> None:
        self.graph.replay()


def _captured(calls: Callable[[], tuple[Tensor, ...]]) -> _Captured:
    """A graph of ``calls``, replayed once."""
    with _no_wait():
        calls()  # loads kernels, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = calls()
    for tensor in written:
        tensor.zero_()  # so that what is there afterwards is the replay's
    graph.replay()
    torch.cuda.synchronize()
    return _Captured(graph, written, calls)


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
    by_node = {"num_groups": GROUPS, "num_nodes": case.nodes}
    reference = plan_placement(loads, case.slots, case.gpus, policy="reference", **by_node)
    anywhere = plan_placement(loads, case.slots, case.gpus, policy="reference")
    found = {
        "reference": reference.after,
        "balanced": None,
        "bound": reference.bound,
        "global": None,
        "global_bound": anywhere.bound,
        "reference_split": split_replicas(loads, reference.placement, case.gpus).after,
    }
    if balanced:
        found["balanced"] = plan_placement(loads, case.slots, case.gpus, **by_node).after
        found["global"] = found["balanced"]
        if case.by_node:
            found["global"] = plan_placement(loads, case.slots, case.gpus).after
    return {
        f"balance_{name}": "" if values is None else round(float(values.mean()), 4)
        for name, values in found.items()
    }


def print_rows(rows: list[Row]) -> None:
    """Medians and balance for the terminal, in 80 columns."""
    planners = ("kernel", "eager", "checked", "torch", "numpy", "loops")
    balances = ("reference", "balanced", "bound", "global", "global_bound", "reference_split")
    times = Table("layers, slots / nodes / GPUs", title="A plan takes", box=None)
    balance = Table("layers, slots / nodes / GPUs", title="Mean / max GPU load", box=None)
    for table, columns in ((times, (*planners, "x NumPy")), (balance, balances)):
        table.title_justify = "left"
        for column in columns:
            table.add_column(column.replace("_", "\n"), justify="right", no_wrap=True)
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
