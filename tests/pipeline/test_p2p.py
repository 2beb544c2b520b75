"""Channels between two ranks: order, dtypes, early release, and waits that end."""

from __future__ import annotations

import gc
import time
import weakref

import pytest
import torch
import torch.distributed as dist

from dualpipe_ext.errors import CommTimeoutError, DualPipeError, WorkerFailedError
from dualpipe_ext.launch import run_ranks
from dualpipe_ext.pipeline.p2p import Channel


def channels_each_way(name, *, timeout_s=20.0):
    """One channel each way; returns (outgoing, incoming)."""
    rank = dist.get_rank()
    device = torch.device("cpu")
    there, back = (
        Channel(f"{name}/{a}", a, 1 - a, rank=rank, device=device, timeout_s=timeout_s)
        for a in (0, 1)
    )
    return (there, back) if rank == 0 else (back, there)


def _everything():
    outgoing, incoming = channels_each_way("t")
    tensors = [
        torch.arange(6.0).reshape(2, 3).t(),  # not contiguous
        torch.tensor(7, dtype=torch.int64),
        torch.empty(0, 4),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]),
        torch.randn(9).to(torch.float8_e4m3fn),
        torch.randn(3, dtype=torch.bfloat16),
        torch.randn(1 << 18),  # larger than a socket's buffers
    ]
    torch.manual_seed(3)
    if dist.get_rank() == 1:
        message = incoming.receive([(t.shape, t.dtype) for t in tensors])
        tensors = incoming.wait(message, "tensors")
    else:
        outgoing.send(tensors, "tensors")
    outgoing.drain()
    result = [t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in tensors]
    # Messages are matched in order, also when receives are posted before the sends.
    if dist.get_rank() == 1:
        posted = [incoming.receive([((1,), torch.float32)]) for _ in range(20)]
        numbers = [incoming.wait(message, "numbers")[0] for message in posted[::-1]]
        result.append(torch.cat(numbers[::-1]))
    else:
        for i in range(20):
            outgoing.send([torch.tensor([float(i)])], "numbers")
        result.append(torch.arange(20.0))
    outgoing.drain()
    outgoing.close(abort=False)
    return result


def test_any_tensor_arrives_in_order():
    sent, received = run_ranks(_everything, 2, run_timeout_s=60)
    for a, b in zip(sent, received, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def _release():
    outgoing, incoming = channels_each_way("r")
    freed = None
    if dist.get_rank() == 0:
        tensor = torch.randn(1000)
        storage = weakref.ref(tensor.untyped_storage())
        outgoing.send([tensor], "tensor")
        del tensor
        gc.collect()
        before = storage() is not None  # not received yet: it must be there
        dist.barrier()
        outgoing.drain()
        gc.collect()
        freed = before, storage() is None
    else:
        dist.barrier()
        incoming.wait(incoming.receive([((1000,), torch.float32)]), "tensor")
    return freed


def test_sent_tensors_are_released():
    assert run_ranks(_release, 2, run_timeout_s=60)[0] == (True, True)


def _stalls(side):
    outgoing, incoming = channels_each_way(f"s{side}", timeout_s=1.0)
    if dist.get_rank() == 1:
        time.sleep(3.0)
        return None
    begin = time.monotonic()
    if side == "receive":
        message = incoming.receive([((3,), torch.float32)])
        with pytest.raises(CommTimeoutError) as caught:
            incoming.wait(message, "the outputs of 1F0")
    else:
        outgoing.send([torch.empty(1 << 20)], "the outputs of 0F0")
        with pytest.raises(CommTimeoutError) as caught:
            outgoing.drain()
    return str(caught.value), time.monotonic() - begin


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ("receive", "rank 0 waited 1 s for rank 1 to send the outputs of 1F0"),
        ("send", "rank 0 waited 1 s for rank 1 to receive the outputs of 0F0"),
    ],
)
def test_stalled_peer(side, message):
    text, seconds = run_ranks(_stalls, 2, side, run_timeout_s=60)[0]
    assert message in text
    assert 0.9 < seconds < 2.5


def _lost():
    _, incoming = channels_each_way("l")
    if dist.get_rank() == 1:
        return None
    message = incoming.receive([((3,), torch.float32)])
    with pytest.raises(DualPipeError, match=r"rank 0 lost rank 1 .* to send a thing"):
        incoming.wait(message, "a thing")
    return True


def test_lost_peer():
    assert run_ranks(_lost, 2, run_timeout_s=60)[0]


def _absent():
    if dist.get_rank() == 0:
        channels_each_way("a", timeout_s=1.0)
    else:
        time.sleep(3.0)


def test_peer_that_opens_no_channel():
    with pytest.raises(WorkerFailedError, match="rank 0 waited 1 s for rank 1 to open a channel"):
        run_ranks(_absent, 2, run_timeout_s=60)
