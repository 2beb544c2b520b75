"""Other programs' formats: torch loads and executes the CSV, and the trace is what was simulated.

P ranks, m chunks of one row each, H features; one linear layer with tanh per virtual stage.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime

from dualpipe_ext.launch import run_ranks
from dualpipe_ext.pipeline.export import read_csv, write_csv, write_trace
from dualpipe_ext.pipeline.plan import KINDS, Plan, build_plan
from dualpipe_ext.pipeline.simulate import Durations, simulate

ONE_PIPE = [kind for kind in KINDS if kind != "dualpipe"]
CHUNKS, FEATURES = 6, 4


def torch_runtime(plan: Plan, path: Path) -> _PipelineScheduleRuntime:
    """torch's runtime with the plan loaded from ``path``, without a process group."""
    stages = [
        SimpleNamespace(
            stage_index=stage,
            num_stages=plan.num_stages,
            group_size=plan.num_ranks,
            group_rank=0,
            is_last=False,
        )
        for stage in plan.stages_of(0)
    ]
    runtime = _PipelineScheduleRuntime(stages, plan.num_chunks)
    runtime._load_csv(str(path))
    return runtime


@pytest.mark.parametrize("kind", ONE_PIPE)
@pytest.mark.parametrize(("num_ranks", "num_chunks"), [(1, 3), (2, 4), (3, 7), (4, 10)])
def test_torch_loads_the_csv(kind: str, num_ranks: int, num_chunks: int, tmp_path: Path) -> None:
    plan = build_plan(kind, num_ranks=num_ranks, num_chunks=num_chunks)
    path = tmp_path / "plan.csv"
    write_csv(plan, path)
    runtime = torch_runtime(plan, path)
    for rank in range(num_ranks):
        loaded = [str(action) for action in runtime.pipeline_order[rank]]
        assert loaded == [str(step) for step in plan.actions[rank]]
    assert tuple(runtime.stage_index_to_group_rank[s] for s in range(plan.num_stages)) == (
        plan.stage_rank
    )
    # Adding sends and receives is torch's check that nothing deadlocks.
    assert sorted(runtime.pipeline_order_with_comms) == list(range(num_ranks))


def test_torch_parses_but_refuses_two_pipes(tmp_path: Path) -> None:
    plan = build_plan("dualpipe", num_ranks=4, num_chunks=8)
    path = tmp_path / "plan.csv"
    write_csv(plan, path)
    rows = [line.split(",") for line in path.read_text().splitlines()]
    parsed = [[str(_Action.from_str(cell)) for cell in row] for row in rows]
    assert parsed == [[str(step) for step in steps] for steps in plan.actions]
    with pytest.raises(AssertionError):
        torch_runtime(plan, path)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_back(kind: str, tmp_path: Path) -> None:
    plan = build_plan(kind, num_ranks=4, num_chunks=10)
    path = tmp_path / "plan.csv"
    write_csv(plan, path)
    assert read_csv(path, kind=kind, num_pipes=len(plan.pipes)) == plan


def test_reading_torchs_idle_cells(tmp_path: Path) -> None:
    path = tmp_path / "plan.csv"
    path.write_text("0F0,,,0B0\n,1F0,1B0,\n")
    plan = read_csv(path)
    assert plan.kind == "csv"
    assert plan.stage_rank == (0, 1)
    assert [" ".join(map(str, steps)) for steps in plan.actions] == ["0F0 0B0", "1F0 1B0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0SEND_F0\n", "expected a compute action such as 3F7 .* got '0SEND_F0' in row 1"),
        ("0F0,0B0\n1F0,x\n", "got 'x' in row 2"),
        ("(0F0;1F0)OVERLAP_F_B\n", "expected a compute action"),
        ("", "got no action"),
        ("0F0,0B0\n2F0,2B0\n", "expected actions for every stage .* got none for stage 1"),
        ("0F0\n1F0,1B0\n", "expected F then B, or F then I then W, for stage 0 chunk 0, got F"),
        ("0B0,0F0\n", "got B"),
    ],
)
def test_files_that_hold_no_plan(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_csv(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="expected a CSV of pipeline actions, got a binary file"):
        read_csv(path)
    write_csv(build_plan("1f1b", num_ranks=3, num_chunks=3), path)
    with pytest.raises(ValueError, match="expected num_pipes to divide 3 stages, got 2"):
        read_csv(path, num_pipes=2)


def test_trace_is_the_simulation(tmp_path: Path) -> None:
    plans = [build_plan(kind, num_ranks=2, num_chunks=4) for kind in ("dualpipe", "1f1b")]
    results = [simulate(plan, Durations(F=1, B=2, comm=0.25)) for plan in plans]
    path = tmp_path / "trace.json"
    write_trace(results, path, unit_us=10)
    events = json.loads(path.read_text())["traceEvents"]
    names = {(e["pid"], e["tid"], e["name"]): e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names[0, 0, "process_name"] == "dualpipe, 2 ranks, 4 chunks"
    assert names[1, 1, "process_name"] == "1f1b, 2 ranks, 4 chunks"
    assert names[1, 1, "thread_name"] == "rank 1"
    for process, result in enumerate(results):
        for rank in range(2):
            mine = [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == (process, rank)]
            spans = [(e["ts"], e["ts"] + e["dur"]) for e in mine]
            assert spans == [(10 * start, 10 * end) for _, start, end in result.timeline(rank)]
    pair = next(e for e in events if "&" in e["name"])
    assert pair["name"] == "F1&B0"
    assert pair["cat"] == "forward and backward"
    assert pair["args"] == {"F": "stage 3", "B": "stage 0"}


def test_trace_of_one_simulation(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace(simulate(build_plan("1f1b", num_ranks=1, num_chunks=1)), path)
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
    assert [(e["name"], e["ts"], e["dur"]) for e in events] == [("F0", 0, 1000), ("B0", 1000, 2000)]


def make_layers(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(FEATURES, FEATURES, dtype=torch.float64), nn.Tanh())
        for _ in range(count)
    ]


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(CHUNKS, FEATURES, generator=generator, dtype=torch.float64) for _ in range(2)
    )


def train_with_torch(files: dict[str, str]) -> dict[str, dict[int, list[torch.Tensor]]]:
    """On one rank: per plan, the gradients of its stages after one step of torch's runtime."""
    rank = torch.distributed.get_rank()
    gradients: dict[str, dict[int, list[torch.Tensor]]] = {}
    for kind, path in files.items():
        plan = build_plan(kind, num_ranks=2, num_chunks=CHUNKS)
        layers = make_layers(plan.num_stages)
        mine = plan.stages_of(rank)
        stages = [
            PipelineStage(layers[stage], stage, plan.num_stages, torch.device("cpu"))
            for stage in mine
        ]
        runtime = _PipelineScheduleRuntime(stages, CHUNKS, loss_fn=nn.functional.mse_loss)
        runtime._load_csv(path)
        inputs, targets = make_batch()
        runtime.step(*([inputs] if rank == 0 else []), target=targets, losses=[])
        gradients[kind] = {s: [p.grad for p in layers[s].parameters()] for s in mine}
    return gradients


def test_torch_executes_the_csv(tmp_path: Path) -> None:
    files = {}
    for kind in ONE_PIPE:
        files[kind] = str(tmp_path / f"{kind}.csv")
        write_csv(build_plan(kind, num_ranks=2, num_chunks=CHUNKS), files[kind])
    ranks = run_ranks(train_with_torch, 2, files, run_timeout_s=60)
    for kind in ONE_PIPE:
        plan = build_plan(kind, num_ranks=2, num_chunks=CHUNKS)
        layers = make_layers(plan.num_stages)
        inputs, targets = make_batch()
        nn.functional.mse_loss(nn.Sequential(*layers)(inputs), targets).backward()
        found = ranks[0][kind] | ranks[1][kind]
        assert sorted(found) == list(range(plan.num_stages))
        for stage, layer in enumerate(layers):
            for mine, parameter in zip(found[stage], layer.parameters(), strict=True):
                torch.testing.assert_close(mine, parameter.grad, rtol=1e-12, atol=1e-14)


def test_replaced_actions_survive(tmp_path: Path) -> None:
    """A plan with plain tuples is written like one from build_plan."""
    plan = build_plan("zbv", num_ranks=2, num_chunks=4)
    write_csv(plan, tmp_path / "a.csv")
    write_csv(dataclasses.replace(plan, actions=tuple(plan.actions)), tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
