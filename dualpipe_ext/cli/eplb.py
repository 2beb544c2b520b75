"""``dualpipe eplb``: plan where experts live, and see what it gains and what it costs.

What belongs here: the options, the table on the terminal, and handing the rest to
``dualpipe_ext.eplb``.
"""

from __future__ import annotations

import io
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dualpipe_ext.cli.arguments import given_or, takes
from dualpipe_ext.files import check_picture, check_target, replacing

if TYPE_CHECKING:
    from torch import Tensor

    from dualpipe_ext.eplb import Placement, PlacementPlan

_MAP_SUFFIXES = (".json", ".pt")
_POLICIES = ("reference", "balanced")  # as the planner names them; --help must not load torch
_INPUT, _MODEL, _COST, _OUTPUT = "Loads", "What to plan for", "Cost", "Output"


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """What the command line says."""

    loads: Annotated[
        Path | None,
        typer.Argument(
            help="Loads [layers x experts]: .json, .csv, .npy or .pt. [default: synthetic ones]",
            show_default=False,
        ),
    ] = None
    synthetic: Annotated[
        str,
        typer.Option(help="lognormal, zipf, uniform or drifting.", rich_help_panel=_INPUT),
    ] = "lognormal"
    spread: Annotated[
        float, typer.Option(help="Sigma, or the power of zipf.", rich_help_panel=_INPUT)
    ] = 1.0
    layers: Annotated[int, typer.Option(help="Synthetic layers.", rich_help_panel=_INPUT)] = 58
    experts: Annotated[int, typer.Option(help="Synthetic experts.", rich_help_panel=_INPUT)] = 256
    seed: Annotated[int, typer.Option(help="Of synthetic loads.", rich_help_panel=_INPUT)] = 0
    slots: Annotated[
        int | None,
        typer.Option(
            help="Slots over all GPUs. [default: an eighth more than experts, rounded up to fit]",
            rich_help_panel=_MODEL,
            show_default=False,
        ),
    ] = None
    gpus: Annotated[int, typer.Option(help="GPUs.", rich_help_panel=_MODEL)] = 32
    nodes: Annotated[int, typer.Option(help="Hosts.", rich_help_panel=_MODEL)] = 1
    groups: Annotated[
        int,
        typer.Option(
            help="Groups of experts; where hosts divide them, each stays whole on one.",
            rich_help_panel=_MODEL,
        ),
    ] = 1
    policy: Annotated[str, typer.Option(help="balanced or reference.", rich_help_panel=_MODEL)] = (
        "balanced"
    )
    current: Annotated[
        Path | None,
        typer.Option(
            help="Maps in force, as --out writes them. [default: experts in order]",
            rich_help_panel=_COST,
            show_default=False,
        ),
    ] = None
    tolerance: Annotated[
        float,
        typer.Option(help="Balancedness to give up to move less.", rich_help_panel=_COST),
    ] = 0.02
    expert_mib: Annotated[
        float,
        typer.Option(
            help="MiB that move with an expert: weights and optimizer state.", rich_help_panel=_COST
        ),
    ] = 84.0
    gb_per_s: Annotated[
        float, typer.Option(help="GB/s that a GPU receives.", rich_help_panel=_COST)
    ] = 300.0
    compare: Annotated[
        bool, typer.Option("--compare", help="Show all policies.", rich_help_panel=_OUTPUT)
    ] = False
    out: Annotated[
        Path | None,
        typer.Option(help="Write the maps into this .json or .pt.", rich_help_panel=_OUTPUT),
    ] = None
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Draw the load of every GPU before and after, as .svg, .png or .pdf.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None


@takes(Arguments)
def command(given: Arguments) -> None:
    """Plan where experts live: its balance before and after, against the bound, and its cost."""
    if given.picture is not None:
        check_target(given.picture)
        check_picture(given.picture)
    if given.out is not None:
        check_target(given.out)
        if given.out.suffix.lower() not in _MAP_SUFFIXES:
            raise ValueError(
                f"expected --out ending in {', '.join(_MAP_SUFFIXES)}, got {given.out}"
            )
    for name, value in (("--expert-mib", given.expert_mib), ("--gb-per-s", given.gb_per_s)):
        if not 0 < value < 1e12:
            raise ValueError(f"expected {name} to be positive, got {value}")
    if given.policy not in _POLICIES:
        raise ValueError(f"expected --policy of {', '.join(_POLICIES)}, got {given.policy!r}")
    before, now = _loads(
        given.loads, given.synthetic, given.layers, given.experts, given.seed, given.spread
    )
    request = _Request(
        num_slots=given_or(given.slots, _default_slots(now.shape[1], given.gpus, given.nodes)),
        num_gpus=given.gpus,
        num_groups=given.groups,
        num_nodes=given.nodes,
    )
    placement = _current(given.current, before, now, request)
    wanted = [request.variant(given.policy, given.tolerance)]
    chosen = wanted[0][0]
    if given.compare:
        wanted = [
            request.variant("reference", 0.0),
            *(request.variant("balanced", value) for value in sorted({given.tolerance, 0.0})),
        ]
    results = {name: request.plan(now, *how, placement) for name, how in wanted}
    plan = results[chosen][0]
    cost = _Cost(expert_bytes=round(given.expert_mib * 2**20), bytes_per_s=given.gb_per_s * 1e9)
    source = str(given_or(given.loads, f"{given.synthetic} loads, seed {given.seed}"))
    console = Console(soft_wrap=True, highlight=False)
    _print(console, source, now, request, results, cost)
    if given.out is not None:
        _write_maps(plan.placement, given.out)
        console.print(f"Wrote {given.out}")
    if given.picture is not None:
        _draw(given.picture, source, now, placement, plan, request)
        console.print(f"Wrote {given.picture}")


@dataclass(frozen=True, slots=True)
class _Request:
    """What to plan for."""

    num_slots: int
    num_gpus: int
    num_groups: int
    num_nodes: int

    @staticmethod
    def variant(policy: str, tolerance: float) -> tuple[str, tuple[str, float]]:
        """A name for the table, and the policy with its tolerance."""
        name = policy if policy == "reference" else f"{policy} {100 * tolerance:g}%"
        return name, (policy, tolerance)

    def plan(
        self, loads: Tensor, policy: str, tolerance: float, current: Placement | None
    ) -> tuple[PlacementPlan, float]:
        """The plan, and the seconds that it took."""
        from dualpipe_ext.eplb import plan_placement

        start = time.perf_counter()
        plan = plan_placement(
            loads,
            self.num_slots,
            self.num_gpus,
            num_groups=self.num_groups,
            num_nodes=self.num_nodes,
            policy=policy,
            current=current,
            tolerance=tolerance,
        )
        return plan, time.perf_counter() - start

    @property
    def hierarchical(self) -> bool:
        return self.num_nodes > 1 and self.num_groups % self.num_nodes == 0


@dataclass(frozen=True, slots=True)
class _Cost:
    """What moving an expert costs."""

    expert_bytes: int
    bytes_per_s: float


def _loads(
    path: Path | None, kind: str, layers: int, experts: int, seed: int, spread: float
) -> tuple[Tensor | None, Tensor]:
    """Loads that the placement in force was made for, if they are known, and loads to plan for."""
    from dualpipe_ext.eplb.loads import KINDS, drifting_loads, read_loads, synthetic_loads

    if kind not in (*KINDS, "drifting"):
        raise ValueError(f"expected --synthetic of {', '.join(KINDS)}, drifting, got {kind!r}")
    if path is not None:
        return None, read_loads(path)
    if kind != "drifting":
        return None, synthetic_loads(kind, layers, experts, seed=seed, spread=spread)
    drift = drifting_loads(layers, experts, seed=seed, spread=spread)
    return next(drift), next(drift)


def _default_slots(experts: int, gpus: int, nodes: int) -> int:
    step = max(gpus, 1)
    return -(-(experts + experts // 8) // step) * step


def _current(
    path: Path | None, before: Tensor | None, now: Tensor, request: _Request
) -> Placement | None:
    """The placement in force: from a file, planned for earlier loads, or the experts in order."""
    from dualpipe_ext.eplb import Placement

    if path is not None:
        return _read_maps(path, now.shape[1])
    if before is not None:
        return request.plan(before, "balanced", 0.0, None)[0].placement
    if request.num_slots < now.shape[1]:
        return None  # the planner says what is wrong
    return Placement.identity(*now.shape, request.num_slots)


def _read_maps(path: Path, num_experts: int) -> Placement:
    import torch

    from dualpipe_ext.eplb import Placement

    suffix = path.suffix.lower()
    if suffix not in _MAP_SUFFIXES:
        raise ValueError(f"expected --current ending in {', '.join(_MAP_SUFFIXES)}, got {path}")
    try:
        maps: Any
        if suffix == ".json":
            maps = json.loads(path.read_text(encoding="utf-8"))
        else:
            maps = torch.load(path, map_location="cpu", weights_only=True)
        return Placement.from_phy2log(torch.as_tensor(maps["phy2log"]), num_experts)
    except OSError:
        raise
    except Exception as error:  # whatever a file that is none can cause
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"expected maps as --out writes them in {path}, got: {reason}") from None


def _write_maps(placement: Placement, path: Path) -> None:
    import torch

    maps = {name: getattr(placement, name) for name in ("phy2log", "log2phy", "logcnt")}
    with replacing(path) as file:
        if path.suffix.lower() == ".pt":
            torch.save(maps, file)
        else:
            with io.TextIOWrapper(file, encoding="utf-8") as text:
                json.dump({name: tensor.tolist() for name, tensor in maps.items()}, text)
                text.write("\n")


def _print(
    console: Console,
    source: str,
    loads: Tensor,
    request: _Request,
    results: dict[str, tuple[PlacementPlan, float]],
    cost: _Cost,
) -> None:
    where = f"{request.num_gpus} GPUs"
    if request.num_nodes > 1:
        where += f" on {request.num_nodes} hosts"
    kind = f"{request.num_groups} groups kept whole" if request.hierarchical else "global"
    table = Table(
        title=f"{loads.shape[0]} layers x {loads.shape[1]} experts in {request.num_slots} slots, "
        f"{where}, {kind}",
        title_justify="left",
    )
    table.add_column("policy")
    for heading in ("balance", "bound", "gap", "moves", "GiB in", "ms in", "plan ms"):
        table.add_column(heading, justify="right")
    first = next(iter(results.values()))[0]
    if first.before is not None:
        table.add_row("in force", f"{float(first.before.mean()):.4f}", *["-"] * 6, style="dim")
    best = max(float(plan.after.mean()) for plan, _ in results.values())
    for name, (plan, seconds) in results.items():
        most = int(plan.bytes_received(cost.expert_bytes).max())
        balance = float(plan.after.mean())
        table.add_row(
            name,
            f"{balance:.4f}",
            f"{float(plan.bound.mean()):.4f}",
            f"{float(plan.gap.mean()):.2%}",
            str(plan.moves),
            f"{most / 2**30:.2f}",
            f"{most / cost.bytes_per_s * 1e3:.1f}",
            f"{seconds * 1e3:.1f}",
            style="bold" if len(results) > 1 and balance == best else None,
        )
    console.print(table)
    console.print(f"Loads: {source}.")
    if any(plan.policy == "balanced" for plan, _ in results.values()):
        console.print(
            "Balanced n%: up to n% of a new plan's balance are given up to move less (--tolerance)."
        )
    console.print(
        "Balance: mean over maximum load of a GPU, mean of all layers. Bound: no plan has more; "
        "gap: what is missing to it."
    )
    console.print(
        "Moves: experts' weights that change GPU, in all layers. GiB in, ms in: the most that one "
        "GPU receives, and how long that takes."
    )


def _draw(
    path: Path,
    source: str,
    loads: Tensor,
    current: Placement | None,
    plan: PlacementPlan,
    request: _Request,
) -> None:
    from dualpipe_ext.eplb import gpu_loads
    from dualpipe_ext.eplb.heatmap import draw_heatmap  # here, because matplotlib is slow to load

    panels = [(f"After: {plan.policy}", gpu_loads(loads, plan.placement, request.num_gpus))]
    if current is not None:
        panels.insert(0, ("Before", gpu_loads(loads, current, request.num_gpus)))
    title = f"Load per GPU, {loads.shape[1]} experts in {request.num_slots} slots ({source})"
    draw_heatmap(panels, path, title=title, num_nodes=request.num_nodes)
