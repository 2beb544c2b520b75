"""Stage-to-stage sends on one GPU: both ends in one process, each with a stream as its current one.

The host launches a send before the receive that waits for it: it must not be held up by what only
it can end.
"""

from __future__ import annotations

import gc
import random
import time
import weakref

import pytest
import torch

from dualpipe_ext.errors import CommTimeoutError
from dualpipe_ext.pipeline import copy_channel, copy_engine
from dualpipe_ext.pipeline.copy_channel import CopyChannel
from dualpipe_ext.pipeline.ring import MIN_BYTES

LINKS = [(0, 1), (1, 0)]
LONG_S, SHORT_S = 20.0, 0.5
CYCLES_PER_US = 1500
DTYPES = [
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int64,
    torch.bool,
    torch.complex64,
]


class Ends:
    """Two ranks on one GPU, with a channel each way."""

    def __init__(self, ring_bytes=64 << 20, timeout_s=LONG_S):
        where = copy_engine.layout(2, LINKS, ring_bytes)
        device = torch.device("cuda", torch.cuda.current_device())
        memory = [torch.zeros(where.bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        torch.cuda.synchronize()
        self.ranks = [
            copy_engine.SendMemory(
                memory[rank], memory, None, rank=rank, where=where, timeout_s=timeout_s
            )
            for rank in range(2)
        ]
        self.streams = [torch.cuda.Stream() for _ in range(2)]
        siblings = [{}, {}]
        self.out, self.into = (
            [
                CopyChannel(
                    copy_engine.GpuLane(self.ranks[rank], source, destination),
                    source,
                    destination,
                    rank=rank,
                    device=device,
                    timeout_s=timeout_s,
                    siblings=siblings[rank],
                )
                for rank, source, destination in ends
            ]
            for ends in ([(0, 0, 1), (1, 1, 0)], [(0, 1, 0), (1, 0, 1)])
        )

    def on(self, rank):
        return torch.cuda.stream(self.streams[rank])

    def close(self, *, abort=False):
        for channel in (*self.out, *self.into):
            channel.close(abort=abort)


def tensors_of(rng, most):
    """A message on the GPU: any dtypes, sizes and strides."""
    message = []
    for _ in range(rng.randint(0, 4)):
        shape = rng.choice([(), (0, 5), (rng.randint(1, most),), (rng.randint(1, most), 7)])
        values = torch.randint(0, 2 if rng.random() < 0.1 else 100, shape, device="cuda")
        tensor = values.to(rng.choice(DTYPES))
        message.append(tensor.t() if tensor.dim() == 2 and rng.random() < 0.5 else tensor)
    return message


def as_integers(tensor):
    return tensor.contiguous().view(torch.uint8) if tensor.dtype in DTYPES[3:4] else tensor


@pytest.mark.parametrize("ring_bytes", [MIN_BYTES, 1 << 20, 64 << 20])
def test_any_tensor_arrives_whoever_is_late(ring_bytes):
    rng = random.Random(ring_bytes)
    torch.manual_seed(ring_bytes)
    ends = Ends(ring_bytes)
    # Kernels are loaded before anything can wait: loading one waits for the device.
    assert all(torch.equal(as_integers(x), as_integers(x)) for x in tensors_of(rng, 10))
    checks = []
    for number in range(150):
        source = rng.randrange(2)
        message = tensors_of(rng, rng.choice([10, 1000, 30_000 if ring_bytes > MIN_BYTES else 100]))
        torch.cuda.current_stream().synchronize()
        for rank in (source, 1 - source):
            with ends.on(rank):
                if rng.random() < 0.3:
                    torch.cuda._sleep(rng.randint(0, 300) * CYCLES_PER_US)
        for channel in (ends.out[source], ends.into[1 - source]):
            if rng.random() < 0.2:
                with torch.cuda.stream(channel._lane._stream):
                    torch.cuda._sleep(rng.randint(0, 300) * CYCLES_PER_US)
        with ends.on(source):
            # Written by the stream of the sender, late; garbage once the channel lets go of it.
            sent = [torch.empty_like(x).copy_(x) for x in message]
            ends.out[source].send(sent, f"message {number}")
            del sent
        with ends.on(1 - source):
            incoming = ends.into[1 - source].receive([(x.shape, x.dtype) for x in message])
            got = ends.into[1 - source].wait(incoming, f"message {number}")
            checks += [(g.clone(), x) for g, x in zip(got, message, strict=True)]
    for channel in (*ends.out, *ends.into):
        channel.drain()
    torch.cuda.synchronize()
    assert all(torch.equal(as_integers(a), as_integers(b)) for a, b in checks)
    ends.close()


def test_numbers_wrap_around():
    ends = Ends()
    first = 2**32 - 3
    for channel in (ends.out[0], ends.into[1]):
        channel._ring._number = channel._ring._after = first
    for rank in ends.ranks:
        rank.own[: rank.where.control_bytes].view(torch.int32)[32:] = first - 2**32
    torch.cuda.synchronize()
    for number in range(6):
        with ends.on(0):
            ends.out[0].send([torch.full((64,), float(number), device="cuda")], "it")
        with ends.on(1):
            incoming = ends.into[1].receive([((64,), torch.float32)])
            (x,) = ends.into[1].wait(incoming, "it", on_host=True)
            assert x.tolist() == [number] * 64
    ends.close()


def test_what_is_sent_is_let_go_of():
    ends = Ends()
    with ends.on(0):
        tensor = torch.ones(1000, device="cuda")
        storage = weakref.ref(tensor.untyped_storage())
        ends.out[0].send([tensor], "it")
        del tensor
        torch.cuda.synchronize()
        ends.out[0].release_sent()
        gc.collect()
        assert storage() is None
    ends.close()


def test_memory_stays_the_same_over_many_messages():
    ends = Ends(8 << 20)
    seen = []
    for _ in range(60):
        with ends.on(0):
            ends.out[0].send([torch.ones(1 << 20, device="cuda")], "it")
        with ends.on(1):
            incoming = ends.into[1].receive([((1 << 20,), torch.float32)])
            ends.into[1].wait(incoming, "it")[0].add_(1)
            del incoming
        ends.out[0].drain()
        ends.into[1].drain()
        seen.append(torch.cuda.memory_reserved())
    assert seen[-1] == seen[5]
    ends.close()


def test_a_piece_that_never_comes():
    ends = Ends(timeout_s=SHORT_S)
    with ends.on(1):
        begin = time.monotonic()
        incoming = ends.into[1].receive([((4,), torch.int64)])
        (x,) = ends.into[1].wait(incoming, "the outputs of 0F3")
        told = r"rank 1 waited 0\.5 s for rank 0 to send the outputs of 0F3"
        with pytest.raises(CommTimeoutError, match=told):
            ends.into[1].drain()
        assert SHORT_S * 0.9 < time.monotonic() - begin < SHORT_S + 1
        with pytest.raises(CommTimeoutError, match=told):
            ends.out[1].send([torch.ones(4, device="cuda")], "the outputs of 1F3")
        assert x.tolist() == [0] * 4
        assert torch.ones(3, device="cuda").sum().item() == 3
    # Nothing is announced by a rank that has failed.
    lane = ends.into[0]._lane
    flag = ends.ranks[0].where.end(1, copy_engine._PIECE_FLAG)
    assert lane._memory.own[flag : flag + 4].view(torch.int32).item() == 0
    ends.close(abort=True)


def test_room_that_is_never_made():
    ends = Ends(MIN_BYTES, timeout_s=SHORT_S)
    with ends.on(0):
        for number in range(8):
            ends.out[0].send([torch.ones(64, device="cuda")], f"message {number}")
        with pytest.raises(CommTimeoutError, match="for rank 1 to make room for message"):
            ends.out[0].drain()
        assert torch.ones(3, device="cuda").sum().item() == 3
    ends.close(abort=True)


def test_an_abort_ends_what_waits():
    ends = Ends(timeout_s=60.0)
    torch.ones(3, device="cuda").sum().item()
    with ends.on(1):
        ends.into[1].wait(ends.into[1].receive([((4,), torch.float32)]), "it")
    begin = time.monotonic()
    ends.close(abort=True)
    torch.cuda.synchronize()
    assert time.monotonic() - begin < 5
    assert not copy_engine._stuck
    ends.close(abort=True)  # allowed twice


def test_opening_waits_for_the_other_end():
    ends = Ends(timeout_s=SHORT_S)
    with pytest.raises(CommTimeoutError, match="to send the opening of a channel"), ends.on(0):
        copy_channel.open_all([ends.out[0], ends.into[0]])
    ends.close(abort=True)
