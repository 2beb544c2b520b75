"""Migration over NVLink: rows go from where they are straight into the peers' spare memory.

Here belongs the carrier that uses peer memory. A plain copy into a peer's memory is done by a copy
engine: no SM is taken from the training that goes on meanwhile, and nothing is packed.

Order, without a flag on the device: the copies into a peer's staging begin after that peer has
agreed to the wave, which it does when its own reads of an earlier wave are over (the caller waits
for that before it agrees). This rank confirms when its copies are complete, and nobody reads before
all have confirmed.

Shapes: S slots in all, R ranks; rank r holds slots from ``r * S / R``. Tensors are [S/R, ...].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dualpipe_ext.eplb.exchange import as_integers, message_bytes, sections
from dualpipe_ext.eplb.move_plan import Move, RankMoves
from dualpipe_ext.eplb.transfer import Deliver
from dualpipe_ext.timeouts import wait_for_event


class PeerStaging:
    """A :class:`~dualpipe_ext.eplb.transfer.Carrier` over memory that all ranks can write.

    A rank's staging memory holds the messages for it by layer and then by source rank. All ranks
    know all moves, so all know where every message lies.

    Args:
        staging: [R] every rank's staging memory as seen from here, uint8 of equal size.
        rank: this rank.
        keep: what must live as long as ``staging`` is used.
    """

    def __init__(self, staging: Sequence[Tensor], rank: int, keep: object = None) -> None:
        self._staging, self._rank, self._keep = staging, rank, keep
        self._used = [0] * len(staging)

    def begin(self) -> None:
        """All staging memory is free again."""
        self._used = [0] * len(self._staging)

    def stage(self, tensors: Sequence[Tensor], moves: Sequence[Move], mine: RankMoves) -> Deliver:
        """Find every message its place; raises ``ValueError`` if there is none left."""
        place = self._places(tensors, moves)
        arriving = {
            source: self._message(tensors, self._rank, place[source, self._rank], len(rows))
            for source, rows in mine.targets.items()
            if source != self._rank
        }
        # (row here, the same row in a peer's staging memory)
        copies: list[tuple[Tensor, Tensor]] = []
        for peer, rows in sorted(mine.leaving.items()):
            message = self._message(tensors, peer, place[self._rank, peer], len(rows))
            for tensor, section in zip(tensors, sections(message, tensors, len(rows)), strict=True):
                source, there = as_integers(tensor), as_integers(section)
                copies += [(source[row], there[i]) for i, row in enumerate(rows)]

        def deliver(timeout_s: float) -> dict[int, Tensor]:
            for source, there in copies:
                there.copy_(source)
            if tensors[0].is_cuda:
                self._wait(timeout_s, sorted(mine.leaving))
            return arriving

        return deliver

    def _places(
        self, tensors: Sequence[Tensor], moves: Sequence[Move]
    ) -> dict[tuple[int, int], int]:
        """(source rank, destination rank) -> offset of the message in the destination's memory."""
        per_rank = len(tensors[0])
        rows: dict[tuple[int, int], int] = {}
        for move in moves:
            way = move.src_slot // per_rank, move.dst_slots[0] // per_rank
            if way[0] != way[1]:
                rows[way] = rows.get(way, 0) + 1
        place = {}
        for way in sorted(rows):
            destination = way[1]
            place[way] = self._used[destination]
            self._used[destination] += message_bytes(tensors, rows[way])
        size = self._staging[0].numel()
        if max(self._used) > size:
            raise ValueError(
                f"expected at least {max(self._used)} bytes of staging memory, got {size}"
            )
        return place

    def _message(self, tensors: Sequence[Tensor], rank: int, start: int, num_rows: int) -> Tensor:
        return self._staging[rank][start : start + message_bytes(tensors, num_rows)]

    def _wait(self, timeout_s: float, peers: Sequence[int]) -> None:
        done = torch.cuda.Event()
        done.record()
        wait_for_event(
            done,
            timeout_s,
            f"rank {self._rank}: expected copies of expert weights to ranks {list(peers)} to end "
            f"within {timeout_s:g} s, got them still under way",
        )
