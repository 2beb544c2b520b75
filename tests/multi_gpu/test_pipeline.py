"""The runtime over NCCL: results, two streams at full speed, and a peer that stalls."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dualpipe_ext.errors import CommTimeoutError
from dualpipe_ext.launch import run_ranks
from dualpipe_ext.pipeline.overlap import Phase
from dualpipe_ext.pipeline.runtime import DualPipe, DualPipeV, Pipeline
from dualpipe_ext.pipeline.weight_grad import defer_weight_grads
from tests.pipeline.test_runtime import Case, Mlp, Phased, Varied, mse


def _one(stage, kind, num_chunks, rows=None, **options):
    rank = dist.get_rank()
    case = Case(stage, kind, dist.get_world_size(), num_chunks, rows)
    modules, stages = case.local(stage, rank)
    pipeline = Pipeline(kind, [m.cuda() for m in modules], timeout_s=60, record=True, **options)
    x, labels, ends = case.batch(rank)
    x, labels = (None if t is None else t.cuda() for t in (x, labels))
    for times in (1, 2):
        loss, _ = pipeline.step(x, num_chunks=num_chunks, criterion=mse, labels=(labels,))
        if ends is not None:
            torch.testing.assert_close(loss.cpu(), case.losses[ends], rtol=1e-12, atol=1e-12)
        case.check_grads([m.cpu() for m in modules], stages, times)
        for m in modules:
            m.cuda()
    assert pipeline.last_step.span_s > 0
    pipeline.close()


def _all_kinds():
    for kind in ("dualpipe", "dualpipev", "1f1b", "zb1p", "zbv"):
        _one(Phased, kind, 8)
    _one(Mlp, "dualpipe", 8, zero_bubble=False)
    _one(Varied, "dualpipev", 4, rows=10)
    return True


def test_every_schedule_equals_one_process():
    assert all(run_ranks(_all_kinds, 2, run_timeout_s=200))


class Wide(nn.Module):
    """Large enough for the two streams to really run at the same time."""

    def __init__(self, seed, hidden=2048):
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))

    def phases(self):
        def move(x, y):
            for _ in range(20):
                y = y.roll(1, 0)
            return x, y

        return [
            Phase("up", "compute", lambda x: (x, self.up(x).tanh())),
            Phase("there", "comm", move),
            Phase("down", "compute", lambda x, y: (x, self.down(y))),
            Phase("back", "comm", move),
            Phase("add", "compute", lambda x, y: (x + y,)),
        ]

    def forward(self, x):
        state = (x,)
        for phase in self.phases():
            state = phase.fn(*state)
        return state[0]


def _racing():
    """Steps with two streams give the bits of a run that synchronises after every launch."""
    rank, chunks = dist.get_rank(), 12
    torch.manual_seed(5)
    x, labels = (torch.randn(chunks * 1024, 2048).cuda() for _ in range(2))
    grads = []
    for synchronise in (True, False):
        modules = [defer_weight_grads(Wide(s).cuda()) for s in (rank, 3 - rank)]
        options = {"on_launch": lambda _: torch.cuda.synchronize()} if synchronise else {}
        pipeline = DualPipeV(modules, timeout_s=60, record=True, **options)
        for _ in range(3):
            pipeline.zero_grad()
            pipeline.step(x, num_chunks=chunks, criterion=F.mse_loss, labels=(labels,))
            grads.append([p.grad.clone() for m in modules for p in m.parameters()])
        record, memory = pipeline.last_step, torch.cuda.max_memory_allocated() / 2**30
        pipeline.close()
    assert all(torch.isfinite(g).all() for g in grads[0])
    for others in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], others, strict=True))
    return record.span_s, record.bubble(), memory


def test_streams_do_not_race():
    assert all(span > 0 for span, _, _ in run_ranks(_racing, 2, run_timeout_s=120))


def _stalled():
    rank = dist.get_rank()
    pipeline = DualPipe([Mlp(0).cuda(), Mlp(1).cuda()], timeout_s=3.0)
    x = torch.zeros(4, 6, dtype=torch.float64).cuda()
    step = {"num_chunks": 4, "criterion": mse, "labels": (x,)}
    pipeline.step(x, **step)
    if rank == 1:
        time.sleep(8.0)
        return None
    begin = time.monotonic()
    with pytest.raises(CommTimeoutError) as caught:
        pipeline.step(x, **step)
    seconds = time.monotonic() - begin
    pipeline.close()
    assert torch.ones(3).cuda().sum().item() == 3, "the device still works"
    return str(caught.value), seconds


def test_stalled_peer():
    text, seconds = run_ranks(_stalled, 2, run_timeout_s=120)[0]
    assert "rank 0 waited 3 s for rank 1 to send the header of" in text
    assert seconds < 6
