"""The plain push kernel on one GPU: what arrives at virtual ranks, bit for bit, and nothing else.

Shapes: R ranks, T tokens of a rank, B bytes of a row.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dualpipe_ext import core
from dualpipe_ext.bench.ep_push import shapes, slots

TOP_K, NUM_LOCAL = 3, 2
UNTOUCHED = 0xA5


class PushedRanks:
    """R ranks' memory on the current GPU, random rows, and what should arrive."""

    def __init__(self, num_ranks: int, num_tokens: int, row_bytes: int, masked: bool = True):
        self.c = core.module()
        self.num_ranks, self.num_tokens = num_ranks, num_tokens
        room = max(num_ranks * num_tokens, 1)
        self.layout = self.c.PushLayout(num_rows=room, row_bytes=row_bytes)
        self.memory = [
            torch.zeros(self.layout.bytes, dtype=torch.uint8, device="cuda")
            for _ in range(num_ranks)
        ]
        bases = [memory.data_ptr() for memory in self.memory]
        self.table = self.c.PeerTable(bases, bytes=self.layout.bytes)
        gen = torch.Generator("cuda").manual_seed(num_tokens)
        drawn = {"device": "cuda", "generator": gen}
        size = (num_ranks, num_tokens, self.layout.row_pitch)
        self.x = torch.randint(256, size, dtype=torch.uint8, **drawn)
        scores = torch.rand(num_ranks * num_tokens, num_ranks * NUM_LOCAL, **drawn)
        self.idx = scores.topk(min(TOP_K, scores.shape[1]), dim=1).indices
        if masked:
            self.idx[::3, 1:] = -1
            self.idx[::7] = -1
        self.slots = slots(self.idx, num_ranks, NUM_LOCAL)

    def rows(self, rank: int) -> Tensor:
        """uint8 [R * T, pitch], what lies in a rank's memory behind its state."""
        return self.memory[rank][self.layout.rows_offset :].view(-1, self.layout.row_pitch)

    def state(self, rank: int) -> Tensor:
        return self.memory[rank][: self.layout.rows_offset]

    def args(self, rank: int, **change: object) -> object:
        first = rank * self.num_tokens
        # Kept: the kernel only has their addresses.
        self.own_slots = getattr(self, "own_slots", {})
        own = self.slots[first : first + self.num_tokens].contiguous()
        self.own_slots[rank] = own
        given = {"ctas": 4, "warps": 4, "piece_bytes": self.layout.row_bytes}
        return self.c.PushArgs(
            self.table,
            self.layout,
            rank=rank,
            x=self.x[rank].data_ptr(),
            num_tokens=self.num_tokens,
            slots=own.data_ptr(),
            **given | change,
        )

    def push(self, **change: object) -> None:
        for rank in range(self.num_ranks):
            self.c.push(self.args(rank, **change), torch.cuda.current_stream().cuda_stream)

    def clear(self) -> None:
        for rank in range(self.num_ranks):
            self.rows(rank).fill_(UNTOUCHED)

    def check(self) -> None:
        """Rows of the others are at their places; everything else is as it was."""
        torch.cuda.synchronize()
        size = self.layout.row_bytes
        source = self.x.view(-1, self.layout.row_pitch)
        for rank in range(self.num_ranks):
            want = torch.full_like(self.rows(rank), UNTOUCHED)
            places = self.slots[:, rank].clone()
            places[rank * self.num_tokens : (rank + 1) * self.num_tokens] = -1
            goes = places >= 0
            want[places[goes].long(), :size] = source[goes, :size]
            assert torch.equal(self.rows(rank), want), f"rank {rank}"
            # The queue is full again.
            assert not self.state(rank).any(), f"rank {rank}"


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
@pytest.mark.parametrize("row_bytes", [14336, 7392])
def test_rows_of_a_model(num_ranks: int, row_bytes: int) -> None:
    ranks = PushedRanks(num_ranks, 301, row_bytes)
    for warps, piece in shapes(row_bytes, num_ranks, ranks.c.push_stages):
        for ctas in (1, 8, 132):
            ranks.clear()
            ranks.push(ctas=ctas, warps=warps, piece_bytes=piece)
            ranks.check()


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_few_tokens(num_tokens: int) -> None:
    ranks = PushedRanks(3, num_tokens, 144, masked=False)
    ranks.clear()
    ranks.push(ctas=16, warps=8)
    ranks.check()


@pytest.mark.parametrize("row_bytes", [16, 144, 14352, 50000])
def test_rows_of_any_size(row_bytes: int) -> None:
    ranks = PushedRanks(2, 77, row_bytes)
    # Pieces that end with the row, and pieces that do not.
    for piece in (16, 4096, 14336):
        ranks.clear()
        ranks.push(warps=4, piece_bytes=piece)
        ranks.check()


def test_more_ranks_than_a_warp_has_lanes() -> None:
    ranks = PushedRanks(64, 9, 256)
    ranks.clear()
    ranks.push()
    ranks.check()


def test_nothing_to_send() -> None:
    ranks = PushedRanks(2, 40, 256)
    ranks.slots.fill_(-1)
    ranks.clear()
    ranks.push()
    ranks.check()


def test_a_thousand_pushes_in_a_row() -> None:
    # A queue that is not full again would leave tokens out.
    ranks = PushedRanks(2, 50, 1024)
    for _ in range(20):
        ranks.clear()
        for _ in range(50):
            ranks.push(ctas=7, warps=8)
        ranks.check()


def test_replays_from_a_graph() -> None:
    ranks = PushedRanks(2, 60, 2048)
    ranks.push()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ranks.push()
    for _ in range(3):
        ranks.clear()
        graph.replay()
        ranks.check()


def test_places_without_room_are_left_out() -> None:
    ranks = PushedRanks(2, 10, 256, masked=False)
    wanted = ranks.slots.clone()
    ranks.slots[2] = 20  # one more than there is room for
    ranks.slots[3] = 2**31 - 1
    ranks.slots[4] = -7
    ranks.clear()
    ranks.push()
    # What is checked: as if these three went nowhere.
    wanted[2:5] = -1
    ranks.slots = wanted
    ranks.check()
