"""What users have without this package: all-to-all of torch.distributed between torch permutations.

Two schemes. *Per expert* sends a row for each (token, expert), sorted by expert, as Megatron's
alltoall dispatcher does; what arrives is sorted into expert-major rows. *Per rank* sends a token
once to each rank that has one of its experts, and spreads it there. Both move tokens (and FP8
scales) only, no routing weights, which is in their favour. And the plain rate of a copy into a
neighbour's memory, which no transport that uses the copy engines can beat.

Shapes: R ranks, T tokens of this rank, H hidden, E experts, L = E / R, K top-k (no choice dropped),
S rows sent (grouped by destination), A rows that arrive (grouped by source).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import embedding_bag

from dualpipe_ext.bench import timing
from dualpipe_ext.bench.ep_cases import Case, EpOptions, Inputs
from dualpipe_ext.bench.ep_variants import Prepared, Runner, Variant, random_rows
from dualpipe_ext.bench.ranks import Ranks
from dualpipe_ext.ep import Quantized, quantize

_PEER_COPY_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, eq=False)
class _Bags:
    """Sums of rows: bag i is rows ``index[starts[i]:starts[i + 1]]``, in float32, rounded once."""

    index: Tensor
    starts: Tensor

    def sum(self, rows: Tensor) -> Tensor:
        return embedding_bag(self.index, rows, self.starts, mode="sum")


@dataclass(frozen=True, slots=True, eq=False)
class _Route:
    send_index: Tensor
    """int64 [S], the token of each sent row."""
    send_rows: list[int]
    recv_rows: list[int]
    arrange: Tensor | None
    """Arriving row of each output row; None: they stay as they arrive."""
    back: Tensor | _Bags | None
    """The inverse for a combine: an index, or sums."""
    collect: _Bags
    """Rows that came back, per token."""


@dataclass(frozen=True, slots=True, eq=False)
class _Arrived:
    tokens: Tensor
    scales: Tensor | None = None


class AllToAllRunner(Runner):
    """``all_to_all_single`` of NCCL or gloo."""

    def __init__(self, variant: Variant, options: EpOptions, inputs: Inputs, ranks: Ranks) -> None:
        backend = variant.transport.partition("-")[0]
        if ranks.local is not None:
            raise ValueError(f"expected a process per rank for {backend}, got virtual ranks")
        needed = {"nccl": "cuda", "gloo": "cpu"}[backend]
        if ranks.device.type != needed:
            raise ValueError(f"expected --device {needed} for {backend}, got {ranks.device.type}")
        self._inputs, self._ranks = inputs, ranks
        self._num_experts = options.experts
        self._num_local = options.experts // ranks.num_ranks
        self.row_per_expert = variant.transport.endswith("-per-expert")

    def supports(self, case: Case) -> bool:
        if case.op == "push":
            return False
        layouts = ("expert",) if self.row_per_expert else ("token", "expert")
        return case.layout in layouts and case.alignment == 1 and not case.zero_copy

    def prepare(self, case: Case, num_rows: int) -> Prepared:
        inputs = self._inputs
        route = self._route(inputs.topk_idx, case)
        if case.op == "combine":
            rows = random_rows(num_rows, inputs.x, self._ranks.rank)
            here = rows[: sum(route.recv_rows) if route.arrange is None else len(route.arrange)]
            return Prepared(lambda: self._combine(here, route), rows=rows)
        x = inputs.quantised if case.quantised else inputs.x
        return Prepared(
            lambda: self._dispatch(x, case, route),
            lambda: self._dispatch(x, case, self._route(inputs.topk_idx, case)),
        )

    def _route(self, topk_idx: Tensor, case: Case) -> _Route:
        if self.row_per_expert:
            return self._route_per_expert(topk_idx)
        return self._route_per_rank(topk_idx, case)

    def _route_per_expert(self, topk_idx: Tensor) -> _Route:
        ranks, num_local = self._ranks, self._num_local
        top_k = topk_idx.shape[1]
        order = topk_idx.flatten().argsort(stable=True)
        counts = torch.bincount(topk_idx.flatten(), minlength=self._num_experts)
        table = torch.stack(ranks.gather(counts)).view(ranks.num_ranks, ranks.num_ranks, num_local)
        rows_between = table.sum(2).tolist()  # waits for the device
        recv_rows = [row[ranks.rank] for row in rows_between]
        local = torch.arange(num_local, device=order.device).repeat(ranks.num_ranks)
        expert = local.repeat_interleave(table[:, ranks.rank].flatten(), output_size=sum(recv_rows))
        arrange = expert.argsort(stable=True)
        starts = torch.arange(0, order.numel(), top_k, device=order.device)
        return _Route(
            send_index=order.div(top_k, rounding_mode="floor"),
            send_rows=rows_between[ranks.rank],
            recv_rows=recv_rows,
            arrange=arrange,
            back=_inverse(arrange),
            collect=_Bags(_inverse(order), starts),
        )

    def _route_per_rank(self, topk_idx: Tensor, case: Case) -> _Route:
        ranks, num_local = self._ranks, self._num_local
        goes_to = topk_idx.new_zeros((len(topk_idx), ranks.num_ranks), dtype=torch.bool)
        goes_to.scatter_(1, topk_idx.div(num_local, rounding_mode="floor"), True)
        to_rank, send_index = goes_to.t().nonzero(as_tuple=True)
        rows_between = torch.stack(ranks.gather(goes_to.sum(0))).tolist()
        send_rows = rows_between[ranks.rank]
        recv_rows = [row[ranks.rank] for row in rows_between]
        sent_as = torch.zeros_like(goes_to, dtype=torch.int64)
        sent_as[send_index, to_rank] = torch.arange(len(send_index), device=topk_idx.device)
        arrange = back = None
        if case.layout == "expert":
            ids = _all_to_all(topk_idx[send_index], send_rows, recv_rows)
            first = ranks.rank * num_local
            here = (ids >= first) & (ids < first + num_local)
            row = here.nonzero()[:, 0]
            order = ids[here].argsort(stable=True)
            arrange, back = row[order], _Bags(_inverse(order), _starts(here))
        return _Route(
            send_index=send_index,
            send_rows=send_rows,
            recv_rows=recv_rows,
            arrange=arrange,
            back=back,
            collect=_Bags(sent_as[goes_to], _starts(goes_to)),
        )

    def _dispatch(self, x: Tensor | Quantized, case: Case, route: _Route) -> _Arrived:
        if case.fp8:
            x = x if isinstance(x, Quantized) else quantize(x)
            # As bytes: few operations, and not gloo, know FP8.
            values = self._move(x.values.view(torch.uint8), route)
            return _Arrived(values.view(torch.float8_e4m3fn), self._move(x.scales, route))
        return _Arrived(self._move(x, route))

    def _move(self, rows: Tensor, route: _Route) -> Tensor:
        arrived = _all_to_all(rows[route.send_index], route.send_rows, route.recv_rows)
        return arrived if route.arrange is None else arrived[route.arrange]

    def _combine(self, rows: Tensor, route: _Route) -> Tensor:
        if isinstance(route.back, _Bags):
            rows = route.back.sum(rows)
        elif route.back is not None:
            rows = rows[route.back]
        return route.collect.sum(_all_to_all(rows, route.recv_rows, route.send_rows))


def _all_to_all(rows: Tensor, send_rows: list[int], recv_rows: list[int]) -> Tensor:
    arrived = rows.new_empty((sum(recv_rows), *rows.shape[1:]))
    dist.all_to_all_single(arrived, rows, recv_rows, send_rows)
    return arrived


def _inverse(permutation: Tensor) -> Tensor:
    return torch.empty_like(permutation).index_put_(
        (permutation,), torch.arange(len(permutation), device=permutation.device)
    )


def _starts(marks: Tensor) -> Tensor:
    """Where each row's marks begin, if all marks are numbered row by row."""
    per_row = marks.sum(1)
    return per_row.cumsum(0) - per_row


def peer_copy(ranks: Ranks, options: EpOptions) -> tuple[list[float], int]:
    """``copy_`` of one large tensor into the next rank's memory, all ranks at once.

    Returns:
        Microseconds per copy of the slowest rank, by round; and the bytes copied.

    Raises:
        Exception: torch symmetric memory does not work here.
    """
    import torch.distributed._symmetric_memory as symmetric_memory

    memory = symmetric_memory.empty(_PEER_COPY_BYTES, dtype=torch.uint8, device=ranks.device)
    handle = symmetric_memory.rendezvous(memory, dist.group.WORLD)
    neighbour = (ranks.rank + 1) % ranks.num_ranks
    target = handle.get_buffer(neighbour, (_PEER_COPY_BYTES,), torch.uint8)
    source = torch.full_like(memory, ranks.rank)
    calls = {"copy": lambda: target.copy_(source)}
    found = timing.interleaved(calls, ranks, rounds=options.rounds, num_calls=options.calls)
    ranks.barrier()
    torch.cuda.synchronize()
    before = (ranks.rank - 1) % ranks.num_ranks
    if not bool((memory == before).all()):
        raise RuntimeError("expected the neighbour's bytes after a peer copy, got others")
    return found["copy"], _PEER_COPY_BYTES
