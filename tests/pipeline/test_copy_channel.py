"""Channels by copy engine, on a simulated device whose streams go on in any order they may."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from torch import Tensor

from dualpipe_ext.errors import CommTimeoutError
from dualpipe_ext.pipeline import copy_channel
from dualpipe_ext.pipeline.p2p import as_bytes
from dualpipe_ext.pipeline.ring import MIN_BYTES
from tests.pipeline.simulated_lanes import CPU, World

DTYPES = [torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64]


def layouts_of(rng, most):
    """A message: up to three tensors of up to ``most`` elements together, empty ones too."""
    shapes = [rng.choice([(), (0, 4), (rng.randint(1, 9),), (rng.randint(1, most) // 3, 3)])]
    shapes += [(rng.randint(0, most),) for _ in range(rng.randint(0, 2))]
    return [(shape, rng.choice(DTYPES)) for shape in shapes]


def content(seed, layout) -> Tensor:
    shape, dtype = layout
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 200, shape, generator=generator)
    return (numbers % 2 if dtype == torch.bool else numbers).to(dtype)


def programs(rng, links, most):
    """What each rank sends and needs, in its order.

    All programs come from one order of events in which a message is needed after it is sent, so
    there is no circle; but a later message may be needed before an earlier one of its channel.
    """
    program: dict[int, list] = {rank: [] for link in links for rank in link}
    pending: list = []
    for number in range(100):
        link = rng.choice(links)
        message = (link, 10 * number, layouts_of(rng, most))
        program[link[0]].append(("send", message))
        pending.append(message)
        while len(pending) > 5 or (pending and rng.random() < 0.5):
            message = pending.pop(rng.randrange(len(pending)))
            program[message[0][1]].append(("need", message))
    for message in pending:
        program[message[0][1]].append(("need", message))
    return program


def perform(world, rank, program, posted, got):
    """One rank's host: computes and sends, receives and compares, in the order of its program.

    Args:
        posted: per link, the messages of its channel in the order of sending.
        got: takes what came and what should have.
    """
    current = world.ranks[rank].current
    kept: dict[tuple[int, int], list[list[Tensor]]] = {}
    arriving: dict[int, copy_channel.Arriving] = {}
    for what, (link, seed, layouts) in program:
        channel = world.channels[(rank, *link)]
        if what == "need":
            while seed not in arriving:
                other, expected = posted[link].pop(0)
                arriving[other] = channel.receive(expected)
            on_host = world.rng.random() < 0.1
            tensors = channel.wait(arriving.pop(seed), f"message {seed}", on_host=on_host)
            if on_host:
                assert all(equal(*pair) for pair in compared(tensors, seed, layouts))
            current.put(lambda c=(tensors, seed, layouts): got.extend(compared(*c)))
        else:
            tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in layouts]
            for i, pair in enumerate(zip(tensors, layouts, strict=True)):
                current.put(lambda p=pair, s=seed + i: p[0].copy_(content(s, p[1])) is not None)
            channel.send(tensors, f"message {seed}")
            if any(tensor.numel() for tensor in tensors):
                kept.setdefault(link, []).append(tensors)
        world.pause()
        for out, alive in kept.items():
            channel = world.channels[(rank, *out)]
            channel.release_sent()
            # What it lets go of is somebody else's memory from now on.
            while len(alive) > len(channel._moving):
                for tensor in alive.pop(0):
                    as_bytes(tensor).fill_(1)
    for (here, *_), channel in world.channels.items():
        if here == rank:
            channel.drain()


def compared(tensors, seed, layouts):
    return [
        (tensor.clone(), content(seed + index, layout))
        for index, (tensor, layout) in enumerate(zip(tensors, layouts, strict=True))
    ]


def equal(tensor, wanted):
    return tensor.dtype == wanted.dtype and torch.equal(tensor, wanted)


@pytest.mark.parametrize("seed", range(40))
def test_messages_with_any_order_of_streams(seed, monkeypatch):
    rng = random.Random(seed)
    links = rng.choice([[(0, 1), (1, 0)], [(0, 1), (1, 0), (1, 2), (2, 1)]])
    ring_bytes = rng.choice([1, 3, 40]) * MIN_BYTES
    first = rng.choice([0, 2**32 - 20])
    world = World(3, links, ring_bytes=ring_bytes, seed=seed, first=first)
    program = programs(rng, links, rng.choice([5, 200, 2000]))
    posted = {
        link: [m[1:] for what, m in program[link[0]] if what == "send" and m[0] == link]
        for link in links
    }
    got: list[tuple[Tensor, Tensor]] = []
    wanted = sum(len(layouts) for messages in posted.values() for _, layouts in messages)
    hosts = [partial(perform, world, rank, program[rank], posted, got) for rank in program]
    monkeypatch.setattr(copy_channel.time, "sleep", lambda _: world.pause())
    world.run(hosts)
    assert len(got) == wanted
    assert all(equal(*pair) for pair in got)
    assert not any(channel._moving for channel in world.channels.values())


def test_strided_tensors_and_their_release(monkeypatch):
    world = World(2, [(0, 1)], ring_bytes=4 * MIN_BYTES, seed=0)
    out, into = world.channels[0, 0, 1], world.channels[1, 0, 1]
    x = torch.arange(12.0).view(3, 4)
    out.send([x.t(), x[:, ::2], torch.empty(0, 3)], "x")
    assert len(out._moving) == 1
    world.advance()
    out.release_sent()
    assert not out._moving
    layouts = [((4, 3), x.dtype), ((3, 2), x.dtype), ((0, 3), x.dtype)]
    a, b, c = into.wait(into.receive(layouts), "x")
    world.advance()
    assert torch.equal(a, x.t())
    assert torch.equal(b, x[:, ::2])
    assert c.shape == (0, 3)
    into.drain()


def test_a_sender_goes_ahead_as_far_as_the_ring_holds():
    world = World(2, [(0, 1)], ring_bytes=MIN_BYTES, seed=0)
    out, into = world.channels[0, 0, 1], world.channels[1, 0, 1]
    for number in range(6):
        out.send([torch.full((64,), float(number))], f"message {number}")
    world.advance()
    out.release_sent()
    assert [moving.what for moving in out._moving] == ["message 4", "message 5"]
    tensors = [into.wait(into.receive([((64,), torch.float32)]), "it")[0] for _ in range(6)]
    world.advance()
    assert [t[0].item() for t in tensors] == list(range(6))
    assert not world.ranks[1].current.queue


def test_a_receive_takes_nothing_until_it_is_waited_for():
    world = World(2, [(0, 1)], ring_bytes=MIN_BYTES, seed=0)
    into = world.channels[1, 0, 1]
    into.receive([((8,), torch.float32)])
    assert not any(stream.queue for stream in world.streams)


def expire_when_stuck(world, monkeypatch, rank):
    def sleep(_):
        if not world.advance(5):
            world.ranks[rank].expired = True

    monkeypatch.setattr(copy_channel.time, "sleep", sleep)


def test_a_sender_that_never_comes(monkeypatch):
    world = World(3, [(0, 1), (1, 2)], ring_bytes=MIN_BYTES, seed=0)
    into, onward = world.channels[1, 0, 1], world.channels[1, 1, 2]
    expire_when_stuck(world, monkeypatch, 1)
    (tensor,) = into.wait(into.receive([((8,), torch.int64)]), "the outputs of 0F3")
    tensor.fill_(10**9)
    onward.send([torch.ones(8)], "the outputs of 1F3")
    told = r"rank 1 waited 5 s for rank 0 to send the outputs of 0F3 \(pipeline ranks\)"
    with pytest.raises(CommTimeoutError, match=told):
        into.drain()
    # On every channel of the rank, and at every call.
    with pytest.raises(CommTimeoutError, match=told):
        onward.send([torch.ones(8)], "the outputs of 1F4")
    world.advance()
    assert tensor.tolist() == [0] * 8, "no index out of range"
    assert world.ranks[2].flags[False, 1] == 0, "nothing is announced any more"


def test_a_message_that_is_not_needed_yet_is_named_too(monkeypatch):
    world = World(2, [(0, 1)], ring_bytes=MIN_BYTES, seed=0)
    into = world.channels[1, 0, 1]
    expire_when_stuck(world, monkeypatch, 1)
    into.receive([((8,), torch.float32)])
    with pytest.raises(CommTimeoutError, match="to send what comes before the gradients"):
        into.wait(into.receive([((8,), torch.float32)]), "the gradients", on_host=True)


def test_a_receiver_that_never_reads(monkeypatch):
    world = World(2, [(0, 1)], ring_bytes=MIN_BYTES, seed=0)
    out, into = world.channels[0, 0, 1], world.channels[1, 0, 1]
    for number in range(8):
        out.send([torch.full((64,), float(number))], f"message {number}")
    expire_when_stuck(world, monkeypatch, 0)
    with pytest.raises(CommTimeoutError, match="rank 0 waited 5 s for rank 1 to make room for mes"):
        out.drain()
    world.advance()
    # The receiver was only late, and now finds places that were written over: it must not end.
    expire_when_stuck(world, monkeypatch, 1)
    for _ in range(8):
        incoming = into.receive([((64,), torch.float32)])
        into.wait(incoming, "it") if world.ranks[1].failure is None else None
        world.advance()
    with pytest.raises(CommTimeoutError, match="rank 1 waited 5 s for rank 0 to send it"):
        into.drain()


def test_a_device_that_does_not_answer(monkeypatch):
    world = World(2, [(0, 1)], ring_bytes=MIN_BYTES, seed=0)
    into = world.channels[1, 0, 1]
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr(copy_channel.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(copy_channel.time, "sleep", lambda _: None)
    with pytest.raises(CommTimeoutError, match="rank 1 waited 20 s for its own device"):
        into.wait(into.receive([((8,), torch.float32)]), "it", on_host=True)


def test_opening(monkeypatch):
    world = World(2, [(0, 1), (1, 0)], ring_bytes=MIN_BYTES, seed=1)
    mine = [[c for (here, *_), c in world.channels.items() if here == rank] for rank in (0, 1)]
    monkeypatch.setattr(copy_channel.time, "sleep", lambda _: world.pause())
    world.run([partial(copy_channel.open_all, channels) for channels in mine])
    for channel in mine[0]:
        channel.close(abort=True)
        channel.close(abort=True)  # allowed twice
    assert world.closed == [True, True]


def test_empty_messages_cross_without_a_piece():
    world = World(2, [(0, 1)], ring_bytes=MIN_BYTES, seed=0)
    out, into = world.channels[0, 0, 1], world.channels[1, 0, 1]
    out.send([], "nothing")
    out.send([torch.empty(0, 4)], "nothing")
    assert into.wait(into.receive([]), "nothing", on_host=True) == []
    (tensor,) = into.wait(into.receive([((0, 4), torch.float64)]), "nothing")
    assert tensor.shape == (0, 4)
    assert tensor.device == CPU
    assert not any(stream.queue for stream in world.streams)


def test_what_is_not_read_yet_is_not_written_over_after_its_step(monkeypatch):
    """A sender that has ended a step was seen to be read: a later wait for room that fails, behind
    which copies go on, spoils messages of its own step alone."""
    world = World(2, [(0, 1)], ring_bytes=MIN_BYTES, seed=3)
    sender, receiver = world.channels[0, 0, 1], world.channels[1, 0, 1]
    for number in range(4):
        sender.send([torch.full((256,), number, dtype=torch.uint8)], f"message {number}")
    world.advance()
    monkeypatch.setattr(copy_channel.time, "sleep", lambda _: world.advance())
    world.ranks[0].expired = True  # the receiver has been slow for the whole time-out
    with pytest.raises(CommTimeoutError, match=r"rank 0 waited .* for rank 1 .* message 3"):
        sender.drain()
    world.ranks[0].expired = False
    for number in range(4):
        message = receiver.receive([((256,), torch.uint8)])
        (found,) = receiver.wait(message, f"message {number}")
        world.advance()
        assert found.eq(number).all()
