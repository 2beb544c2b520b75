"""The runtime against the same model in one process, in float64 over gloo."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dualpipe_ext.errors import CommTimeoutError, DualPipeError
from dualpipe_ext.launch import run_ranks
from dualpipe_ext.pipeline.exchange import TensorSpec
from dualpipe_ext.pipeline.overlap import Phase
from dualpipe_ext.pipeline.plan import build_plan
from dualpipe_ext.pipeline.runtime import DualPipe, DualPipeV, Pipeline
from dualpipe_ext.pipeline.weight_grad import defer_weight_grads
from tests.pipeline.leaving import all_pairs_leave

H = 6
TIMEOUT_S = 20.0


class Mlp(nn.Module):
    """The plain stage."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(H, 2 * H), nn.Linear(2 * H, H)
        self.double()

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


class Phased(Mlp):
    """The same in phases."""

    def phases(self):
        return [
            Phase("up", "compute", lambda x: (x, self.up(x))),
            Phase("move", "comm", lambda x, y: (x, y * 1)),
            Phase("down", "compute", lambda x, y: (x + self.down(y.tanh()),)),
        ]


class Varied(nn.Module):
    """Number, shape and dtype of outputs differ from stage to stage; one output is never used."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.kind = seed % 3
        self.layer = nn.Linear(H, H).double()

    def forward(self, x, *extra):
        x = x.reshape(x.shape[0], H)
        for tensor in extra:
            if tensor.dtype == torch.float64 and tensor.dim() == 2:
                x = x + tensor[:, :1]
        y = self.layer(x).tanh()
        ids = torch.arange(y.shape[0], device=y.device)
        return [(y, ids, y[:, :3] * 2), (y.reshape(-1, 2, 3), y.float().sum()), (y,)][self.kind]


def mse(output, *rest):
    """Loss of the first output; the label comes last."""
    return F.mse_loss(output.reshape(rest[-1].shape), rest[-1])


class Case:
    """A model, its batch, and what one process makes of it."""

    def __init__(self, stage, kind, num_ranks, num_chunks, rows=None):
        self.plan = build_plan(kind, num_ranks=num_ranks, num_chunks=num_chunks)
        self.num_chunks = num_chunks
        self.model = [stage(seed) for seed in range(len(self.plan.pipes[0]))]
        torch.manual_seed(1000)
        rows = 2 * num_chunks if rows is None else rows
        self.x, self.labels = (torch.randn(rows, H).double() for _ in range(2))
        halves = len(self.plan.pipes)
        per_pipe = num_chunks // halves
        self.losses, self.outputs = [], []
        parts = zip(self.x.chunk(halves), self.labels.chunk(halves), strict=True)
        for x, labels in parts:
            losses, outputs = [], []
            chunks = zip(x.tensor_split(per_pipe), labels.tensor_split(per_pipe), strict=True)
            for a, b in chunks:
                for module in self.model:
                    a = module(*a) if isinstance(a, tuple) else module(a)
                loss = mse(a[0] if isinstance(a, tuple) else a, b)
                loss.backward()
                losses.append(loss.detach())
                outputs.append(a.detach() if isinstance(a, torch.Tensor) else a[0].detach())
            self.losses.append(torch.stack(losses))
            self.outputs.append(torch.cat(outputs))

    def local(self, stage, rank):
        """This rank's stages, with the model's weights."""
        stages = [self.plan.model_stage(s) for s in self.plan.stages_of(rank)]
        return [defer_weight_grads(stage(seed)) for seed in stages], stages

    def batch(self, rank):
        """(inputs, labels) of ``rank``, and the pipe that ends there, if any."""
        x = labels = ends = None
        for index, pipe in enumerate(self.plan.pipes):
            if self.plan.stage_rank[pipe[0]] == rank:
                x = self.x.chunk(len(self.plan.pipes))[index]
            if self.plan.stage_rank[pipe[-1]] == rank:
                labels, ends = self.labels.chunk(len(self.plan.pipes))[index], index
        return x, labels, ends

    def check_grads(self, modules, stages, times=1):
        for module, stage in zip(modules, stages, strict=True):
            for name, q in self.model[stage].named_parameters():
                p = module.get_parameter(name)
                if q.grad is None:
                    assert p.grad is None or not p.grad.any()
                else:
                    torch.testing.assert_close(p.grad, times * q.grad, rtol=1e-12, atol=1e-12)


def _one(stage, kind, num_chunks, *, rows=None, infer=True, **options):
    """A training and an inference step of one shape against the reference."""
    rank = dist.get_rank()
    case = Case(stage, kind, dist.get_world_size(), num_chunks, rows)
    modules, stages = case.local(stage, rank)
    pipeline = Pipeline(kind, modules, timeout_s=TIMEOUT_S, **options)
    x, labels, ends = case.batch(rank)

    def step():
        return pipeline.step(
            x, num_chunks=num_chunks, criterion=mse, labels=(labels,), return_outputs=True
        )

    loss, outputs = step()
    case.check_grads(modules, stages)
    results = [(loss, outputs)]
    if infer:
        before = [p.grad for m in modules for p in m.parameters()]
        with torch.no_grad():
            results.append(step())
        after = [p.grad for m in modules for p in m.parameters()]
        assert all(a is b for a, b in zip(before, after, strict=True))
    for loss, outputs in results:
        if ends is None:
            assert (loss, outputs) == (None, None)
        else:
            outputs = outputs[0] if isinstance(outputs, tuple) else outputs
            torch.testing.assert_close(loss, case.losses[ends], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(outputs, case.outputs[ends], rtol=1e-12, atol=1e-12)
            assert not outputs.requires_grad
    pipeline.close()


def _shapes(kinds, extra):
    num_chunks = 2 * dist.get_world_size() + extra
    for kind in kinds:
        for zero_bubble in (True, False):
            _one(Mlp, kind, num_chunks, zero_bubble=zero_bubble, infer=zero_bubble)
            _one(Phased, kind, num_chunks, zero_bubble=zero_bubble, infer=not zero_bubble)
    return True


@pytest.mark.parametrize(("ranks", "extra"), [(2, 0), (2, 4), (4, 2)])
def test_every_schedule_equals_one_process(ranks, extra):
    kinds = ["dualpipe", "dualpipev", "1f1b", "zb1p", "zbv"]
    assert all(run_ranks(_shapes, ranks, kinds, extra, run_timeout_s=90))


@pytest.mark.parametrize("ranks", [1, 3])
def test_odd_numbers_of_ranks(ranks):
    assert all(run_ranks(_shapes, ranks, ["dualpipev", "zb1p", "zbv"], 1, run_timeout_s=90))


def _eight():
    _one(Mlp, "dualpipe", 18)
    _one(Phased, "dualpipe", 16, zero_bubble=False, infer=False)
    for kind in ("dualpipev", "1f1b", "zb1p", "zbv"):
        _one(Phased, kind, 17, infer=False)
    return True


def test_eight_ranks():
    assert all(run_ranks(_eight, 8, run_timeout_s=90))


def _variants():
    """Everything that is about one step but not about the schedule."""
    size = dist.get_world_size()
    even = 2 * size
    _one(Varied, "dualpipe", even)
    _one(Varied, "1f1b", even)
    # Chunks of uneven size, noticed without being told: 2 P + 1 rows in 2 P chunks.
    _one(Mlp, "dualpipev", even, rows=even + 1)
    _one(Varied, "zbv", even, rows=even + 2)
    _one(Phased, "dualpipe", even, rows=2 * even + 6)
    _one(Mlp, "zb1p", even, dynamic_shapes=True)
    spec = [TensorSpec((2, H), torch.float64, True)]
    _one(Phased, "dualpipe", even, boundary=spec)
    return True


def test_shapes_of_all_sorts():
    assert all(run_ranks(_variants, 2, run_timeout_s=60))


def _mirrored():
    rank, size = dist.get_rank(), dist.get_world_size()
    case = Case(Mlp, "dualpipe", size, 2 * size)
    x, labels, _ = case.batch(rank)
    results = []
    for sync in (True, False):
        modules, stages = case.local(Mlp, rank)
        pipeline = DualPipe(modules, sync_mirrored_grads=sync, timeout_s=TIMEOUT_S)
        pipeline.step(x, num_chunks=2 * size, criterion=mse, labels=(labels,))
        pipeline.close()
        if sync:
            case.check_grads(modules, stages)
        grads = [[p.grad for p in module.parameters()] for module in modules]
        results.append(dict(zip(stages, grads, strict=True)))
    return results


def test_both_copies_of_a_stage_get_the_same_bits():
    ranks = run_ranks(_mirrored, 4, run_timeout_s=60)
    for rank, (synced, alone) in enumerate(ranks):
        other_synced, other_alone = ranks[3 - rank]
        for stage, grads in synced.items():
            halves = zip(alone[stage], other_alone[stage], strict=True)
            for a, b, (mine, theirs) in zip(grads, other_synced[stage], halves, strict=True):
                assert torch.equal(a, b)
                assert torch.equal(a, mine + theirs)
                assert not torch.equal(a, mine)


def _accumulated():
    """Two steps without zero_grad, with parameters that only one direction uses, or none."""
    rank, size = dist.get_rank(), dist.get_world_size()
    case = Case(Mlp, "dualpipe", size, 2 * size)
    modules, stages = case.local(Mlp, rank)
    for module in modules:
        module.lonely = nn.Parameter(torch.ones(H, dtype=torch.float64))
        module.idle = nn.Parameter(torch.ones(H, dtype=torch.float64))
    forward = modules[0].forward
    modules[0].forward = lambda x: forward(x) + 0 * modules[0].lonely
    x, labels, _ = case.batch(rank)
    held = modules[0].up.weight.grad = torch.zeros_like(modules[0].up.weight)
    pipeline = DualPipe(modules, timeout_s=TIMEOUT_S)
    for times in (1, 2):
        pipeline.step(x, num_chunks=2 * size, criterion=mse, labels=(labels,))
        case.check_grads(modules, stages, times)
        assert all(module.lonely.grad is not None for module in modules)
        assert all(module.idle.grad is None for module in modules)
    assert modules[0].up.weight.grad is held
    return True


def test_mirrored_gradients_accumulate_over_steps():
    assert all(run_ranks(_accumulated, 2, run_timeout_s=60))


def _subgroups():
    """Two pipelines side by side on the columns of a 2 x 2 mesh, one with its ranks reversed."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    if rank == 3:
        dist.new_group([3], use_local_synchronization=True)  # group counts need not agree
    mapping = [[0, 1], [1, 0]][rank % 2]
    place = mapping[rank // 2]
    case = Case(Phased, "dualpipev", 2, 5)
    modules, stages = case.local(Phased, place)
    pipeline = DualPipeV(
        modules, groups[rank % 2], rank_mapping=mapping, timeout_s=TIMEOUT_S, record=True
    )
    x, labels, ends = case.batch(place)
    loss, _ = pipeline.step(x, num_chunks=5, criterion=mse, labels=(labels,))
    case.check_grads(modules, stages)
    if ends is not None:
        torch.testing.assert_close(loss, case.losses[0], rtol=1e-12, atol=1e-12)
    record = pipeline.last_step
    assert [a.label for a in record.actions] == [str(a) for a in case.plan.actions[place]]
    times = [t for a in record.actions for t in (a.start_s - a.wait_s, a.start_s, a.end_s)]
    assert times == sorted(times)
    assert record.span_s == times[-1]
    assert 0 <= record.bubble() < 1
    assert record.bubble(2 * record.span_s) == 1 - record.busy_s / (2 * record.span_s)
    return pipeline.rank


def test_subgroups_rank_mapping_and_records():
    assert run_ranks(_subgroups, 4, run_timeout_s=60) == [0, 1, 1, 0]


def _launches():
    rank = dist.get_rank()
    case = Case(Phased, "dualpipev", 2, 4)
    modules, _ = case.local(Phased, rank)
    launches = []
    pipeline = DualPipeV(modules, timeout_s=TIMEOUT_S, on_launch=launches.append)
    x, labels, _ = case.batch(rank)
    pipeline.step(x, num_chunks=4, criterion=mse, labels=(labels,))
    return " ".join(launches)


def test_pairs_are_interleaved():
    inner = run_ranks(_launches, 2, run_timeout_s=60)[1]
    assert "down(B) move(B) down(W) up(F) up(B) up(W) move(F) down(F)" in inner


def _leaving():
    """Pairs whose orders leave the first phase's weight gradient to the next pair."""
    rank = dist.get_rank()
    case = Case(Phased, "dualpipev", 2, 8)
    modules, stages = case.local(Phased, rank)
    launches: list[str] = []
    pipeline = DualPipeV(modules, timeout_s=TIMEOUT_S, on_launch=launches.append)
    x, labels, _ = case.batch(rank)
    with all_pairs_leave():
        for times in (1, 2):
            pipeline.step(x, num_chunks=8, criterion=mse, labels=(labels,))
            case.check_grads(modules, stages, times)
    pipeline.close()
    return " ".join(launches)


def test_weight_gradients_are_left_to_the_next_pair():
    inner = run_ranks(_leaving, 2, run_timeout_s=60)[1]
    one = "down(B) move(B) up(W) down(W) up(F) up(B) move(F) down(F)"
    assert f"{one} {one}" in inner


def _inputs_with_grad():
    rank = dist.get_rank()
    case = Case(Mlp, "dualpipev", 2, 5)
    modules, _ = case.local(Mlp, rank)
    x, labels, _ = case.batch(rank)
    pipeline = DualPipeV(modules, timeout_s=TIMEOUT_S)
    if rank:
        pipeline.step(num_chunks=5)
        return True
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    pipeline.step(x * scale, num_chunks=5, criterion=mse, labels=(labels,))
    got, scale.grad = scale.grad, None
    model = nn.Sequential(*case.model)
    parts = zip((x * scale).tensor_split(5), labels.tensor_split(5), strict=True)
    sum(mse(model(a), b) for a, b in parts).backward()
    torch.testing.assert_close(got, scale.grad, rtol=1e-12, atol=1e-12)
    return True


def test_gradients_of_the_inputs():
    assert all(run_ranks(_inputs_with_grad, 2, run_timeout_s=60))


def _expect(error, message, fn, *args, **kwargs):
    with pytest.raises(error, match=message):
        fn(*args, **kwargs)


def _user_errors():
    rank = dist.get_rank()
    stages = [Mlp(0), Mlp(1)]
    _expect(ValueError, "expected a kind of", Pipeline, "gpipe", stages)
    _expect(ValueError, "expected 1 stage per rank for 1f1b, got 2", Pipeline, "1f1b", stages)
    _expect(ValueError, "a permutation of 0..1, got", DualPipeV, stages, rank_mapping=[1, 1])
    for timeout_s in (0, float("nan"), 1e30, "x"):
        _expect(ValueError, "expected timeout_s above 0", DualPipeV, stages, timeout_s=timeout_s)
    _expect(ValueError, "expected batch_dim of 0 or more", DualPipeV, stages, batch_dim=0.5)
    _expect(ValueError, "expected stages as a module or a sequence", DualPipeV, None)
    _expect(ValueError, "expected every stage to be an nn.Module", DualPipeV, [torch.relu] * 2)
    _expect(ValueError, "expected kind as a schedule's name or a function", Pipeline, None, stages)
    _expect(ValueError, "expected kind to make a Plan, got int", Pipeline, lambda **_: 3, stages)
    _expect(ValueError, "the same kind on every rank", Pipeline, ["zbv", "dualpipev"][rank], stages)
    other = nn.Linear(2, 2) if rank else Mlp(1)
    _expect(ValueError, "two copies of model stage", DualPipe, [Mlp(0), other])
    pipeline = DualPipeV(stages, timeout_s=TIMEOUT_S)
    x = torch.zeros(4, H, dtype=torch.float64)
    _expect(ValueError, "at least 4 for dualpipev", pipeline.step, x, num_chunks=3)
    _expect(ValueError, "a call of step", pipeline, x)
    if rank == 0:
        step = pipeline.step
        _expect(ValueError, "expected a criterion on rank 0", step, x, num_chunks=4)
        options = {"num_chunks": 4, "criterion": mse}
        _expect(ValueError, "expected inputs on rank 0", step, None, **options)
        _expect(ValueError, "at least 4 entries along dimension 0", step, x[:3], **options)
        _expect(ValueError, "labels to be a tuple or list", step, x, labels=x, **options)
        _expect(
            ValueError, "labels to be tensors or None, got int", step, x, labels=(1,), **options
        )
    # None of these was fatal.
    pipeline.step(x, num_chunks=4, criterion=mse, labels=(x,))
    pipeline.close()
    _expect(DualPipeError, r"got one after close\(\)", pipeline.step, x, num_chunks=4)
    return True


def test_user_errors():
    assert all(run_ranks(_user_errors, 2, run_timeout_s=60))


class Growing(nn.Module):
    """Gives a longer output for every chunk."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(H, H).double(), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x).repeat(self.calls, 1)


def _failing(what):
    rank = dist.get_rank()
    x = torch.zeros(4, H, dtype=torch.float64)
    stage = Growing() if what == "shapes" else Mlp(0)
    if what == "criterion" and rank == 1:
        stage = nn.Linear(H, H).double()
    pipeline = Pipeline("1f1b", stage, timeout_s=3.0)
    options = {"num_chunks": 4, "criterion": mse, "labels": (x,)}
    message = {
        "shapes": "outputs of stage 0 to be .* pass dynamic_shapes=True",
        "stage": "boom",
        "chunks": "every rank to run the same step, got 3 chunks with gradients here and 4",
        "criterion": "criterion to return a scalar tensor, got",
    }[what]
    failing = {"shapes": 0, "stage": 0, "chunks": 1, "criterion": 1}[what]
    if what == "stage" and rank == 0:

        def boom(x):
            raise RuntimeError("boom")

        stage.forward = boom
    if what == "chunks" and rank == 1:
        options.update(num_chunks=3)
    if what == "criterion":
        options.update(criterion=lambda y, _: y)
    if rank != failing:
        # Its peer fails: it must find out, and not hang.
        _expect(DualPipeError, "rank", pipeline.step, x, **options)
    else:
        _expect((DualPipeError, ValueError, RuntimeError), message, pipeline.step, x, **options)
        pipeline.close()
    _expect(DualPipeError, "got one that failed with", pipeline.step, x, **options)
    return True


@pytest.mark.parametrize("what", ["shapes", "stage", "chunks", "criterion"])
def test_errors_inside_a_step(what):
    assert all(run_ranks(_failing, 2, what, run_timeout_s=60))


def _stalled():
    rank = dist.get_rank()
    x = torch.zeros(4, H, dtype=torch.float64)
    pipeline = DualPipeV([Mlp(0), Mlp(1)], timeout_s=1.0)
    if rank == 1:
        time.sleep(3.0)
        return None
    begin = time.monotonic()
    with pytest.raises(CommTimeoutError) as caught:
        pipeline.step(x, num_chunks=4, criterion=mse, labels=(x,))
    return str(caught.value), time.monotonic() - begin


def test_stalled_peer():
    text, seconds = run_ranks(_stalled, 2, run_timeout_s=60)[0]
    assert "rank 0 waited 1 s for rank 1 to " in text
    assert seconds < 2.9


def test_needs_torch_distributed():
    with pytest.raises(ValueError, match="call init_process_group"):
        Pipeline("1f1b", Mlp(0))
