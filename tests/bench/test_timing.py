"""The protocol of a measurement, on a rank of its own."""

from __future__ import annotations

import gc
import time

import pytest
import torch

from dualpipe_ext.bench.ranks import Ranks
from dualpipe_ext.bench.timing import Series, interleaved, measure


class Alone(Ranks):
    """One rank; ``others`` is what a second one would have measured."""

    rank, num_ranks, device = 0, 1, torch.device("cpu")

    def __init__(self, others: list[float] | None = None) -> None:
        self.others = others
        self.log: list[str] = []

    def _exchange_tensors(self, tensor):
        return [tensor]

    def _exchange(self, item):
        return [item] if self.others is None else [item, self.others]

    def _meet(self):
        self.log.append("barrier")


def test_microseconds_per_call() -> None:
    us = measure(lambda: time.sleep(0.002), 5, Alone())
    assert 2000 <= us < 20000


def test_rounds_are_interleaved_and_calls_follow_each_other() -> None:
    ranks = Alone()
    calls = {name: (lambda name=name: ranks.log.append(name)) for name in ("a", "b")}
    found = interleaved(calls, ranks, rounds=2, num_calls=3)
    assert {name: len(times) for name, times in found.items()} == {"a": 2, "b": 2}
    one_round = ["barrier", *"aaa", "barrier", *"bbb"]
    assert ranks.log == [*"aaa", *"bbb", *one_round, *one_round]


def test_what_leads_a_series_in_is_not_measured() -> None:
    ranks = Alone()
    lead, body = (lambda: time.sleep(0.05)), (lambda: ranks.log.append("body") or time.sleep(0.004))
    assert 1000 <= measure(Series(lead, body, 4), 100, ranks) < 10000
    found = interleaved({"a": Series(lambda: None, body, 4)}, ranks, rounds=2, num_calls=100)
    assert ranks.log == [*["barrier", "body"], "body", *["barrier", "body"] * 2]
    assert len(found["a"]) == 2


def test_on_a_gpu_one_more_call_comes_before_the_clock_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = Alone()
    ranks.device = torch.device("cuda")

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self) -> None:
            ranks.log.append("clock")

        def elapsed_time(self, other: Event) -> float:
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert measure(lambda: ranks.log.append("call"), 3, ranks) == 2000
    assert ranks.log == ["barrier", "call", "clock", "call", "call", "call", "clock"]


def test_a_series_of_calls() -> None:
    log: list[str] = []
    series = Series.of(lambda: log.append("call"), 3, num_lead=2)
    assert Series.of(series, 7) is series
    series.lead()
    assert len(log) == 2
    series.body()
    assert len(log) == 5


def test_the_slowest_rank_counts() -> None:
    found = interleaved({"a": lambda: None}, Alone([7e9, 0.0]), rounds=2, num_calls=1)
    assert found["a"][0] == 7e9
    assert 0 < found["a"][1] < 7e9


def test_the_garbage_collector_is_off_during_rounds_only() -> None:
    seen = []
    interleaved({"a": lambda: seen.append(gc.isenabled())}, Alone(), rounds=1, num_calls=2)
    assert seen[-2:] == [False, False]
    assert gc.isenabled()
