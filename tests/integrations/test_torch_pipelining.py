"""Torch's schedules and ours, with the same stages, data and calls.

The checks run here over gloo, in tests/multi_gpu/test_torch_pipelining.py between GPUs.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.pipelining as torchs
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from dualpipe_ext.integrations import torch_pipelining as ours
from dualpipe_ext.launch import run_ranks
from dualpipe_ext.pipeline import Phase
from dualpipe_ext.pipeline.weight_grad import DeferrableLinear
from tests.integrations.ranks import device

HIDDEN, BATCH, CHUNKS, RANKS = 8, 24, 8, 2
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


class Phased(nn.Module):
    """A stage whose pairs are overlapped, phase by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(HIDDEN, 12), nn.Linear(12, HIDDEN)

    def phases(self) -> list[Phase]:
        return [
            Phase("wide", "compute", lambda x: (torch.tanh(self.wide(x)),)),
            Phase("moved", "comm", lambda x: (x.clone(),)),
            Phase("back", "compute", lambda x: (self.back(x),)),
        ]

    def forward(self, x: Tensor) -> Tensor:
        state: tuple[Any, ...] = (x,)
        for phase in self.phases():
            state = phase.fn(*state)
        return state[0]


def module(index: int) -> nn.Module:
    torch.manual_seed(index)
    if index % 2:
        return Phased().to(device(), torch.float64)
    layers = nn.Linear(HIDDEN, 12), nn.Tanh(), nn.Linear(12, HIDDEN)
    return nn.Sequential(*layers).to(device(), torch.float64)


def weighted_loss(output: Tensor, target: Tensor, weight: float = 1.0) -> Tensor:
    return weight * F.mse_loss(output, target)


def make(source: Any, name: str, **options: Any) -> tuple[Any, list[nn.Module]]:
    """That schedule of torch's or of ours, with its modules."""
    rank, single = dist.get_rank(), name == "Schedule1F1B"
    indices = [rank] if single else [rank, 2 * RANKS - 1 - rank]
    total = RANKS * len(indices)
    modules = [module(index) for index in indices]
    stages = [PipelineStage(m, i, total, device()) for m, i in zip(modules, indices, strict=True)]
    options = {"loss_fn": weighted_loss} | options
    return getattr(source, name)(stages[0] if single else stages, CHUNKS, **options), modules


def batch(seed: int) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(BATCH, HIDDEN, dtype=torch.float64, generator=gen) for _ in range(2))
    return x.to(device()), y.to(device())


def ends(name: str) -> int:
    return RANKS - 1 if name == "Schedule1F1B" else 0


def call(run: Any, name: str, seed: int, **how: Any) -> tuple[Any, list[Tensor]]:
    """As scripts for torch do: inputs on the first rank, targets on the last stage's."""
    x, y = batch(seed)
    losses: list[Tensor] = []
    target = {"target": y, "losses": losses} if dist.get_rank() == ends(name) else {}
    outputs = run(*((x,) if dist.get_rank() == 0 else ()), **target, **how)
    return outputs, losses


def same_as_torch(name: str) -> None:
    for options in ({}, {"scale_grads": False}):
        theirs, their_modules = make(torchs, name, **options)
        mine, my_modules = make(ours, name, **options)
        deferring = [m for module in my_modules for m in module.modules() if is_linear(m)]
        assert {isinstance(m, DeferrableLinear) for m in deferring} == {name != "Schedule1F1B"}
        for seed, how in ((1, {}), (2, {"loss_kwargs": {"weight": 3.0}})):
            if how and not takes_loss_kwargs(theirs):
                continue
            wanted, found = call(theirs.step, name, seed, **how), call(mine.step, name, seed, **how)
            expect_same(found, wanted, ends(name))
            compare_grads(my_modules, their_modules)
            kept = [p.grad.clone() for m in my_modules for p in m.parameters()]
            # Torch's evaluates no V (2.13), and scales the gradients that there are.
            expect_same(call(mine.eval, name, 5), evaluated(name, 5), ends(name))
            grads = [p.grad for m in my_modules for p in m.parameters()]
            assert all(torch.equal(a, b) for a, b in zip(kept, grads, strict=True))
            for m in (*my_modules, *their_modules):
                m.zero_grad()
        assert call(mine.step, name, 3, return_outputs=False)[0] is None


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def takes_loss_kwargs(schedule: Any) -> bool:
    """torch 2.11's do not."""
    return "loss_kwargs" in inspect.signature(schedule.step).parameters


@torch.no_grad()
def evaluated(name: str, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Outputs and losses of the whole model, in one process."""
    x, y = batch(seed)
    for index in range(RANKS if name == "Schedule1F1B" else 2 * RANKS):
        x = module(index)(x)
    chunks = zip(x.tensor_split(CHUNKS), y.tensor_split(CHUNKS), strict=True)
    return x, [weighted_loss(*chunk) for chunk in chunks]


def expect_same(found: Any, wanted: Any, end: int) -> None:
    outputs, losses = found
    assert len(losses) == (CHUNKS if dist.get_rank() == end else 0)
    for loss, want in zip(losses, wanted[1], strict=False):
        torch.testing.assert_close(loss, want, **CLOSE)
    assert (outputs is None) == (dist.get_rank() != end)
    if outputs is not None:
        torch.testing.assert_close(outputs, wanted[0], **CLOSE)


def compare_grads(mine: list[nn.Module], theirs: list[nn.Module]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert q.grad.abs().max() > 1e-6
            torch.testing.assert_close(p.grad, q.grad, **CLOSE)


@pytest.mark.parametrize("name", ["Schedule1F1B", "ScheduleZBVZeroBubble", "ScheduleDualPipeV"])
def test_same_as_torch(name: str) -> None:
    run_ranks(same_as_torch, RANKS, name, backend="gloo", run_timeout_s=100)


def gradients_add_up() -> None:
    """Torch scales what was there before too; here only the new ones are."""
    mine, modules = make(ours, "ScheduleDualPipeV")
    call(mine.step, "ScheduleDualPipeV", 1)
    once = [p.grad.clone() for m in modules for p in m.parameters()]
    call(mine.step, "ScheduleDualPipeV", 1)
    for before, after in zip(once, (p.grad for m in modules for p in m.parameters()), strict=True):
        torch.testing.assert_close(after, 2 * before, **CLOSE)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = module(1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.inner(x)
        return y, y.sum(1)


def loss_of_two(outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    first, second = outputs
    return (F.mse_loss(first, target) + second.mean()).reshape(1)


def outputs_as_torch_gives_them() -> None:
    """A tuple of outputs reaches the loss as one; a loss may have one element."""
    rank = dist.get_rank()
    results = []
    for source in (torchs, ours):
        torch.manual_seed(0)
        stage_module = TwoOutputs() if rank == 1 else module(0)
        stage = PipelineStage(stage_module, rank, RANKS, device())
        schedule = source.Schedule1F1B(stage, CHUNKS, loss_fn=loss_of_two)
        losses: list[Tensor] = [torch.zeros(())]
        x, y = batch(1)
        last = {"target": y, "losses": losses} if rank == 1 else {}
        outputs = schedule.step(*((x,) if rank == 0 else ()), **last)
        results.append((outputs, losses, [p.grad for p in stage_module.parameters()]))
    (their_outputs, their_losses, their_grads), (outputs, losses, grads) = results
    torch.testing.assert_close(grads, their_grads, **CLOSE)
    if rank == 1:
        torch.testing.assert_close(outputs, tuple(their_outputs), **CLOSE)
        assert len(losses) == CHUNKS
        torch.testing.assert_close([loss.reshape(1) for loss in losses], their_losses, **CLOSE)
        # Nothing old stays where there is no loss.
        schedule.eval(losses=losses)
        assert losses == []
    else:
        schedule.eval(batch(2)[0])


def forward_only() -> None:
    for name in ("Schedule1F1B", "ScheduleDualPipeV"):
        mine, modules = make(ours, name, loss_fn=None)
        x, _ = batch(4)
        found = mine.step(*((x,) if dist.get_rank() == 0 else ()))
        assert (found is None) == (dist.get_rank() != ends(name))
        if found is not None:
            torch.testing.assert_close(found, evaluated(name, 4)[0], **CLOSE)
            assert not found.requires_grad
        assert all(p.grad is None for m in modules for p in m.parameters())


def refusals() -> list[str]:
    rank, told = dist.get_rank(), []

    def refused(kind: type[Exception], make_or_call: Any) -> None:
        with pytest.raises(kind, match="expected") as failure:
            make_or_call()
        told.append(str(failure.value))

    name = "ScheduleDualPipeV"

    def make_with(chunks: int) -> Any:
        stages = [PipelineStage(module(i), i, 2 * RANKS, device()) for i in (rank, 3 - rank)]
        return ours.ScheduleDualPipeV(stages, chunks)

    refused(ValueError, lambda: make(ours, name, output_merge_spec=(0,)))
    refused(ValueError, lambda: make(ours, name, backward_requires_autograd=False))
    wrong = PipelineStage(module(0), 1 - rank, RANKS, device())
    refused(ValueError, lambda: ours.Schedule1F1B(wrong, CHUNKS))
    wrapped = nn.Sequential(nn.parallel.DistributedDataParallel(module(0)))
    stage = PipelineStage(wrapped, rank, RANKS, device())
    refused(ValueError, lambda: ours.Schedule1F1B(stage, CHUNKS))
    stage = PipelineStage(module(0), rank, RANKS, device(), dw_builder=lambda: lambda: None)
    refused(ValueError, lambda: ours.Schedule1F1B(stage, CHUNKS))
    stage = PipelineStage(module(0), rank, RANKS, device())
    refused(ValueError, lambda: ours.Schedule1F1B(stage, CHUNKS, rank_mapping=[1, 0]))
    refused(ValueError, lambda: ours.Schedule1F1B(stage, 0))
    refused(ValueError, lambda: ours.ScheduleDualPipeV([stage], CHUNKS))
    refused(ValueError, lambda: make_with(3))
    mine, _ = make(ours, name)
    x, _ = batch(1)
    refused(ValueError, lambda: mine.step(x, mask=x))
    with torch.no_grad():
        refused(RuntimeError, lambda: mine.step(x))
    # What was refused took nothing with it.
    outputs, _ = call(mine.step, name, 1)
    assert (outputs is None) == (rank != 0)
    return told


def test_what_torch_has_besides_is_refused() -> None:
    first, second = run_ranks(refusals, RANKS, backend="gloo", run_timeout_s=60)
    assert first[0] == "expected output_merge_spec=None, which cuts along dimension 0, got (0,)"
    assert first[1] == "expected backward_requires_autograd=True, got False"
    assert first[2] == "expected stages [0] of 2 on rank 0 for 1f1b, got [1] of 2"
    assert second[2] == "expected stages [1] of 2 on rank 1 for 1f1b, got [0] of 2"
    assert first[3].endswith("got DistributedDataParallel")
    assert first[4] == "expected stages without dw_builder, got one for stage 0"
    assert first[5] == "expected no rank_mapping: stages say where they are"
    assert first[6] == "expected n_microbatches to be a positive integer, got 0"
    assert first[7] == "expected stages [0, 3] of 4 on rank 0 for dualpipev, got [0] of 2"
    assert first[8].startswith("expected n_microbatches of at least 4 for dualpipev on 2 ranks")
    assert first[9] == "expected the model's arguments by position, got mask"
    assert first[10] == "expected step() with gradients, got torch.no_grad(): call eval()"


@pytest.mark.parametrize(
    "check", [gradients_add_up, outputs_as_torch_gives_them, forward_only], ids=lambda c: c.__name__
)
def test_two_ranks(check: Any) -> None:
    run_ranks(check, RANKS, backend="gloo", run_timeout_s=60)
