"""The runtime on GPUs, by copy engine and over NCCL: results, two streams at full speed, and peers
that stall or die."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dualpipe_ext.errors import CommTimeoutError, WorkerFailedError
from dualpipe_ext.launch import run_ranks
from dualpipe_ext.pipeline.exchange import TensorSpec
from dualpipe_ext.pipeline.overlap import Phase
from dualpipe_ext.pipeline.plan import build_plan
from dualpipe_ext.pipeline.runtime import DualPipe, DualPipeV, Pipeline
from dualpipe_ext.pipeline.weight_grad import defer_weight_grads
from tests.multi_gpu import RANKS
from tests.pipeline.test_runtime import Case, Mlp, Phased, Varied, mse

both = pytest.mark.parametrize("transport", ["copy_engine", "collective"])

KINDS = ("dualpipe", "dualpipev", "1f1b", "zb1p", "zbv")
SMALL_RING = 1024  # every message is cut, waits for room, and goes round and round


def _one(stage, kind, num_chunks, rows=None, **options):
    rank = dist.get_rank()
    case = Case(stage, kind, dist.get_world_size(), num_chunks, rows)
    modules, stages = case.local(stage, rank)
    pipeline = Pipeline(kind, [m.cuda() for m in modules], timeout_s=60, record=True, **options)
    assert pipeline.transport == options["transport"]
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


def _all_kinds(transport):
    for kind in KINDS:
        _one(Phased, kind, 8, transport=transport)
    _one(Mlp, "dualpipe", 8, zero_bubble=False, transport=transport)
    _one(Varied, "dualpipev", 2 * RANKS, rows=5 * RANKS, transport=transport)
    small = {"transport": transport, "ring_bytes": SMALL_RING}
    _one(Varied, "dualpipev", 2 * RANKS, rows=5 * RANKS, **small)
    _one(Phased, "dualpipe", 8, **small)
    return True


@both
def test_every_schedule_equals_one_process(transport):
    assert all(run_ranks(_all_kinds, RANKS, transport, run_timeout_s=200))


class Late:
    """Holds the GPU of one rank, or of the one or the other, back before some launches."""

    def __init__(self, seed, ranks):
        self.rng = random.Random(1000 * seed + dist.get_rank())
        self.active = dist.get_rank() in ranks

    def __call__(self, _):
        if self.active and self.rng.random() < 0.3:
            torch.cuda._sleep(self.rng.randint(0, 2_000_000))


def _modules(kind, dtype, seed=0):
    """Two layers per stage, the same weights whatever the transport."""
    plan = build_plan(kind, num_ranks=dist.get_world_size(), num_chunks=8)
    modules = []
    for stage in plan.stages_of(dist.get_rank()):
        torch.manual_seed(100 * seed + plan.model_stage(stage))
        modules.append(Phased(stage).to(dtype).cuda())
    return modules


def _grads(kind, dtype, transport, late, *, steps=12, **options):
    """Gradients after every one of many steps whose batches differ in size."""
    modules = _modules(kind, dtype)
    pipeline = Pipeline(kind, modules, timeout_s=60, transport=transport, on_launch=late, **options)
    torch.manual_seed(5)
    found = []
    for step in range(steps):
        chunks = (8, 12)[step % 2]
        rows = chunks * (1 + 700 * (step % 3)) + step % 5
        x, labels = (torch.randn(rows, 6, dtype=dtype).cuda() for _ in range(2))
        pipeline.zero_grad()
        loss, _ = pipeline.step(x, num_chunks=chunks, criterion=mse, labels=(labels,))
        found += [] if loss is None else [loss.clone()]
        found += [p.grad.clone() for m in modules for p in m.parameters()]
    pipeline.close()
    return found


def _equal_bits(dtype):
    count = 0
    for kind in KINDS:
        wanted = _grads(kind, dtype, "collective", None)
        for seed, ranks in enumerate([(), (0,), (1,), (0, 1)]):
            ring = {"ring_bytes": SMALL_RING << 4} if seed % 2 else {}
            got = _grads(kind, dtype, "copy_engine", Late(seed, ranks), **ring)
            assert len(got) == len(wanted)
            assert all(map(torch.equal, got, wanted)), (kind, ranks)
            count += len(got)
    return count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_both_transports_give_the_same_bits_whoever_is_late(dtype):
    assert all(run_ranks(_equal_bits, RANKS, dtype, run_timeout_s=300))


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


def _racing(transport):
    """Steps with two streams give the bits of a run that synchronises after every launch."""
    rank, chunks = dist.get_rank(), 12
    torch.manual_seed(5)
    x, labels = (torch.randn(chunks * 1024, 2048).cuda() for _ in range(2))
    grads = []
    for synchronise in (True, False):
        modules = [defer_weight_grads(Wide(s).cuda()) for s in (rank, 3 - rank)]
        options = {"on_launch": lambda _: torch.cuda.synchronize()} if synchronise else {}
        pipeline = DualPipeV(modules, timeout_s=60, record=True, transport=transport, **options)
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


@both
def test_streams_do_not_race(transport):
    assert all(span > 0 for span, _, _ in run_ranks(_racing, 2, transport, run_timeout_s=120))


def _memory():
    """Bytes that the allocator holds after every step: none may be added step by step."""
    rank, chunks = dist.get_rank(), 12
    x, labels = (torch.randn(chunks * 1024, 2048).cuda() for _ in range(2))
    modules = [Wide(s).cuda() for s in (rank, 3 - rank)]
    pipeline = DualPipeV(modules, timeout_s=60, transport="copy_engine")
    held = []
    for _ in range(12):
        pipeline.zero_grad()
        pipeline.step(x, num_chunks=chunks, criterion=F.mse_loss, labels=(labels,))
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    pipeline.close()
    return held


def test_memory_is_the_same_after_every_step():
    for held in run_ranks(_memory, 2, run_timeout_s=120):
        assert set(held[2:]) == {held[2]}


def _stalled(transport):
    rank = dist.get_rank()
    pipeline = DualPipe([Mlp(0).cuda(), Mlp(1).cuda()], timeout_s=3.0, transport=transport)
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


@both
def test_stalled_peer(transport):
    text, seconds = run_ranks(_stalled, 2, transport, run_timeout_s=120)[0]
    assert "rank 0 waited 3 s for rank 1 to send the header of" in text
    assert seconds < 6


def _stalled_in_the_middle():
    """With shapes that are declared the host waits for nothing before the end of the step."""
    rank = dist.get_rank()
    spec = [TensorSpec((1, 6), torch.float64, True)]
    launches = []

    def stall(name):
        launches.append(name)
        if rank == 1 and len(launches) == 30:
            time.sleep(8.0)

    pipeline = DualPipeV(
        [Phased(0).cuda(), Phased(1).cuda()],
        timeout_s=3.0,
        transport="copy_engine",
        boundary=spec,
        on_launch=stall,
    )
    x = torch.zeros(8, 6, dtype=torch.float64).cuda()
    begin = time.monotonic()
    with pytest.raises(CommTimeoutError) as caught:
        pipeline.step(x, num_chunks=8, criterion=mse, labels=(x,))
    seconds = time.monotonic() - begin
    pipeline.close()
    assert torch.ones(3).cuda().sum().item() == 3, "the device still works"
    return str(caught.value), seconds


def test_peer_that_stalls_in_the_middle_of_a_step():
    """Both ranks give up: the late one too, since the other one announces nothing any more."""
    (text, seconds), (late_text, _) = run_ranks(_stalled_in_the_middle, 2, run_timeout_s=120)
    assert "rank 0 waited 3 s for rank 1 to " in text
    assert seconds < 7
    assert "rank 1 waited 3 s for rank 0 to " in late_text


def _killed(folder):
    rank = dist.get_rank()
    launches = []

    def die(name):
        launches.append(name)
        if rank == 1 and len(launches) == 60:
            os.kill(os.getpid(), signal.SIGKILL)

    # The launcher asks the others to stop as soon as it sees one dead; they have a few seconds.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stages = [Phased(0).cuda(), Phased(1).cuda()]
    pipeline = DualPipeV(stages, timeout_s=2.0, transport="copy_engine", on_launch=die)
    x = torch.zeros(8, 6, dtype=torch.float64).cuda()
    try:
        with pytest.raises(CommTimeoutError, match="rank 0 waited 2 s for rank 1 to "):
            pipeline.step(x, num_chunks=8, criterion=mse, labels=(x,))
        pipeline.close()
        assert torch.ones(3).cuda().sum().item() == 3, "the device still works"
        verdict = "ok"
    except BaseException as error:
        verdict = repr(error)
    (folder / f"rank {rank}").write_text(verdict)
    # As the launcher wanted it: who ends in another way would be taken for the cause.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def test_killed_peer(tmp_path):
    with pytest.raises(WorkerFailedError, match="was killed by signal 9") as caught:
        run_ranks(_killed, 2, tmp_path, run_timeout_s=120, grace_s=15)
    assert caught.value.rank == 1
    assert (tmp_path / "rank 0").read_text() == "ok"


def _mapped():
    """Pipeline ranks in another order than the group's."""
    rank = dist.get_rank()
    case = Case(Phased, "dualpipev", 2, 8)
    modules, stages = case.local(Phased, 1 - rank)
    pipeline = DualPipeV([m.cuda() for m in modules], rank_mapping=[1, 0], timeout_s=60)
    assert pipeline.transport == "copy_engine"
    x, labels, _ = case.batch(1 - rank)
    x, labels = (None if t is None else t.cuda() for t in (x, labels))
    pipeline.step(x, num_chunks=8, criterion=mse, labels=(labels,))
    case.check_grads([m.cpu() for m in modules], stages, 1)
    pipeline.close()
    return True


def test_rank_mapping_and_what_auto_means():
    assert all(run_ranks(_mapped, 2, run_timeout_s=60))
