"""What every rank checks of ``zero_copy=True``: values, and how long a slab stays taken.

Shapes: R ranks, T tokens of a rank, H hidden, K top-k, N token rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dualpipe_ext.ep import Buffer, Handle
from tests.ep.cases import KINDS, Case, make_case
from tests.ep.rank_checks import (
    combined,
    expect_equal,
    expect_same_tensor,
    received,
    scramble,
)
from tests.ep.ranks import MAX_TOKENS, Ranks

SLABS = 2


def zero_copy_equals_reference(ranks: Ranks) -> None:
    """Every kind of call; also where a slab was used before and is not clean."""
    for fp8, dtype in ((False, torch.bfloat16), (False, torch.float64), (True, torch.bfloat16)):
        hidden = 128 if fp8 else 24
        cases = [make_case(kind, ranks.num_ranks, dtype=dtype, hidden=hidden) for kind in KINDS]
        full = make_case("uneven", ranks.num_ranks, dtype=dtype, hidden=hidden, tokens=MAX_TOKENS)
        buffer = ranks.make_buffer(full, num_slabs=1)
        slab_rows = ranks.num_ranks * MAX_TOKENS
        for kind, case in zip(KINDS, cases, strict=True):
            for room in (None, 150, slab_rows, slab_rows + 100):
                if room is not None and room <= slab_rows:
                    # The one slab is full of rows of another call.
                    buffer.dispatch(*ranks.inputs(full), zero_copy=True, fp8=fp8)
                what = f"zero copy {kind} {dtype} fp8={fp8} room {room}"
                recv, handle = buffer.dispatch(
                    *ranks.inputs(case), zero_copy=True, fp8=fp8, max_recv_tokens=room
                )
                want = received(ranks, case, fp8=fp8, max_recv_tokens=room)
                expect_equal(recv, want[ranks.rank], what)
                if fp8:
                    continue
                y, _ = buffer.combine(recv.tokens, handle)
                want_y = combined(ranks, case, [r.tokens for r in want])
                expect_same_tensor(y, want_y[ranks.rank], f"{what} combine")


def slabs_come_and_go(ranks: Ranks) -> None:
    """A slab is taken while a tensor of its storage lives, and then used again; never overwritten.

    Where there are no slabs, only the values are checked.
    """
    flow = _Flow(ranks)
    # Not the outputs: their storages could lie where one that is gone was.
    slabs = flow.find_slabs()
    first, second = (flow.send(seed) for seed in (1, 2))
    flow.expect_on_slab(slabs, first, second)

    # Both taken: a third is copied, and others run meanwhile.
    third = flow.send(3)
    flow.expect_elsewhere(slabs, third)
    flow.other_calls()
    for seed, recv in ((1, first), (2, second), (3, third)):
        flow.expect_intact(seed, recv, "while other calls run")

    # A view keeps its slab, and dropping it frees that slab.
    view = first[1:, ::2]
    del first, third
    flow.expect_elsewhere(slabs, flow.send(4))
    want = flow.want(1)[1:, ::2]
    expect_same_tensor(view, want, "a view of a slab")
    del view
    again = flow.send(5)
    flow.expect_on_slab(slabs, again, second)

    # So does what autograd has saved.
    squares = again.square()
    del again
    flow.expect_elsewhere(slabs, flow.send(6))
    squares.sum().backward()
    del squares
    flow.expect_on_slab(slabs, flow.send(7), second)

    # Ranks may hold different numbers of them, whichever rank it is that a launch is made for.
    for holder in {0, ranks.num_ranks - 1}:
        held, want = flow.send(8), flow.want(8)
        if ranks.rank != holder:
            del held
        other = flow.send(9)
        flow.expect_intact(9, other, f"while rank {holder} holds one more")
        if ranks.rank == holder:
            flow.expect_elsewhere(slabs, other)
            expect_same_tensor(held, want, f"zero-copy output held by rank {holder} alone")
            del held
        else:
            flow.expect_on_slab(slabs, other, second)
        del other
    flow.expect_intact(2, second, "at the end")


def slabs_do_not_leak(ranks: Ranks) -> None:
    """50 calls with everything that follows a dispatch: the slabs are all there afterwards."""
    flow = _Flow(ranks)
    slabs = flow.find_slabs()
    cached: Handle | None = None
    for call in range(50):
        x = flow.x(call).requires_grad_(call % 2 == 0)
        if cached is None or call % 3:
            recv, cached = flow.buffer.dispatch(x, flow.idx, flow.weights, zero_copy=True)
        else:
            recv, _ = flow.buffer.dispatch(x, None, flow.weights, handle=cached)
        expect_same_tensor(recv.tokens, flow.want(call), f"call {call}")
        flow.expect_on_slab(slabs, recv.tokens)
        y, _ = flow.buffer.combine(torch.tanh(recv.tokens) * recv.tokens, cached)
        if call % 4 < 2:
            y.sum().backward()
        del recv, y
    flow.expect_on_slab(slabs, *(flow.send(seed) for seed in range(SLABS)))


class _Flow:
    """Dispatches of one routing with values that depend on a seed, and where their rows lie.

    Every rank receives rows, so that each output has an address.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.case = make_case("uneven", ranks.num_ranks, hidden=512, tokens=32, top_k=2)
        for idx in self.case.topk_idx:
            idx[:, 0] = torch.arange(32) % self.case.num_experts
        self.buffer: Buffer = ranks.make_buffer(self.case, num_slabs=SLABS)
        self.has_slabs = self.buffer._transport.capabilities.zero_copy
        _, self.idx, self.weights = ranks.inputs(self.case)

    def _x_of(self, rank: int, seed: int) -> Tensor:
        return scramble(self.case.xs[rank], 100 * seed + rank)

    def x(self, seed: int) -> Tensor:
        return self._x_of(self.ranks.rank, seed).to(self.ranks.device)

    def want(self, seed: int) -> Tensor:
        def case() -> Case:
            xs = [self._x_of(rank, seed) for rank in range(self.ranks.num_ranks)]
            return replace(self.case, xs=xs)

        return received(self.ranks, self.ranks.once(case))[self.ranks.rank].tokens

    def send(self, seed: int) -> Tensor:
        recv, _ = self.buffer.dispatch(self.x(seed), self.idx, self.weights, zero_copy=True)
        return recv.tokens

    def find_slabs(self) -> set[int]:
        """Addresses of this rank's slabs: where the rows are that took no memory to arrive."""
        if not self.has_slabs:
            return set()
        x = self.x(0)

        def send() -> list[Tensor]:
            outputs = []
            for _ in range(SLABS):
                recv, _ = self.buffer.dispatch(x, self.idx, self.weights, zero_copy=True)
                outputs.append(recv.tokens)
            return outputs

        send()
        outputs, grown = self.ranks.allocated_by(send)
        row_bytes = sum(t.nbytes for t in outputs)
        average = sum(self.ranks.gather(row_bytes)) / self.ranks.num_ranks
        assert grown < average / 2, f"{grown} bytes were allocated for rows of {average} in slabs"
        slabs = {t.untyped_storage().data_ptr() for t in outputs}
        assert len(slabs) == SLABS, "two outputs that are alive lie in the same slab"
        return slabs

    def expect_on_slab(self, slabs: set[int], *outputs: Tensor) -> None:
        where = {t.untyped_storage().data_ptr() for t in outputs}
        if self.has_slabs:
            assert where <= slabs, "rows were copied although a slab was free"
            assert len(where) == len(outputs), "two outputs that are alive lie in the same slab"

    def expect_elsewhere(self, slabs: set[int], output: Tensor) -> None:
        if self.has_slabs:
            assert output.untyped_storage().data_ptr() not in slabs, "a slab that is taken was used"

    def expect_intact(self, seed: int, output: Tensor, when: str) -> None:
        expect_same_tensor(output, self.want(seed), f"zero-copy output {seed} {when}")

    def other_calls(self) -> None:
        """Dispatches and combines of both layouts, cached ones among them, and a backward."""
        for seed, layout in ((20, "token"), (21, "expert"), (22, "token")):
            x = self.x(seed).requires_grad_()
            recv, handle = self.buffer.dispatch(x, self.idx, self.weights, layout=layout)
            y, _ = self.buffer.combine(recv.tokens, handle)
            y.sum().backward()
            self.buffer.dispatch(2 * x, handle=handle)
