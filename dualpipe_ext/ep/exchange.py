"""Rows from every rank to every rank of a group, by bounded point-to-point messages.

Point-to-point instead of all-to-all so that a time-out can name the rank that did not answer.
Everything travels as bytes: gloo knows no FP8, and no backend then depends on the dtype.

Shapes: R ranks, S rows sent (grouped by destination rank), N rows received (grouped by source).
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext.errors import CommTimeoutError, DualPipeError
from dualpipe_ext.timeouts import is_timeout

# Keeps these messages apart from other point-to-point traffic of the same group, where the backend
# knows tags (gloo). Messages from one rank to another are matched in the order they are given.
_TAG = 7100


class Exchange:
    """Exchanges between the ranks of one group (``None``: one rank, nothing is sent).

    Guarantee: on the CPU a call returns complete or raises ``CommTimeoutError`` within
    ``timeout_s``, or ``DualPipeError`` at once if the connection to a rank is lost. On CUDA the
    same holds for :meth:`gather`; :meth:`rows` only orders the current stream after the messages,
    and the group's own watchdog bounds them. After either error the group is not usable any more.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, rank: int, num_ranks: int, timeout_s: float
    ) -> None:
        self.group = group
        self.rank = rank
        self.num_ranks = num_ranks
        self.timeout_s = timeout_s

    def gather(self, message: Tensor, phase: str) -> Tensor:
        """All ranks' messages of equal shape [n], as [R, n]; waits for them on the host."""
        everyone = message.new_empty((self.num_ranks, *message.shape))
        one_each = [1] * self.num_ranks
        send = message.unsqueeze(0).expand(self.num_ranks, *message.shape).contiguous()
        self._exchange([send], [everyone], one_each, one_each, phase, wait_on_host=True)
        return everyone

    def rows(
        self,
        tensors: Sequence[Tensor],
        send_rows: Sequence[int],
        recv_rows: Sequence[int],
        phase: str,
    ) -> list[Tensor]:
        """Send each tensor's rows [S, ...]: ``send_rows[d]`` of them to rank d, in order.

        Returns:
            One [N, ...] per tensor: ``recv_rows[s]`` rows from rank s, in rank order.
        """
        sent = [t.contiguous() for t in tensors]
        received = [t.new_empty((sum(recv_rows), *t.shape[1:])) for t in sent]
        on_host = not (sent and sent[0].is_cuda)
        self._exchange(sent, received, send_rows, recv_rows, phase, wait_on_host=on_host)
        return received

    def _exchange(
        self,
        sent: list[Tensor],
        received: list[Tensor],
        send_rows: Sequence[int],
        recv_rows: Sequence[int],
        phase: str,
        *,
        wait_on_host: bool,
    ) -> None:
        ops: list[dist.P2POp] = []
        for source, target in zip(sent, received, strict=True):
            outgoing = source.view(torch.uint8).split(list(send_rows))
            incoming = target.view(torch.uint8).split(list(recv_rows))
            incoming[self.rank].copy_(outgoing[self.rank])
            for peer in range(self.num_ranks):
                if peer == self.rank:
                    continue
                # Both ends know the counts, so both skip an empty message.
                if incoming[peer].shape[0]:
                    ops.append(self._op(dist.irecv, incoming[peer], peer))
                if outgoing[peer].shape[0]:
                    ops.append(self._op(dist.isend, outgoing[peer], peer))
        if ops:
            self._wait(ops, phase, wait_on_host)

    def _op(self, kind: object, tensor: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, tensor, group=self.group, group_peer=peer, tag=_TAG)

    def _wait(self, ops: list[dist.P2POp], phase: str, wait_on_host: bool) -> None:
        deadline = time.monotonic() + self.timeout_s
        peers = [op.group_peer for op in ops]
        try:
            works = dist.batch_isend_irecv(ops)
        except RuntimeError as error:
            raise self._failure(peers, phase, error) from error
        # One work per message, or (NCCL) one for all of them.
        waits_for = [[p] for p in peers] if len(works) == len(ops) else [peers] * len(works)
        for work, waited in zip(works, waits_for, strict=True):
            # Zero would mean "no limit" to torch.
            left_ms = max(1, round(1000 * (deadline - time.monotonic())))
            try:
                if wait_on_host:
                    work.wait(datetime.timedelta(milliseconds=left_ms))
                else:
                    work.wait()
            except RuntimeError as error:
                raise self._failure(waited, phase, error) from error

    def _failure(self, peers: list[int], phase: str, error: RuntimeError) -> DualPipeError:
        names = sorted(set(peers))
        who = f"rank {names[0]}" if len(names) == 1 else f"ranks {names}"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        kind = CommTimeoutError if is_timeout(error) else DualPipeError
        return kind(
            f"rank {self.rank}, {phase}: expected {who} to answer within {self.timeout_s:g} s, "
            f"got: {reason}"
        )
