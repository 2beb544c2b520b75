"""Sums of stage copies' gradients between GPUs, with delays injected on either side."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dualpipe_ext.launch import run_ranks
from dualpipe_ext.pipeline import mirror
from dualpipe_ext.pipeline.ring import MIN_BYTES
from dualpipe_ext.pipeline.runtime import DualPipe

ROUNDS = 4
MOST_CYCLES = 1_000_000


def hold_back(channel, rng):
    """Let this rank or, where it has a stream of its own, the channel be late now and then."""
    name = "send" if channel.sends else "add"
    call = getattr(channel, name)
    own = getattr(getattr(channel, "_lane", None), "_stream", None)

    def held(*args, **options):
        for stream in (torch.cuda.current_stream(), own):
            if stream is not None and rng.random() < 0.3:
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(rng.randint(0, MOST_CYCLES))
        return call(*args, **options)

    setattr(channel, name, held)


def module_of(seed, rank, ring_bytes):
    """Gradients of two and a half rings, other ones on every rank."""
    module = nn.Module()
    sizes = [((ring_bytes // 40, 10), torch.bfloat16), ((7,), torch.float32)]
    sizes += [((ring_bytes // 2,), torch.float32), ((), torch.float64)]
    for index, (shape, dtype) in enumerate(sizes):
        generator = torch.Generator("cuda").manual_seed(100 * seed + 10 * index + rank)
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device="cuda"))
        grad = torch.randn(shape, device="cuda", generator=generator).to(dtype)
        module.register_parameter(str(index), parameter)
        parameter.grad = grad
    return module


def _summed(transport, ring_bytes, slow):
    rank = dist.get_rank()
    modules = [module_of(stage, rank, ring_bytes) for stage in range(2)]
    copies = [module_of(stage, 1 - rank, ring_bytes) for stage in range(2)]
    pipeline = DualPipe(modules, transport=transport, ring_bytes=ring_bytes, timeout_s=30)
    links = pipeline._connections.mirror
    for channel in (links.outgoing, links.incoming) if rank in slow else ():
        hold_back(channel, random.Random(2 * rank + channel.sends))
    pairs = [
        (p, q)
        for ours, theirs in zip(modules, copies, strict=True)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)
    ]
    wanted = [p.grad + q.grad for p, q in pairs]
    for _ in range(ROUNDS):  # from the second on, sums of sums
        sums = mirror.GradSums(dict(enumerate(modules)), links, torch.device("cuda", rank))
        sums.ready(0)
        torch.cuda._sleep(MOST_CYCLES)  # what the other stage still computes
        sums.run()
    for _ in range(ROUNDS - 1):
        wanted = [total + total for total in wanted]
    same = [torch.equal(p.grad, total) for (p, _), total in zip(pairs, wanted, strict=True)]
    links.incoming.drain()
    links.outgoing.drain()
    pipeline.close()
    return all(same)


@pytest.mark.parametrize("slow", [(), (0,), (0, 1)])
@pytest.mark.parametrize(
    ("transport", "ring_bytes"),
    [("copy_engine", MIN_BYTES), ("copy_engine", 64 << 20), ("collective", 64 << 20)],
)
def test_sums_with_either_rank_late(transport, ring_bytes, slow):
    assert all(run_ranks(_summed, 2, transport, ring_bytes, slow, run_timeout_s=90))
