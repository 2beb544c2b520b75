"""What every rank checks when one of them is late, stays away or dies.

The last rank is always the one at fault. A check of processes may end a rank; one of virtual ranks
can only delay what a rank sends, since all of them meet in every call.

Shapes: R ranks, T tokens of a rank.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dualpipe_ext.ep import Buffer, Handle, route_faults
from dualpipe_ext.errors import CommTimeoutError
from tests.ep.cases import Case, make_case
from tests.ep.rank_checks import LAYOUTS, raises, received, round_trip_equals_reference
from tests.ep.ranks import Ranks

ROOM = 200
SHORT_S = 0.5
VIRTUAL_SHORT_S = 0.2
DELAY_US = 1e6


def late_rank(ranks: Ranks) -> str | None:
    """The last rank stays away until the others have given up; the group is of no use then."""
    case = make_case("uneven", ranks.num_ranks)
    buffer = ranks.make_buffer(case, timeout_s=SHORT_S)
    x, idx, _ = ranks.inputs(case)
    buffer.dispatch(x, idx)
    message = None if ranks.last else raises(CommTimeoutError, buffer.dispatch, x, idx)
    ranks.barrier()
    return message


def _calls(ranks: Ranks, buffer: Buffer, case: Case) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every kind of call, each made ready only when it is its turn."""
    x, idx, weights = ranks.inputs(case)
    yield "dispatch", lambda: buffer.dispatch(x, idx, weights)
    yield "fixed dispatch", lambda: buffer.dispatch(x, idx, weights, max_recv_tokens=ROOM)
    for layout in ("token", "expert"):
        recv, handle = buffer.dispatch(x, idx, weights, layout=layout)
        yield f"{layout} cached dispatch", lambda handle=handle: buffer.dispatch(x, handle=handle)
        recv, handle = buffer.dispatch(x, idx, weights, layout=layout)
        yield (
            f"{layout} combine",
            lambda rows=recv.tokens, handle=handle: buffer.combine(rows, handle),
        )


def _time_out(buffer: Buffer, call: Callable[[], Any]) -> str | None:
    """Make a call and wait for it; the message of its time-out, whoever raises it, or None."""
    try:
        call()
        torch.cuda.synchronize()
        buffer.check()
    except CommTimeoutError as error:
        return str(error)
    return None


def _expect_named(ranks: Ranks, message: str | None, timeout_s: float, what: str) -> None:
    late = ranks.num_ranks - 1
    wanted = rf"rank {ranks.rank} waited {timeout_s:g} s for rank {late} in phase [a-z]"
    assert message is not None, f"{what}: no time-out at rank {ranks.rank}"
    assert re.match(wanted, message), f"{what}: {message}"


def _works_again(ranks: Ranks, buffer: Buffer, case: Case, what: str) -> None:
    ones = torch.ones(3, device=ranks.device)
    assert ones.sum().item() == 3, f"{what}: the device still works"
    # Nobody is in a call any more.
    ranks.synchronize()
    buffer.reset()
    buffer.check()
    for how in LAYOUTS:
        round_trip_equals_reference(ranks, buffer, case, how, f"after a reset, {what} {how}")


def absent_rank_then_reset(ranks: Ranks) -> None:
    """The last rank leaves out a call of each kind; after a reset everything works."""
    case = make_case("uneven", ranks.num_ranks, tokens=6)
    buffer = ranks.make_buffer(case, timeout_s=SHORT_S)
    for what, call in _calls(ranks, buffer, case):
        ranks.synchronize()
        if not ranks.last:
            begin = time.monotonic()
            message = _time_out(buffer, call)
            seconds = time.monotonic() - begin
            _expect_named(ranks, message, SHORT_S, what)
            assert seconds < SHORT_S + 1, f"{what}: gave up after {seconds:.2f} s"
            # Until the reset every call is refused, with the same words.
            assert _time_out(buffer, call) == message, what
        _works_again(ranks, buffer, case, what)


def slow_sender_then_reset(ranks: Ranks) -> None:
    """Virtual ranks: what the last one sends leaves after the others have given up."""
    case = make_case("uneven", ranks.num_ranks, tokens=6)
    buffer = ranks.make_buffer(case, timeout_s=VIRTUAL_SHORT_S)
    x, idx, weights = ranks.inputs(case)
    ready = {
        layout: buffer.dispatch(x, idx, weights, layout=layout, max_recv_tokens=ROOM)
        for layout in ("token", "expert")
    }
    # Only calls that wait for nothing on the host: a rank that raises inside of a call would leave
    # the others waiting for it at their next meeting.
    calls: dict[str, Callable[[], Any]] = {
        "dispatch": lambda: buffer.dispatch(x, idx, weights, max_recv_tokens=ROOM),
    }
    for layout, (recv, handle) in ready.items():
        calls[f"{layout} cached dispatch"] = lambda handle=handle: buffer.dispatch(x, handle=handle)
        calls[f"{layout} combine"] = lambda recv=recv, handle=handle: buffer.combine(
            recv.tokens, handle
        )
    for what, call in calls.items():
        ranks.synchronize()
        ranks.delay(buffer, DELAY_US if ranks.last else 0.0)
        call()
        ranks.synchronize()
        ranks.delay(buffer, 0.0)
        try:
            buffer.check()
            message = None
        except CommTimeoutError as error:
            message = str(error)
        ranks.barrier()
        if buffer.transport == "copy_engine" and what != "dispatch":
            # One launch packs for all virtual ranks, and the copies of all come after it: nobody
            # waits while one of them is late, unless all have to begin together.
            if message is not None:
                assert buffer._transport.begin_together, f"{what}: {message}"
                assert ranks.last or f"for rank {ranks.num_ranks - 1} " in message, what
        elif not ranks.last:
            _expect_named(ranks, message, VIRTUAL_SHORT_S, what)
        elif message is not None:
            assert f"for rank {ranks.rank} " not in message, f"{what}: {message}"
        _works_again(ranks, buffer, case, what)


def other_calls_are_refused_everywhere(ranks: Ranks) -> None:
    """The last rank sends other rows, no weights, or makes another call; a reset helps.

    Otherwise bytes that were never sent would be taken for a row, or waited for.
    """
    case = make_case("uneven", ranks.num_ranks, tokens=6, hidden=128, dtype=torch.bfloat16)
    buffer = ranks.make_buffer(case, timeout_s=10.0)
    x, idx, weights = ranks.inputs(case)
    others: dict[str, Callable[[Handle], object]] = {
        "FP8": lambda handle: buffer.dispatch(x, topk_weights=weights, handle=handle, fp8=True),
        "no weights": lambda handle: buffer.dispatch(x, handle=handle),
        "a combine": lambda handle: buffer.combine(x.new_zeros(handle.num_rows, 128), handle),
    }
    for what, other in others.items():
        _, handle = buffer.dispatch(x, idx, weights)
        ranks.synchronize()
        begin = time.monotonic()
        if ranks.last:
            other(handle)
        else:
            buffer.dispatch(x, topk_weights=weights, handle=handle)
        torch.cuda.synchronize()
        assert time.monotonic() - begin < 5, f"{what}: found by its time-out"
        message = raises(ValueError, buffer.check)
        assert message.startswith("expected the same call, dtype, fp8 and weights on all"), message
        last = ranks.num_ranks - 1
        assert f"at rank {ranks.rank}" in message, f"{what}: {message}"
        assert ranks.last or f"at rank {last}" in message, f"{what}: {message}"
        assert raises(ValueError, buffer.dispatch, x, idx, weights) == message, what
        _works_again(ranks, buffer, case, what)


def faults_are_told_at_the_same_call(ranks: Ranks) -> None:
    """Outputs of fixed size, of which one has no room: hosts are ahead of their GPUs by more or
    less, and no rank leaves out a call that another has made."""
    case = make_case("uneven", ranks.num_ranks, tokens=6)
    buffer = ranks.make_buffer(case, timeout_s=10.0)
    x, idx, weights = ranks.inputs(case)
    needed = len(received(ranks, case)[-1].tokens)
    tight = needed - 1 if ranks.last else ROOM
    wanted = f"expected at most max_recv_tokens={needed - 1} rows at rank {ranks.num_ranks - 1}, "

    def call_that_raises(first_room: int, others: int = ROOM) -> tuple[int, str] | None:
        for call in range(3 * route_faults.PERIOD):
            room = first_room if call == 0 else others
            try:
                buffer.dispatch(x, idx, weights, max_recv_tokens=room)
            except ValueError as error:
                return call, str(error)
            if ranks.rank % 2:
                # This host has its GPU's report before the next call; others are ahead of theirs.
                torch.cuda.synchronize()
        return None

    for has_room, rooms in (
        (False, (tight, ROOM)),
        (True, (ROOM, ROOM)),
        (False, (tight, ROOM)),
        # Of what some GPUs have reported by then and others not, nobody tells.
        (False, (tight, tight)),
        (False, (tight, tight)),
    ):
        told = call_that_raises(*rooms)
        assert ranks.gather(told) == [told] * ranks.num_ranks
        assert (told is None) == has_room
        if told is not None:
            call, message = told
            assert message.startswith(wanted), message
            assert route_faults.PERIOD < call <= 2 * route_faults.PERIOD
    # A call whose host waits has nothing before it that could still be told.
    buffer.dispatch(x, idx, weights, max_recv_tokens=tight)
    assert raises(ValueError, buffer.dispatch, x, idx, weights).startswith(wanted)
    buffer.dispatch(x, idx, weights)
    ranks.synchronize()
    buffer.check()


def stalled_rank(ranks: Ranks) -> None:
    """A rank that is late by less than the time-out: everyone waits, nothing is raised."""
    case = make_case("uneven", ranks.num_ranks, tokens=6)
    buffer = ranks.make_buffer(case, timeout_s=10.0)
    x, idx, weights = ranks.inputs(case)
    late_us = 0.3e6 if ranks.last else 0.0
    for how in LAYOUTS:
        ranks.delay(buffer, late_us)
        if ranks.last and not ranks.virtual:
            time.sleep(0.3)
        recv, handle = buffer.dispatch(x, idx, weights, max_recv_tokens=ROOM, **how)
        ranks.delay(buffer, late_us)
        buffer.combine(recv.tokens, handle)
        ranks.synchronize()
        buffer.check()
        ranks.delay(buffer, 0.0)
        round_trip_equals_reference(ranks, buffer, case, how, f"after a stall {how}")


def killed_rank(ranks: Ranks, folder: Path) -> None:
    """The last process is killed; the others write what they saw to ``folder``."""
    case = make_case("uneven", ranks.num_ranks, tokens=6)
    buffer = ranks.make_buffer(case, timeout_s=SHORT_S)
    x, idx, weights = ranks.inputs(case)
    buffer.dispatch(x, idx, weights)
    # The launcher asks the others to stop as soon as it sees one dead; they have a few seconds.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ranks.synchronize()
    if ranks.last:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        message = _time_out(buffer, lambda: buffer.dispatch(x, idx, weights))
        seconds = time.monotonic() - begin
        _expect_named(ranks, message, SHORT_S, "a killed rank")
        assert seconds < SHORT_S + 1, f"gave up after {seconds:.2f} s"
        assert torch.ones(3, device=ranks.device).sum().item() == 3, "the device still works"
        verdict = "ok"
    except BaseException as error:
        verdict = repr(error)
    (folder / f"rank {ranks.rank}").write_text(verdict)
    # As the launcher wanted it: who ends in another way would be taken for the cause.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
