"""What every rank checks over many calls, and at awkward sizes.

Shapes: R ranks, T tokens of a rank, H hidden, E experts, K top-k, C calls of a round.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dualpipe_ext.ep import Buffer, Handle
from tests.ep.cases import KINDS, make_case
from tests.ep.expected import Routes, Rows, rank_sum, rows_at
from tests.ep.rank_checks import (
    LAYOUTS,
    combined,
    expect_equal,
    expect_same_tensor,
    received,
    round_trip_equals_reference,
)
from tests.ep.ranks import Ranks, has_kernels


def many_calls(ranks: Ranks, num_calls: int = 200) -> None:
    """Changing routing, several handles alive, used again and out of order, one rank late."""
    rank = ranks.rank
    buffer = ranks.make_buffer(make_case(KINDS[0], ranks.num_ranks))
    alive: list = []
    for call in range(num_calls):
        case = make_case(KINDS[call % len(KINDS)], ranks.num_ranks, seed=call)
        how = LAYOUTS[call % len(LAYOUTS)]
        late = call % 20 == 7 and rank == call % ranks.num_ranks
        ranks.delay(buffer, 5000.0 if late else 0.0)
        x, idx, weights = ranks.inputs(case)
        recv, handle = buffer.dispatch(x, idx, weights, **how)
        want = received(ranks, case, **how)
        expect_equal(recv, want[rank], f"call {call} {how}")
        alive.append((call, case, handle, recv.tokens, how, [r.tokens for r in want]))
        if len(alive) == 5:
            # An older handle first, twice; then it goes.
            first, old_case, old_handle, old_tokens, old_how, rows = alive.pop(call % 5)
            what = f"handle of call {first} at call {call} {old_how}"
            again, _ = buffer.dispatch(2 * ranks.inputs(old_case)[0], handle=old_handle)
            expect_same_tensor(again.tokens, 2 * old_tokens, what)
            want_y = combined(ranks, old_case, rows, **old_how)
            for _ in range(2):
                y, _ = buffer.combine(old_tokens, old_handle)
                expect_same_tensor(y, want_y[rank], f"{what} combine")


def calls_in_a_row_with_delays(ranks: Ranks) -> None:
    """Nobody waits on the host; a rank is late with what it sends, or with what it takes in."""
    factors = (1, 2, 4, 8)  # exact, sums too
    case = make_case("uneven", ranks.num_ranks, tokens=60)
    buffer = ranks.make_buffer(case)
    x, idx, weights = ranks.inputs(case)
    lates = [(rank, delays) for rank in (0, ranks.num_ranks - 1) for delays in ((300, 0), (0, 300))]
    for how in LAYOUTS:
        recv, handle = buffer.dispatch(x, idx, weights, **how)
        want = received(ranks, case, **how)
        expect_equal(recv, want[ranks.rank], f"{how}")
        want_y = combined(ranks, case, [r.tokens for r in want], **how)[ranks.rank]
        for late, delays in lates:
            ranks.delay(buffer, *(delays if ranks.rank == late else (0, 0)))
            results = []
            for factor in factors:
                again, _ = buffer.dispatch(factor * x, handle=handle)
                results.append((again.tokens, buffer.combine(again.tokens, handle)[0]))
            for factor, (tokens, y) in zip(factors, results, strict=True):
                what = f"{how} rank {late} late by {delays} us, times {factor}"
                expect_same_tensor(tokens, factor * recv.tokens, what)
                expect_same_tensor(y, factor * want_y, f"{what}: combine")
        ranks.delay(buffer, 0)


def two_buffers_on_two_streams(ranks: Ranks) -> None:
    """Kernels of two buffers, each on nearly half of the SMs, that ranks launch in other orders:
    whichever waits for its peer leaves room for the other."""
    case = make_case("uneven", ranks.num_ranks, hidden=1024, dtype=torch.bfloat16, tokens=60)
    x, idx, weights = ranks.inputs(case)
    buffers = [ranks.make_buffer(case, num_sms=64, timeout_s=5.0) for _ in range(2)]
    handles = [buffer.dispatch(x, idx, weights)[1] for buffer in buffers]
    streams = [torch.cuda.Stream() for _ in buffers]

    def run(order: tuple[int, ...]) -> list[Tensor]:
        results = []
        ranks.synchronize()
        for place, i in enumerate(order):  # until the host is far ahead, and one after the other
            with torch.cuda.stream(streams[i]):
                torch.cuda._sleep(50_000_000 + 20_000_000 * place)
        for _ in range(30):
            for i in order:
                with torch.cuda.stream(streams[i]):
                    recv, _ = buffers[i].dispatch(x, topk_weights=weights, handle=handles[i])
                    results.append(buffers[i].combine(recv.tokens, handles[i])[0].detach())
        torch.cuda.synchronize()
        for buffer in buffers:
            buffer.check()
        return results

    # In one order first: an allocation may wait for the GPU, and with it for the other rank's host.
    (want, *_) = run((0, 1))
    for y in run((0, 1) if ranks.rank % 2 == 0 else (1, 0)):
        expect_same_tensor(y, want, "in orders of their own")


@dataclass(frozen=True)
class Size:
    """One awkward size; ``name`` says what is awkward about it."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    hidden: int = 64
    experts_per_rank: int = 3
    top_k: int = 3
    max_tokens: int = 7
    kind: str = "uneven"
    tokens: int | None = None
    buffer: dict[str, Any] = field(default_factory=dict)
    kernels_only: bool = False
    """Awkward for the GPU transports alone, and slow to check."""


SIZES = (
    Size("rows of 16 bytes", hidden=8),
    Size("rows of 48 bytes", hidden=24),
    Size("rows of 32 KiB", torch.float32, hidden=8192, tokens=3),
    Size("rows of 128 KiB", torch.float64, hidden=16384, tokens=2),
    Size("one choice", top_k=1),
    Size("32 choices", top_k=32, experts_per_rank=17, max_tokens=20),
    Size("one expert per rank", experts_per_rank=1, top_k=2),
    Size("no room for tokens", kind="all_empty", buffer={"max_tokens": 0}),
    Size("one token per rank", tokens=1, buffer={"max_tokens": 1}),
    Size("every rank full", tokens=13, buffer={"max_tokens": 13}),
    Size("every rank full, one expert", kind="one_expert", tokens=33, buffer={"max_tokens": 33}),
    Size("many tokens", tokens=150, top_k=2, buffer={"max_tokens": 151}),
    Size(
        "routed in parts",
        hidden=8,
        tokens=1100,
        top_k=9,
        experts_per_rank=8,
        buffer={"max_tokens": 1100},
        kernels_only=True,
    ),
)


def sizes(ranks: Ranks) -> None:
    many = Size("1024 experts", top_k=8, experts_per_rank=1024 // ranks.num_ranks, tokens=16)
    for size in (*SIZES, many):
        case = make_case(
            size.kind,
            ranks.num_ranks,
            dtype=size.dtype,
            hidden=size.hidden,
            experts_per_rank=size.experts_per_rank,
            top_k=size.top_k,
            max_tokens=size.max_tokens,
            tokens=size.tokens,
        )
        buffer = ranks.make_buffer(case, **size.buffer)
        if size.kernels_only and not has_kernels(buffer):
            continue
        for how in LAYOUTS:
            round_trip_equals_reference(ranks, buffer, case, how, f"{size.name} {how}")


# --- thousands of calls --------------------------------------------------------------------------

ROUND = 100  # calls that are prepared at once and judged at once
TOKENS = 40
PER_RANK = 4
TOP_K = 4
ALIGNMENT = 8
ROW_KINDS = ((64, torch.bfloat16), (200, torch.float16), (512, torch.float32))
POOL = 509
# Largest value of a row: R * (R + 1) / 2 * 2 * K times it stays an integer that float32 holds, and
# K * 2 * R times it one that bfloat16 holds, as far as R = 8.
LARGEST = 3
FIELDS = ("tokens", "ids or offsets", "weights", "counts", "number of rows", "combine", "cached")


@torch.no_grad()
def thousands_of_calls(ranks: Ranks, num_calls: int = 10_000) -> None:
    """Routing, token numbers, layouts and row sizes change from call to call; ranks are late.

    The values are small integers, so that sums are exact in any order; which rows they are, the
    device compares, and the host looks at the verdict once a round.
    """
    buffers = [_Traffic.buffer(ranks, hidden, dtype) for hidden, dtype in ROW_KINDS]
    for first in range(0, num_calls, ROUND):
        traffic = _Traffic(ranks, buffers, first)
        for call in range(min(ROUND, num_calls - first)):
            traffic.call(call)
        ranks.synchronize()
        for buffer in buffers:
            buffer.check()
        wrong = traffic.wrong.nonzero().tolist()
        told = [f"call {first + call}: {FIELDS[at]}" for call, at in wrong]
        assert not wrong, f"{len(wrong)} are wrong at rank {ranks.rank}: {told[:10]}"


def hundreds_of_calls(ranks: Ranks) -> None:
    thousands_of_calls(ranks, 2 * ROUND)


class _Traffic:
    """One round: the inputs of all ranks, known to each, and what must come of them."""

    def __init__(self, ranks: Ranks, buffers: list[Buffer], first: int) -> None:
        self.ranks = ranks
        self.buffers = buffers
        self.random = random.Random(first)
        gen = torch.Generator().manual_seed(first)
        num_ranks = ranks.num_ranks
        shape = (ROUND, num_ranks, TOKENS, TOP_K)
        num_tokens = torch.randint(0, TOKENS + 1, shape[:2], generator=gen)
        num_tokens[torch.rand(num_tokens.shape, generator=gen) < 0.1] = 0
        num_tokens[torch.rand(ROUND, generator=gen) < 0.05] = 0
        idx = torch.randint(-1, num_ranks * PER_RANK, shape, generator=gen)
        idx[torch.arange(TOKENS) >= num_tokens.unsqueeze(2)] = -1
        weights = torch.randint(1, 3, shape, generator=gen).float()
        self.num_tokens = num_tokens.tolist()
        self.routes = Routes(num_ranks * PER_RANK, idx.to(ranks.device), weights.to(ranks.device))
        self.room = {"token": num_ranks * TOKENS, "expert": num_ranks * TOKENS * TOP_K + 64}
        self.rows: dict[tuple[str, int], Rows] = {}
        self.sums: dict[str, Tensor] = {}
        for layout, alignment in (("token", 1), ("expert", 1), ("expert", ALIGNMENT)):
            self.rows[layout, alignment] = rows_at(
                self.routes, ranks.rank, layout, alignment, self.room[layout]
            )
            self.sums[layout] = rank_sum(self.routes, ranks.rank, layout)
        self.pools = [_pool(hidden, dtype, ranks.device) for hidden, dtype in ROW_KINDS]
        self.wrong = torch.zeros(ROUND, len(FIELDS), dtype=torch.bool, device=ranks.device)
        self.kept: tuple[int, int, str, int, Handle] | None = None
        self.first = first

    @staticmethod
    def buffer(ranks: Ranks, hidden: int, dtype: torch.dtype) -> Buffer:
        case = make_case(
            "uneven", ranks.num_ranks, hidden=hidden, dtype=dtype,
            experts_per_rank=PER_RANK, top_k=TOP_K,
        )  # fmt: skip
        return ranks.make_buffer(case, max_tokens=TOKENS, num_slabs=2)

    def call(self, call: int) -> None:
        # The same draws on every rank.
        which = self.random.randrange(len(ROW_KINDS))
        layout, alignment = self.random.choice(list(self.rows))
        static, zero_copy, use_kept = (self.random.random() < p for p in (0.5, 0.3, 0.3))
        late = self.random.randrange(self.ranks.num_ranks)
        send_us, receive_us = 20 * self.random.random(), 20 * self.random.random()
        buffer, rank = self.buffers[which], self.ranks.rank
        if has_kernels(buffer):
            # A round in four without delays: some races need ranks that are equally fast.
            is_late = rank == late and self.first // ROUND % 4
            self.ranks.delay(buffer, *((send_us, receive_us) if is_late else (0.0, 0.0)))

        num_tokens = self.num_tokens[call][rank]
        recv, handle = buffer.dispatch(
            self._x(which, call, rank, num_tokens),
            self.routes.topk_idx[call, rank, :num_tokens],
            self.routes.topk_weights[call, rank, :num_tokens],
            layout=layout,
            alignment=alignment,
            max_recv_tokens=self.room[layout] if static else None,
            zero_copy=zero_copy and layout == "token",
        )
        want = self.rows[layout, alignment]
        num_rows = len(recv.tokens)
        if not static:
            self._judge(call, 4, want.num_rows[call] != num_rows)
        ids = recv.topk_idx if layout == "token" else recv.offsets
        want_ids = want.topk_idx[call, :num_rows] if layout == "token" else want.offsets[call]
        got_weights = recv.topk_weights if layout == "token" else recv.weights
        self._judge(call, 0, recv.tokens != self._rows(which, call, want, call, num_rows))
        self._judge(call, 1, ids != want_ids)
        self._judge(call, 2, got_weights != want.weights[call, :num_rows])
        self._judge(call, 3, recv.counts != want.counts[call])
        self._combine(call, 5, which, layout, call, handle, recv.tokens, got_weights, call)

        if use_kept and self.kept is not None:
            # An older handle, with this call's values.
            old, old_which, old_layout, old_alignment, old_handle = self.kept
            x = self._x(old_which, call, rank, old_handle.num_tokens)
            weights = self.routes.topk_weights[old, rank, : old_handle.num_tokens]
            again, _ = self.buffers[old_which].dispatch(x, None, weights, handle=old_handle)
            want = self.rows[old_layout, old_alignment]
            rows = self._rows(old_which, call, want, old, len(again.tokens))
            self._judge(call, 6, again.tokens != rows)
            factors = again.topk_weights if old_layout == "token" else again.weights
            self._combine(
                call, 6, old_which, old_layout, old, old_handle, again.tokens, factors, call
            )
        if self.random.random() < 0.2:
            self.kept = (call, which, layout, alignment, handle)

    def _combine(
        self,
        call: int,
        at: int,
        which: int,
        layout: str,
        route: int,
        handle: Handle,
        rows: Tensor,
        weights: Tensor,
        values: int,
    ) -> None:
        rank, buffer = self.ranks.rank, self.buffers[which]
        weights = weights if layout == "expert" else None
        y, _ = buffer.combine(rows * (rank + 1), handle, weights=weights)
        x = self._x(which, values, rank, handle.num_tokens)
        factors = self.sums[layout][route, : handle.num_tokens].unsqueeze(1)
        self._judge(call, at, y != (x.float() * factors).to(y.dtype))

    def _start(self, call: int, rank: int) -> int:
        return ((self.first + call) * 131 + rank * 41) % POOL

    def _x(self, which: int, call: int, rank: int, num_tokens: int) -> Tensor:
        start = self._start(call, rank)
        return self.pools[which][start : start + num_tokens]

    def _rows(self, which: int, call: int, want: Rows, route: int, num_rows: int) -> Tensor:
        """The rows of a route with the values of a call."""
        source = want.source[route, :num_rows]
        # Sources count TOKENS per rank, the pool starts of ranks are 41 apart.
        place = (self._start(call, 0) + source // TOKENS * 41) % POOL + source % TOKENS
        return self.pools[which][torch.where(source < 0, len(self.pools[which]) - 1, place)]

    def _judge(self, call: int, at: int, differs: Tensor) -> None:
        self.wrong[call, at] |= differs.any()


def _pool(hidden: int, dtype: torch.dtype, device: str) -> Tensor:
    """[POOL + TOKENS + 1, H]: rows from any start below POOL, and a last row of zeros."""
    gen = torch.Generator().manual_seed(hidden)
    shape = (POOL + TOKENS, hidden)
    rows = torch.randint(-LARGEST, LARGEST + 1, shape, generator=gen)
    return torch.cat([rows, torch.zeros(1, hidden)]).to(device=device, dtype=dtype)
