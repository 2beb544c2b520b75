"""The setting: who is told what when it changes, and what is no setting."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dualpipe_ext.sms import SMPartition, set_partition

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _h200(monkeypatch):
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_the_limit_follows_the_number_and_the_place():
    partition = SMPartition(24, means="persistent", device=GPU)
    assert (partition.num_sms, partition.comm_sms, partition.compute_sms) == (132, 24, 108)
    assert partition.max_sms() == 132
    with partition.step(), partition.beside():
        assert partition.max_sms() == 108
        with partition.beside():
            assert partition.max_sms() == 108
        assert partition.max_sms() == 108
        partition.set(8)
        assert partition.max_sms() == 124
    assert partition.max_sms() == 132


def test_the_place_is_left_after_an_error_too():
    partition = SMPartition(24, means="persistent", device=GPU)
    with pytest.raises(RuntimeError), partition.beside():
        raise RuntimeError
    assert partition.max_sms() == 132


def test_auto_is_undecided_until_it_is_set():
    partition = SMPartition(device=GPU, means="persistent")
    assert (partition.asked, partition.comm_sms) == ("auto", None)
    with partition.beside():
        assert partition.max_sms() == 132
    partition.set(16)
    assert (partition.asked, partition.comm_sms) == ("auto", 16)


def test_followers_are_told_before_a_number_is_in_force():
    partition, seen = SMPartition(24, device=GPU), []
    partition.follow(lambda number: seen.append((number, partition.comm_sms)))
    partition.set(0)
    partition.set(8)
    assert seen == [(0, 24), (8, 0)]


def test_a_follower_that_fails_leaves_the_number():
    partition = SMPartition(24, device=GPU)

    def refuse(number: int) -> None:
        raise ValueError("no")

    partition.follow(refuse)
    with pytest.raises(ValueError, match="no"):
        partition.set(0)
    assert partition.comm_sms == 24


@pytest.mark.parametrize("means", ["none", "persistent", "yielding", "carve_out", "green_context"])
def test_on_a_cpu_it_does_nothing(means):
    partition = SMPartition(8, means=means, device=torch.device("cpu"))
    with partition.step(), partition.beside():
        assert partition.max_sms() is None
    assert (partition.num_sms, partition.compute_sms) == (None, None)


@pytest.mark.parametrize(
    ("comm_sms", "means", "message"),
    [
        (-1, "none", "'auto' or an integer of at least 0, got -1"),
        ("8", "none", "'auto' or an integer of at least 0, got '8'"),
        (True, "none", "'auto' or an integer of at least 0, got True"),
        (8.0, "none", "'auto' or an integer of at least 0, got 8.0"),
        (132, "none", "leaves compute some of the 132 SMs, got 132"),
        (
            8,
            "loud",
            "one of none, persistent, yielding, carve_out, green_context, got 'loud'",
        ),
        ("auto", "carve_out", "same bits .* got 'carve_out'; give a number"),
        ("auto", "green_context", "same bits .* got 'green_context'; give a number"),
    ],
)
def test_what_is_no_setting(comm_sms, means, message):
    with pytest.raises(ValueError, match=message):
        SMPartition(comm_sms, means=means, device=GPU)


def test_a_green_context_needs_a_group_of_sms(monkeypatch):
    from dualpipe_ext.sms import means

    monkeypatch.setattr(means, "_green_contexts", lambda: object())
    with pytest.raises(ValueError, match="leaves compute some of the 132 SMs, got 125"):
        SMPartition(125, means="green_context", device=GPU)
    assert SMPartition(124, means="green_context", device=GPU).compute_sms == 8


def test_set_partition_reaches_the_modules_that_ask():
    asks = nn.Linear(2, 2)
    asks.partition = None
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(asks))
    partition = SMPartition(8, device=torch.device("cpu"))
    set_partition(model, partition)
    assert asks.partition is partition
    assert not hasattr(model[0], "partition")


class Follower:
    def __init__(self) -> None:
        self.seen: list[int] = []

    def tell(self, number: int) -> None:
        self.seen.append(number)


def test_who_follows_with_a_method_is_not_kept():
    partition, gone, there = SMPartition(24, device=GPU), Follower(), Follower()
    for follower in (gone, there):
        partition.follow(follower.tell)
    reference = weakref.ref(gone)
    partition.set(8)
    assert gone.seen == [8]
    del gone, follower
    assert reference() is None
    partition.set(0)
    assert there.seen == [8, 0]
