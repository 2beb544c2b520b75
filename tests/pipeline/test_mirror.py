"""Gradients of stage copies: sums with the same bits on both ranks, whatever there is to sum."""

from __future__ import annotations

import random
import time
from functools import partial
from itertools import count, pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dualpipe_ext.agreement import Meetings
from dualpipe_ext.errors import CommTimeoutError, DualPipeError
from dualpipe_ext.launch import run_ranks
from dualpipe_ext.pipeline import copy_channel, mirror
from dualpipe_ext.pipeline.plan import build_plan
from dualpipe_ext.pipeline.ring import ALIGNMENT, MIN_BYTES, Ring, aligned
from tests.pipeline.simulated_lanes import World
from tests.pipeline.test_connections import ThreadLane, open_over_files
from tests.pipeline.test_p2p import channels_each_way

CPU = torch.device("cpu")
BOUND_S, SHORT_S = 30.0, 2.0
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
# Shape, dtype of the parameter and of its gradient, ranks that have one.
PARAMETERS = [
    ((7, 5), BF16, BF16, (0, 1)),
    ((300,), F64, F64, (0, 1)),  # over several messages
    ((64,), F32, F32, (0,)),
    ((90, 3), F32, F32, (1,)),
    ((5,), F32, F32, ()),
    ((0, 4), F32, F32, (0, 1)),
    ((0,), F32, F32, (1,)),
    ((), F64, F64, (0, 1)),
    ((33,), BF16, F32, (0, 1)),  # wider than its parameter
    ((41,), BF16, F32, (1,)),
]


def channels(transport, folder, timeout_s=BOUND_S):
    """(outgoing, incoming) of one of two ranks."""
    if transport == "collective":
        return channels_each_way("mirror", timeout_s=timeout_s)
    ThreadLane.timeout_s = timeout_s
    both = open_over_files(
        folder,
        dist.group.WORLD,
        [0, 1],
        [(0, 1), (1, 0)],
        device=CPU,
        ring_bytes=4096,
        timeout_s=timeout_s,
    )
    return sorted(both, key=lambda channel: not channel.sends)


def links_of(transport, folder, timeout_s=BOUND_S):
    meetings = None
    if transport == "copy_engine":
        meetings = Meetings("copies", dist.group.WORLD, timeout_s, "sum of gradients")
    return mirror.MirrorLinks(*channels(transport, folder, timeout_s), meetings)


def sum_grads(modules, links):
    """All at once, to the end."""
    mirror.GradSums(dict(enumerate(modules)), links, CPU).run()
    links.incoming.drain()
    links.outgoing.drain()


def make(rank):
    """A module with PARAMETERS and their gradients of ``rank``."""
    module = nn.Module()
    for index, (shape, dtype, grad_dtype, ranks) in enumerate(PARAMETERS):
        parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
        parameter.grad_dtype = grad_dtype
        if rank in ranks:
            generator = torch.Generator().manual_seed(2 * index + rank)
            parameter.grad = torch.randn(shape, generator=generator).to(grad_dtype)
            if parameter.ndim == 2 and rank == 1:
                parameter.grad = parameter.grad.t().contiguous().t()
        module.register_parameter(str(index), parameter)
    frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    module.register_parameter("frozen", frozen)
    return module


def _sum(transport, folder, bytes_):
    mirror._MESSAGE_BYTES = bytes_
    links = links_of(transport, folder)
    modules = [make(dist.get_rank()) for _ in range(2)]
    for _ in range(3):  # the third sums what the second has summed
        sum_grads(modules, links)
    grads = [[p.grad for p in module.parameters()] for module in modules]
    assert all(b is None if a is None else torch.equal(a, b) for a, b in zip(*grads, strict=True))
    return grads[0]


@pytest.mark.parametrize("bytes_", [256, 1000, 1 << 20])
@pytest.mark.parametrize("transport", ["collective", "copy_engine"])
def test_both_ranks_get_the_sum(transport, bytes_, tmp_path):
    mine, theirs = run_ranks(_sum, 2, transport, tmp_path, bytes_, run_timeout_s=60)
    both = [list(make(rank).parameters()) for rank in (0, 1)]
    for a, b, p, q in zip(mine, theirs, *both, strict=True):
        present = [x.grad for x in (p, q) if x.grad is not None]
        if not present:
            assert a is None
            assert b is None
            continue
        total = sum(present[1:], present[0])
        total = total + total
        total = total + total
        for got in (a, b):
            assert got.shape == p.shape
            assert got.dtype == total.dtype
            assert torch.equal(got, total)


@pytest.mark.parametrize("one_queue", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_streams(seed, one_queue, monkeypatch):
    """Also where whatever waits holds up all that its rank has launched later."""
    rng = random.Random(seed)
    ring_bytes = rng.choice([1, 3, 40]) * MIN_BYTES
    world = World(2, [(0, 1), (1, 0)], ring_bytes=ring_bytes, seed=seed, one_queue=one_queue)
    monkeypatch.setattr(copy_channel.time, "sleep", lambda _: world.pause())
    sizes = [rng.choice([0, 1, rng.randint(1, 3 * ring_bytes // 4)]) for _ in range(5)]
    modules = [nn.Module(), nn.Module()]
    for index, size in enumerate(sizes):
        dtype = rng.choice([BF16, F32])
        for module, has in zip(modules, rng.choice([(1, 1), (1, 1), (0, 1), (1, 0)]), strict=True):
            parameter = nn.Parameter(torch.empty(size, dtype=dtype))
            parameter.grad = torch.zeros(size, dtype=dtype) if has else None
            module.register_parameter(str(index), parameter)
    both = list(zip(*(module.parameters() for module in modules), strict=True))
    # Computed late, on the device.
    values = [
        [None if p.grad is None else torch.randn(p.shape).to(p.dtype) for p in module.parameters()]
        for module in modules
    ]
    wanted = [sum(v for v in copies if v is not None) for copies in zip(*values, strict=True)]

    told = {}

    class Links(mirror.MirrorLinks):
        def tell(self, codes):
            rank = self.outgoing.rank
            told[rank] = codes
            while 1 - rank not in told:
                world.pause()
            return told[1 - rank]

    def host(rank):
        channels = world.channels[rank, rank, 1 - rank], world.channels[rank, 1 - rank, rank]
        current = world.ranks[rank].current
        for parameter, value in zip(modules[rank].parameters(), values[rank], strict=True):
            if value is not None:
                current.put(lambda g=parameter.grad, v=value: g.copy_(v) is not None)
        sum_grads([modules[rank]], Links(*channels))

    world.run([partial(host, rank) for rank in range(2)])
    for copies, total in zip(both, wanted, strict=True):
        assert all(torch.equal(p.grad, total) for p in copies)
    assert not any(channel._moving for channel in world.channels.values())


def _refused(transport, folder):
    rank = dist.get_rank()
    links = links_of(transport, folder)
    module = nn.Linear(3, 2)
    module.weight.grad = torch.zeros(2, 3).to_sparse()
    with pytest.raises(DualPipeError, match=r"expected dense gradients.*of shape \[2, 3\]"):
        sum_grads([module], links)
    module.weight.grad = None
    module.bias.grad_dtype = None
    module.bias.grad = torch.zeros(2, dtype=(F32, BF16)[rank])
    here, there = (("float32", "bfloat16"), ("bfloat16", "float32"))[rank]
    message = rf"torch.{here} here and torch.{there} on rank {1 - rank} .* shape \[2\]"
    with pytest.raises(DualPipeError, match=message):
        sum_grads([module], links)
    # Also where only one of them has a gradient.
    if rank == 0:
        module.bias.grad = None
        module.bias.grad_dtype = F32
    with pytest.raises(DualPipeError, match=r"got torch.\w+ here and torch.\w+ on rank"):
        sum_grads([module], links)
    # A layer more on one rank than on the other.
    message = rf"as many parameters to train, got {2 + rank} here and {3 - rank} on rank {1 - rank}"
    module.bias.grad = None
    with pytest.raises(DualPipeError, match=message):
        sum_grads([module, *[nn.Linear(1, 1, bias=False)] * rank], links)
    return True


def test_what_is_refused(tmp_path):
    assert all(run_ranks(_refused, 2, "collective", tmp_path, run_timeout_s=60))


def _tied(folder):
    """The last stage to end adds to the gradient that it shares with the other."""
    links = links_of("collective", folder)
    modules = [make(dist.get_rank()) for _ in range(2)]
    hidden = [module.get_parameter("0") for module in modules]
    shared = nn.Parameter(torch.zeros(3))
    modules[0].register_parameter("shared", shared)
    modules[1].register_parameter("too", shared)
    shared.grad = torch.full((3,), 1.0 + dist.get_rank())
    sums = mirror.GradSums(dict(enumerate(modules)), links, CPU)
    sums.ready(0)
    shared.grad += 10
    hidden[0].grad += 1  # by the other stage, which has not registered it
    sums.ready(1)
    sums.run()
    return shared.grad.tolist(), (hidden[0].grad - hidden[1].grad).unique().tolist()


def test_parameters_that_both_stages_use(tmp_path):
    for shared, more in run_ranks(_tied, 2, tmp_path, run_timeout_s=60):
        assert shared == [23.0] * 3
        assert min(more) > 1.9  # in BF16


def _absent(transport, folder):
    links = links_of(transport, folder, SHORT_S)
    if dist.get_rank() == 1:
        time.sleep(3 * SHORT_S)
        return None
    began = time.monotonic()
    with pytest.raises(CommTimeoutError) as caught:
        sum_grads([make(0)], links)
    assert time.monotonic() - began < 3 * SHORT_S
    return str(caught.value)


@pytest.mark.parametrize("transport", ["collective", "copy_engine"])
def test_an_absent_rank_is_named(transport, tmp_path):
    text = run_ranks(_absent, 2, transport, tmp_path, run_timeout_s=60)[0]
    what = {
        "collective": "send the list of its gradients",
        "copy_engine": "sum the gradients of stage copies",
    }
    assert text == f"rank 0 waited 2 s for rank 1 to {what[transport]} (pipeline ranks)"


def _lost_in_between(folder):
    mirror._MESSAGE_BYTES = 256
    links = links_of("copy_engine", folder, SHORT_S)
    incoming = links.incoming
    if dist.get_rank() == 1:
        calls = count(1)
        add = incoming.add

        def stall(*args, **options):
            if next(calls) == 6:
                time.sleep(3 * SHORT_S)
            add(*args, **options)

        incoming.add = stall
    with pytest.raises(CommTimeoutError) as caught:
        sum_grads([make(dist.get_rank())], links)
    return str(caught.value)


def test_a_rank_that_stalls_in_between_is_found(tmp_path):
    texts = run_ranks(_lost_in_between, 2, tmp_path, run_timeout_s=60)
    for rank, text in enumerate(texts):
        assert text.startswith(f"rank {rank} waited 2 s for rank {1 - rank} to ")
        assert "gradients" in text


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.sampled_from([BF16, F32, F64]))),
    st.integers(ALIGNMENT, 4000),
)
def test_messages_hold_every_element_once(gradients, most):
    sums = [mirror._Sum(nn.Parameter(torch.zeros(n, dtype=dtype))) for n, dtype in gradients]
    messages = mirror._messages(sums, most)
    seen = {id(summed): [] for summed in sums}
    for message in messages:
        assert sum(aligned((p.stop - p.start) * p.of.dtype.itemsize) for p in message) <= most
        for part in message:
            seen[id(part.of)].append((part.start, part.stop))
    for summed in sums:
        spans = seen[id(summed)]
        assert spans[0][0] == 0
        assert spans[-1][1] == summed.parameter.numel()
        assert all(a[1] == b[0] and b[0] < b[1] for a, b in pairwise(spans))
    # Only what another gradient's part would begin in is left of a message.
    total = sum(aligned(s.parameter.numel() * s.dtype.itemsize) for s in sums)
    assert len(messages) <= 1 + total // (most - ALIGNMENT + 1)


@given(st.lists(st.integers(1, 4096), min_size=8, max_size=40), st.integers(16, 64))
def test_what_is_ahead_fits_into_the_ring(sizes, quarters):
    """The premise of why ranks cannot wait for each other: docs/internals.md, stage to stage."""
    ring = Ring(quarters * ALIGNMENT)
    for size in sizes:
        for piece in ring.pieces([min(size, ring.piece_bytes)]):
            assert piece.after <= max(0, piece.number - mirror._AHEAD)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_both_ranks_sum_in_the_order_in_which_stages_are_complete(num_ranks):
    plan = build_plan("dualpipe", num_ranks=num_ranks, num_chunks=2 * num_ranks)
    for rank in range(num_ranks):
        order = mirror.order_of_sums(plan, rank)
        theirs = mirror.order_of_sums(plan, mirror.mirror_rank(plan, rank))
        assert [*map(plan.model_stage, order)] == [*map(plan.model_stage, theirs)]
        last = plan.last_backwards(rank)
        assert last[order[0]] < last[order[1]] == len(plan.actions[rank]) - 1


def test_links_are_the_pairs_with_copies():
    assert mirror.links(build_plan("dualpipe", num_ranks=4, num_chunks=8)) == [
        (0, 3),
        (1, 2),
        (2, 1),
        (3, 0),
    ]
