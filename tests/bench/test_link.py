"""Throttling repeats calls and changes no result; without the link, shapes and gradients stay."""

from __future__ import annotations

import pytest
import torch

from dualpipe_ext.bench.link import Link
from dualpipe_ext.ep import Buffer

T, H, E, K = 6, 16, 4, 2


def make_buffer() -> Buffer:
    return Buffer(
        hidden=H, num_experts=E, top_k=K, max_tokens=T, dtype=torch.float32, transport="collective"
    )


def there_and_back(buffer: Buffer):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(T, H, generator=generator, requires_grad=True)
    weights = torch.rand(T, K, generator=generator, requires_grad=True)
    idx = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    recv, handle = buffer.dispatch(x, idx, weights, layout="expert")
    y, _ = buffer.combine(recv.tokens * 2, handle, weights=recv.weights)
    y.square().sum().backward()
    return y.detach(), x.grad, weights.grad


@pytest.fixture
def counted():
    """A buffer, and how often its transport really moved rows."""
    buffer = make_buffer()
    moved = {"dispatch": 0, "combine": 0}
    for name in moved:
        real = getattr(buffer._transport, name)

        def count(*args, name=name, real=real, **options):
            moved[name] += 1
            return real(*args, **options)

        setattr(buffer._transport, name, count)
    return buffer, moved


@pytest.mark.parametrize(("repeats", "calls"), [(1.0, 4), (3.0, 12), (2.5, 10), (0.5, 4)])
def test_repeats_move_more_and_change_nothing(counted, repeats, calls):
    expected = there_and_back(make_buffer())
    buffer, moved = counted
    Link(buffer).repeats = repeats
    found = there_and_back(buffer)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # A forward and a backward are two dispatches and two combines.
    assert sum(moved.values()) == calls


def test_only_copy_engines_are_slowed_by_their_copies(counted):
    buffer, _ = counted
    assert Link(buffer, slow_link="host").slow_link == "calls"


def test_a_recording_makes_the_same_calls_again(counted):
    buffer, moved = counted
    link = Link(buffer)
    with link.recording() as found:
        there_and_back(buffer)
    assert len(found.handles) == 1
    assert len(found.calls) == 5  # a route, too
    before = dict(moved)
    found.replay()
    assert {name: count - before[name] for name, count in moved.items()} == before
    link.repeats = 2.0
    found.replay()
    assert moved == {name: 4 * count for name, count in before.items()}
    assert len(found.calls) == 5, "replaying is not recorded"


def test_taken_out_nothing_moves(counted):
    buffer, moved = counted
    link = Link(buffer)
    with link.recording() as found:
        expected = there_and_back(buffer)
    before = dict(moved)
    with link.taken_out(found.handles):
        result = there_and_back(buffer)
    assert moved == before
    assert [t.shape for t in result] == [t.shape for t in expected]
    assert all(torch.isfinite(t).all() and t.any() for t in result)
    assert all(torch.equal(a, b) for a, b in zip(there_and_back(buffer), expected, strict=True))
