"""What was wrong with a route is told at the same call on every rank, by GPUs made up here."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualpipe_ext.ep.route_faults import CAPTURED, PERIOD, UNWATCHED, WATCHED, RouteFaults
from dualpipe_ext.ep.transport import RouteOptions
from dualpipe_ext.errors import CommTimeoutError

CALLS = 7 * PERIOD
OPTIONS = RouteOptions(layout="token", alignment=1, max_recv_tokens=None)
FAULT = {"fault": "overflow", "rank": 0, "layout": "token", "limit": 40, "count": 1000}


class Gpu:
    """Runs routes ``behind`` its host, and keeps the first fault that nobody has taken."""

    def __init__(self, behind: int, faulty: set[int]) -> None:
        self.behind, self.faulty = behind, faulty
        self.launched = self.ended = 0
        self.kinds: list[int] = []
        self.kept: dict[int, int] = {}

    def launch(self, kind: int) -> None:
        self.launched += 1
        self.kinds.append(kind)
        self.reach(self.launched - self.behind)

    def reach(self, route: int) -> None:
        while self.ended < route:
            kind = self.kinds[self.ended]
            self.ended += 1
            if self.ended in self.faulty:
                self.kept.setdefault(kind, self.ended)

    # --- as RouteReports, and an event behind what is launched ----------------------------------

    def any_fault(self) -> bool:
        return bool(self.kept)

    def take_fault(
        self, kind: int, up_to: int | None = None, keep: bool = False
    ) -> dict[str, Any] | None:
        route = self.kept.get(kind)
        if route is None or (up_to is not None and route > up_to):
            return None
        if not keep:
            del self.kept[kind]
        return FAULT

    def event(self) -> Any:
        end = self.launched
        return SimpleNamespace(record=lambda: None, query=lambda: self.reach(end) or True)


class Host:
    """Makes the calls of one rank."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        core = SimpleNamespace(RouteReports=lambda count: gpu)
        self.faults = RouteFaults(core, SimpleNamespace(rank=1, num_experts=4))

    def call(self, waits: bool) -> bool:
        """Whether it raised."""
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(torch.cuda, "Event", self.gpu.event)
            patches.setattr(torch.cuda, "synchronize", lambda: self.gpu.reach(self.gpu.launched))
            try:
                self.faults.before_route(1.0)
                self.gpu.launch(WATCHED if waits else UNWATCHED)
                self.faults.after_route()
                if waits:
                    self.gpu.reach(self.gpu.launched)
                    self.faults.after_wait(OPTIONS, torch.zeros(1, 1, dtype=torch.int64))
            except ValueError:
                return True
            return False


def calls_that_raise(behind: int, faulty: set[int], waiting: set[int] = frozenset()) -> list[int]:
    host = Host(Gpu(behind, faulty))
    return [call for call in range(CALLS) if host.call(call in waiting)]


routes = st.sets(st.integers(1, CALLS), max_size=12)


@given(faulty=routes, waiting=st.sets(st.integers(0, CALLS - 1), max_size=4))
def test_however_far_a_gpu_is_behind(faulty: set[int], waiting: set[int]) -> None:
    first, *others = (calls_that_raise(lag, faulty, waiting) for lag in (0, 1, 10, 31, 60, 500))
    assert others == [first] * len(others)


@pytest.mark.parametrize("behind", [0, 10, 60])
def test_where_every_call_is_wrong(behind: int) -> None:
    found = calls_that_raise(behind, set(range(1, CALLS + 1)))
    assert found == calls_that_raise(0, set(range(1, CALLS + 1)))
    assert len(found) >= 3


@pytest.mark.parametrize("route", [1, 2, 31, 32, 33, 64, 65, 100])
def test_it_takes_33_to_64_routes(route: int) -> None:
    (call,) = calls_that_raise(60, {route})
    assert PERIOD < call - (route - 1) <= 2 * PERIOD


def test_who_waits_is_told_of_all_that_came_before() -> None:
    assert calls_that_raise(60, {3}, waiting={9}) == [9]
    assert calls_that_raise(0, {3}, waiting={9}) == [9]
    gpu = Gpu(0, {1})
    host = Host(gpu)
    gpu.launch(CAPTURED)
    assert not host.call(waits=False)
    assert host.call(waits=True)
    assert not host.call(waits=True)


def test_who_looks_is_told_now_and_once() -> None:
    for kind in (UNWATCHED, WATCHED, CAPTURED):
        gpu = Gpu(0, {1})
        faults = Host(gpu).faults
        gpu.launch(kind)
        with pytest.raises(
            ValueError, match=r"^expected at most max_recv_tokens=40 rows at rank 0"
        ):
            faults.check()
        faults.check()


def test_a_gpu_that_does_not_come_to_an_end_is_not_waited_for_longer() -> None:
    host = Host(Gpu(0, set()))
    for _ in range(2 * PERIOD):
        assert not host.call(waits=False)
    late = "rank 1, dispatch: expected the device to finish those of earlier calls within 0.05 s"
    host.faults._ends[0] = (PERIOD, SimpleNamespace(query=lambda: False))
    with pytest.raises(CommTimeoutError, match=re.escape(late)):
        host.faults.before_route(0.05)


def test_settings_that_differ_are_told_apart() -> None:
    faults = Host(Gpu(0, set())).faults
    fault = {"fault": "mismatch", "rank": 0, "layout": "token", "alignment": 1, "count": 0}
    for theirs, mine, told in (
        (
            {"limit": 40, "zero_copy": False},
            {"max_recv_tokens": None},
            "got 'token' and 1, any number of rows at rank 1, 'token' and 1, a fixed number of "
            "rows at rank 0",
        ),
        (
            {"limit": -1, "zero_copy": False},
            {"max_recv_tokens": None, "zero_copy": True},
            "got 'token' and 1, any number of rows with zero_copy at rank 1, 'token' and 1, any "
            "number of rows at rank 0",
        ),
        (
            {"limit": 40, "zero_copy": False},
            {"max_recv_tokens": 40, "layout": "expert"},
            "got 'expert' and 1 at rank 1, 'token' and 1 at rank 0",
        ),
    ):
        options = RouteOptions(**{"layout": "token", "alignment": 1} | mine)
        with pytest.raises(ValueError, match=re.escape(told) + "$"):
            faults._raise(fault | theirs, options)
