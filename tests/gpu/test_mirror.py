"""Sums of stage copies' gradients over copy engines: both ranks in one process on one GPU.

Each rank is a thread with a stream of its own, as the sum waits on the host once.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from dualpipe_ext.pipeline import mirror
from dualpipe_ext.pipeline.ring import MIN_BYTES
from tests.gpu.test_copy_engine import CYCLES_PER_US, LONG_S, Ends

ROUNDS = 4


def hold_back(channel, rng):
    """Let the rank or the channel be late with some messages."""
    name = "send" if channel.sends else "add"
    call = getattr(channel, name)

    def held(*args, **options):
        for stream in (torch.cuda.current_stream(), channel._lane._stream):
            if rng.random() < 0.3:
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(rng.randint(0, 500) * CYCLES_PER_US)
        return call(*args, **options)

    setattr(channel, name, held)


def module_of(rank, ring_bytes):
    """Gradients of two and a half rings."""
    module = nn.Module()
    sizes = [((ring_bytes // 40, 10), torch.bfloat16), ((7,), torch.float32)]
    sizes += [((ring_bytes // 2,), torch.float32), ((), torch.float64)]
    for index, (shape, dtype) in enumerate(sizes):
        torch.manual_seed(10 * index + rank)
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device="cuda"))
        parameter.grad = torch.randn(shape, device="cuda").to(dtype)
        module.register_parameter(str(index), parameter)
    return module


@pytest.mark.parametrize("ring_bytes", [MIN_BYTES, 1 << 20, 64 << 20])
@pytest.mark.parametrize("slow", [(), (0,), (0, 1)])
def test_sums_with_either_rank_late(ring_bytes, slow):
    ends = Ends(ring_bytes)
    for rank in slow:
        for channel in (ends.out[rank], ends.into[rank]):
            hold_back(channel, random.Random(2 * rank + channel.sends))
    modules = [module_of(rank, ring_bytes) for rank in range(2)]
    wanted = [
        a.grad + b.grad for a, b in zip(*(module.parameters() for module in modules), strict=True)
    ]
    for _ in range(ROUNDS - 1):
        wanted = [total + total for total in wanted]
    torch.cuda.synchronize()

    def run(rank):
        with ends.on(rank):
            for _ in range(ROUNDS):
                mirror.sum_mirrored_grads([modules[rank]], ends.out[rank], ends.into[rank])
            torch.cuda.current_stream().synchronize()

    with ThreadPoolExecutor(2) as threads:
        for ran in [threads.submit(run, rank) for rank in range(2)]:
            ran.result(timeout=ROUNDS * LONG_S)
    for module in modules:
        for parameter, total in zip(module.parameters(), wanted, strict=True):
            assert torch.equal(parameter.grad, total)
    ends.close()
