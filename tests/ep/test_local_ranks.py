"""Virtual ranks: meetings, failures, time-outs, and the next run after any of them."""

from __future__ import annotations

import re
import threading
import time

import pytest
import torch

from dualpipe_ext.ep.local_ranks import LocalRank, LocalRanks
from dualpipe_ext.errors import CommTimeoutError, DualPipeError

SHORT_S = 0.2
# The most that anything may take beyond the waits asked for, on a machine with other work.
SLACK_S = 5.0


@pytest.fixture
def ranks() -> LocalRanks:
    return LocalRanks(3, timeout_s=30.0)


def expect_working(ranks: LocalRanks) -> None:
    everyone = list(range(ranks.num_ranks))
    assert ranks.run(lambda member: member.gather(member.rank)) == [everyone] * ranks.num_ranks


def test_results_and_arguments_by_rank(ranks: LocalRanks) -> None:
    def program(member: LocalRank, factor: int) -> int:
        assert member.num_ranks == 3
        return factor * member.rank

    assert ranks.run(program, 10) == [0, 10, 20]


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_many_meetings_with_ranks_late_in_turn(num_ranks: int) -> None:
    def program(member: LocalRank) -> None:
        for step in range(200):
            if step % 20 == member.rank:
                time.sleep(0.001)
            item = (step, member.rank)
            assert member.gather(item) == [(step, rank) for rank in range(num_ranks)]
            assert member.together(member.rank, sum) == sum(range(num_ranks))

    LocalRanks(num_ranks, timeout_s=30.0).run(program)


def test_one_thread_acts_and_it_is_rank_0s(ranks: LocalRanks) -> None:
    names = []

    def act(items: list[str]) -> object:
        names.append(threading.current_thread().name)
        return object()

    def program(member: LocalRank) -> object:
        return [member.together(threading.current_thread().name, act) for _ in range(5)]

    results = ranks.run(program)
    assert names == ["rank0"] * 5
    assert all(a is b is c for a, b, c in zip(*results, strict=True))


def test_backward_runs_in_the_ranks_own_threads(ranks: LocalRanks) -> None:
    class Meet(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor, member: LocalRank) -> torch.Tensor:
            ctx.member = member
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            return ctx.member.together(grad, sum), None

    def program(member: LocalRank) -> float:
        x = torch.ones((), requires_grad=True)
        (Meet.apply(x, member) * (member.rank + 1)).backward()
        return x.grad.item()

    assert ranks.run(program) == [6.0, 6.0, 6.0]


def test_what_a_run_left_serves_the_next(ranks: LocalRanks) -> None:
    members = ranks.run(lambda member: member)
    assert ranks.run(lambda member: members[member.rank].gather(member.rank))[1] == [0, 1, 2]


# --- failures ------------------------------------------------------------------------------------


def test_the_first_failure_is_reported_and_stops_the_others(ranks: LocalRanks) -> None:
    stopped = []

    def program(member: LocalRank) -> None:
        member.gather(None)
        if member.rank == 1:
            raise KeyError("the cause")
        try:
            member.gather(None)
        except CommTimeoutError as error:
            stopped.append(str(error))
            raise

    begin = time.monotonic()
    with pytest.raises(KeyError, match="the cause") as caught:
        ranks.run(program)
    assert time.monotonic() - begin < SLACK_S
    if hasattr(caught.value, "__notes__"):
        assert caught.value.__notes__ == ["(raised in virtual rank 1)"]
    assert len(stopped) == 2
    assert all("but rank 1 failed: KeyError: 'the cause'" in text for text in stopped)
    expect_working(ranks)


def test_what_is_raised_for_all_is_raised_in_all(ranks: LocalRanks) -> None:
    def act(items: list[int]) -> None:
        raise ValueError(f"got {items}")

    def program(member: LocalRank) -> str:
        with pytest.raises(ValueError, match=re.escape("got [0, 1, 2]")):
            member.together(member.rank, act)
        # They can go on together.
        return member.gather("on")[0]

    assert ranks.run(program) == ["on"] * 3


def test_ranks_in_different_calls_are_told(ranks: LocalRanks) -> None:
    def program(member: LocalRank) -> None:
        if member.rank == 0:
            member.together(1, sum)
        else:
            member.gather(1)

    with pytest.raises(DualPipeError, match="to meet for the same call, got sum, list, list"):
        ranks.run(program)
    expect_working(ranks)


def test_a_rank_that_returns_early_is_named_at_once(ranks: LocalRanks) -> None:
    begin = time.monotonic()
    wanted = r"expected virtual ranks \[2\] to meet it within 30 s, but ranks \[2\] have returned"
    with pytest.raises(CommTimeoutError, match=wanted):
        ranks.run(lambda member: member.rank == 2 or member.gather(None))
    assert time.monotonic() - begin < SLACK_S
    expect_working(ranks)


def test_skips_and_exits_come_out_too(ranks: LocalRanks) -> None:
    def program(member: LocalRank) -> None:
        if member.rank == 2:
            raise SystemExit(3)
        member.gather(None)

    with pytest.raises(SystemExit):
        ranks.run(program)
    expect_working(ranks)


# --- time-outs -----------------------------------------------------------------------------------


def test_a_rank_that_stays_away_is_named() -> None:
    ranks = LocalRanks(3, timeout_s=SHORT_S)
    free = threading.Event()

    def program(member: LocalRank) -> None:
        if member.rank == 1:
            assert free.wait(30)
        member.gather(None)

    begin = time.monotonic()
    wanted = r"expected virtual ranks \[1\] to meet it within 0.2 s, but nobody came"
    with pytest.raises(CommTimeoutError, match=wanted):
        ranks.run(program)
    # One time-out for the meeting, another for the rank that is left behind.
    assert time.monotonic() - begin < 2 * SHORT_S + SLACK_S
    # It wakes up in the middle of the next run, and must not take part in it.
    free.set()
    for _ in range(20):
        expect_working(ranks)


def test_no_meeting_after_a_time_out() -> None:
    """The rank that gave up has left its item behind: nobody may take it for a new one."""
    ranks = LocalRanks(2, timeout_s=SHORT_S)

    def program(member: LocalRank) -> None:
        if member.rank == 0:
            with pytest.raises(CommTimeoutError):
                member.gather("old")
        else:
            time.sleep(3 * SHORT_S)
        with pytest.raises(CommTimeoutError):
            member.gather("new")

    with pytest.raises(CommTimeoutError, match=r"expected virtual ranks \[1\]"):
        ranks.run(program)
    expect_working(ranks)


def test_a_run_that_does_not_end_is_left() -> None:
    free = threading.Event()
    begin = time.monotonic()
    for limits, running in (
        ({"timeout_s": SHORT_S}, r"ranks \[1\] still run"),
        ({"timeout_s": 30.0, "run_timeout_s": SHORT_S}, r"ranks \[1\] still run"),
    ):
        ranks = LocalRanks(2, **limits)
        with pytest.raises(CommTimeoutError, match=running):
            ranks.run(lambda member: member.rank == 0 or free.wait(30))
    assert time.monotonic() - begin < 2 * SHORT_S + SLACK_S
    free.set()


def test_no_thread_is_left_after_a_failure(ranks: LocalRanks) -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        ranks.run(lambda member: 1 // member.rank and member.gather(None))
    deadline = time.monotonic() + SLACK_S
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [0, -1, 2.0, True, "2"])
def test_bad_number_of_ranks(num_ranks: object) -> None:
    message = f"^expected num_ranks of at least 1, got {re.escape(repr(num_ranks))}$"
    with pytest.raises(ValueError, match=message):
        LocalRanks(num_ranks)


@pytest.mark.parametrize("name", ["timeout_s", "run_timeout_s"])
def test_bad_time_out(name: str) -> None:
    with pytest.raises(ValueError, match="expected timeout_s above 0"):
        LocalRanks(2, **{name: 0})


def test_a_meeting_outside_of_a_run(ranks: LocalRanks) -> None:
    (member, *_) = ranks.run(lambda member: member)
    with pytest.raises(ValueError, match="expected a call in a thread of this LocalRanks' run"):
        member.gather(None)
