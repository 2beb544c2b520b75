"""The transport that works everywhere: point-to-point messages of any torch.distributed backend.

A call to ``route`` exchanges every rank's counts, then the expert ids of the rows that will move;
``dispatch`` and ``combine`` then move rows whose sizes both ends know. A token goes to a rank once,
however many of its experts live there.

Shapes: T tokens of this rank, H hidden, E experts, R ranks, E/R experts per rank, K top-k,
S rows sent (grouped by destination rank), N rows received (grouped by source rank), M expert rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from dualpipe_ext.ep.exchange import Exchange
from dualpipe_ext.ep.expand import (
    ExpertMap,
    build_map,
    collapse_weights,
    expand,
    expand_weights,
    reduce,
)
from dualpipe_ext.ep.fp8 import Quantized, quantize
from dualpipe_ext.ep.handle import Handle
from dualpipe_ext.ep.transport import (
    ROW_LAYOUTS,
    Capabilities,
    RouteOptions,
    Rows,
    Transport,
    TransportConfig,
    describe_setting,
    settings_differ,
    too_many_rows,
)
from dualpipe_ext.kernels.backend import accumulator_dtype


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CollectiveHandle(Handle):
    """A handle and what this transport needs to move rows along it, both ways."""

    send_index: Tensor = field(repr=False)
    """int64 [S], the token of each sent row."""
    send_rows: list[int] = field(repr=False)
    """[R], rows sent to each rank."""
    recv_rows: list[int] = field(repr=False)
    """[R], rows received from each rank; their sum is N."""
    local_idx: Tensor = field(repr=False)
    """int64 [N, K], local expert ids of the received rows, -1 elsewhere."""
    expert_map: ExpertMap | None = field(repr=False)
    """Expert layout only."""


@dataclass(frozen=True, slots=True)
class _Announcement:
    """What one rank tells all others before rows move; its order on the wire is :meth:`parse`."""

    num_bad_ids: int
    limit: int
    """:attr:`RouteOptions.limit`; -1: none."""
    row_layout: int
    """Place in ``ROW_LAYOUTS``."""
    unit: int
    """What it rounds groups to."""
    rows: list[int]
    """[R], rows it sends to each rank."""
    pairs: list[int]
    """[E], choices of each expert among its tokens."""

    @staticmethod
    def parse(numbers: list[int], num_ranks: int) -> _Announcement:
        head, rest = numbers[:4], numbers[4:]
        return _Announcement(*head, rest[:num_ranks], rest[num_ranks:])


def destinations(topk_idx: Tensor, valid: Tensor, num_ranks: int, num_local: int) -> Tensor:
    """bool [T, R]: which ranks have an expert of which token.

    Args:
        topk_idx: int64 [T, K], expert ids.
        valid: bool [T, K], which of them count.
        num_ranks: R.
        num_local: experts of a rank.
    """
    rank_of = topk_idx.div(num_local, rounding_mode="floor")
    # Choices that go nowhere mark an extra column.
    rank_of = torch.where(valid, rank_of, num_ranks)
    marks = rank_of.new_zeros((topk_idx.shape[0], num_ranks + 1), dtype=torch.bool)
    return marks.scatter_(1, rank_of, True)[:, :num_ranks]


class CollectiveTransport(Transport):
    """See the module. Works on the CPU (gloo) and on CUDA (NCCL), on one rank without a group.

    After a ``CommTimeoutError`` the process group is unusable: make a new group and buffer.
    """

    name = "collective"
    capabilities = Capabilities(
        dtypes=frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64}),
        syncs_host=True,
    )

    def __init__(self, config: TransportConfig) -> None:
        super().__init__(config)
        self._exchange = Exchange(config.group, config.rank, config.num_ranks, config.timeout_s)

    @classmethod
    def unavailable(cls, config: TransportConfig) -> str | None:
        return None if config.local is None else "virtual ranks have no process group"

    def route(self, topk_idx: Tensor, options: RouteOptions) -> CollectiveHandle:
        config = self.config
        valid = (topk_idx >= 0) & (topk_idx < config.num_experts)
        goes_to = destinations(topk_idx, valid, config.num_ranks, config.num_local_experts)
        table = self._announce(topk_idx, valid, goes_to, options)
        _check_announcements(table, topk_idx, config, options)

        send_rows = table[config.rank].rows
        recv_rows = [source.rows[config.rank] for source in table]
        # nonzero of the transpose lists (destination, token) pairs in exactly the order to send.
        send_index = goes_to.t().nonzero()[:, 1]
        (global_idx,) = self._exchange.rows(
            [topk_idx[send_index]], send_rows, recv_rows, "dispatch (expert ids)"
        )
        base = config.rank * config.num_local_experts
        here = (global_idx >= base) & (global_idx < base + config.num_local_experts)
        local_idx = torch.where(here, global_idx - base, -1)
        counts = torch.bincount(local_idx[here], minlength=config.num_local_experts)
        shared = {
            "owner": self,
            "layout": options.layout,
            "alignment": options.alignment,
            "rows_per_expert": options.rows_per_expert,
            "num_tokens": topk_idx.shape[0],
            "counts": counts,
            "host_counts": self._host_counts(table) if options.max_recv_tokens is None else None,
            "send_index": send_index,
            "send_rows": send_rows,
            "recv_rows": recv_rows,
            "local_idx": local_idx,
        }
        if options.layout == "expert":
            expert_map = build_map(
                local_idx,
                counts,
                alignment=options.alignment,
                num_rows=options.max_recv_tokens,
                rows_per_expert=options.rows_per_expert,
            )
            return CollectiveHandle(
                **shared,
                num_rows=expert_map.num_rows,
                topk_idx=None,
                offsets=expert_map.offsets,
                expert_map=expert_map,
            )
        num_rows = sum(recv_rows) if options.max_recv_tokens is None else options.max_recv_tokens
        return CollectiveHandle(
            **shared,
            num_rows=num_rows,
            topk_idx=_pad_rows(local_idx, num_rows, value=-1),
            offsets=None,
            expert_map=None,
        )

    def _host_counts(self, table: list[_Announcement]) -> list[int]:
        """[E/R], choices of each local expert on all ranks."""
        num_local = self.config.num_local_experts
        local = range(self.config.rank * num_local, (self.config.rank + 1) * num_local)
        return [sum(source.pairs[expert] for source in table) for expert in local]

    def _announce(
        self, topk_idx: Tensor, valid: Tensor, goes_to: Tensor, options: RouteOptions
    ) -> list[_Announcement]:
        """Tell every rank this rank's counts and options; returns what all ranks told, by rank."""
        num_bad = (~valid & (topk_idx != -1)).sum().view(1)
        row_layout, unit = options.setting
        limit = -1 if options.limit is None else options.limit
        settings = [limit, ROW_LAYOUTS.index(row_layout), unit]
        pairs = torch.bincount(topk_idx[valid], minlength=self.config.num_experts)
        message = torch.cat([num_bad, num_bad.new_tensor(settings), goes_to.sum(0), pairs])
        everyone = self._exchange.gather(message, "dispatch (counts)").tolist()
        return [_Announcement.parse(numbers, self.config.num_ranks) for numbers in everyone]

    def dispatch(
        self,
        x: Tensor | Quantized,
        topk_weights: Tensor | None,
        handle: Handle,
        *,
        fp8: bool = False,
        pow2_scales: bool = False,
    ) -> Rows:
        assert isinstance(handle, CollectiveHandle)
        if fp8 and isinstance(x, Tensor):
            x = quantize(x, pow2_scales=pow2_scales)
        # FP8 values are moved and permuted as bytes: few operations know their dtype.
        payload = [x.values.view(torch.uint8), x.scales] if isinstance(x, Quantized) else [x]
        sent = payload if topk_weights is None else [*payload, topk_weights]
        received = self._exchange.rows(
            [t[handle.send_index] for t in sent],
            handle.send_rows,
            handle.recv_rows,
            "dispatch (rows)",
        )
        place = _place_in_expert_layout if handle.expert_map is not None else _place_in_token_layout
        tokens, *scales = [place(t, handle) for t in received[: len(payload)]]
        weights = None
        if topk_weights is not None:
            here = torch.where(handle.local_idx >= 0, received[-1], 0)
            if handle.expert_map is not None:
                weights = expand_weights(here, handle.expert_map)
            else:
                weights = _pad_rows(here, handle.num_rows)
        if scales:
            return Rows(tokens.view(torch.float8_e4m3fn), scales[0], weights)
        return Rows(tokens, None, weights)

    def combine(
        self,
        rows: Tensor,
        handle: Handle,
        *,
        weights: Tensor | None = None,
        bias: Tensor | None = None,
        row_weights: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        assert isinstance(handle, CollectiveHandle)
        num_here = sum(handle.recv_rows)
        if handle.expert_map is not None:
            rows = reduce(rows, handle.expert_map, num_here, weights)
            if row_weights is not None:
                row_weights = collapse_weights(row_weights, handle.expert_map, num_here)
        elif row_weights is not None:
            # A choice that is not here was received as 0 whatever it was: nothing goes back to it.
            row_weights = torch.where(handle.local_idx >= 0, row_weights[:num_here], 0)
        sent = [rows[:num_here]] if row_weights is None else [rows[:num_here], row_weights]
        parts, *weight_parts = self._exchange.rows(
            sent, handle.recv_rows, handle.send_rows, "combine (rows)"
        )
        total = _sum_by_rank(parts, handle)
        if bias is not None:
            total += bias.to(total.dtype)
        returned = _sum_by_rank(weight_parts[0], handle) if weight_parts else None
        if returned is not None:
            # Each choice is here from one rank only, so nothing was added to it.
            returned = returned.to(weight_parts[0].dtype)
        return total.to(rows.dtype) if out is None else out.copy_(total), returned


def _check_announcements(
    table: list[_Announcement], topk_idx: Tensor, config: TransportConfig, options: RouteOptions
) -> None:
    """Raise the same kind of error on every rank if any rank's call cannot be served."""
    for rank, told in enumerate(table):
        if not told.num_bad_ids:
            continue
        limits = f"expected expert ids from -1 to {config.num_experts - 1} in topk_idx"
        if rank != config.rank:
            raise ValueError(f"{limits}, got {told.num_bad_ids} others at rank {rank}")
        bad = (topk_idx < -1) | (topk_idx >= config.num_experts)
        token, choice = bad.nonzero()[0].tolist()
        value = int(topk_idx[token, choice])
        raise ValueError(f"{limits}, got {value} at topk_idx[{token}, {choice}]")

    for rank, told in enumerate(table):
        setting = ROW_LAYOUTS[told.row_layout], told.unit
        if setting != options.setting:
            own, theirs = describe_setting(*options.setting), describe_setting(*setting)
            raise settings_differ(config.rank, own, rank, theirs)
        arriving = _rows_at(rank, table, config.num_local_experts, options)
        if 0 <= told.limit < arriving:
            raise too_many_rows(setting[0], told.limit, rank, arriving)


def _rows_at(
    rank: int, table: list[_Announcement], num_local_experts: int, options: RouteOptions
) -> int:
    """Rows that all sources together bring to one rank, in the layout asked for, or to its fullest
    group of fixed size."""
    if options.layout == "token":
        return sum(source.rows[rank] for source in table)
    experts = range(rank * num_local_experts, (rank + 1) * num_local_experts)
    totals = [sum(source.pairs[e] for source in table) for e in experts]
    if options.rows_per_expert is not None:
        return max(totals)
    return sum(-(-total // options.alignment) * options.alignment for total in totals)


def _place_in_expert_layout(rows: Tensor, handle: CollectiveHandle) -> Tensor:
    assert handle.expert_map is not None
    return expand(rows, handle.expert_map)


def _place_in_token_layout(rows: Tensor, handle: CollectiveHandle) -> Tensor:
    return _pad_rows(rows, handle.num_rows)


def _pad_rows(rows: Tensor, num_rows: int, value: int = 0) -> Tensor:
    missing = num_rows - rows.shape[0]
    return rows if not missing else pad(rows, (0, 0, 0, missing), value=value)


def _sum_by_rank(parts: Tensor, handle: CollectiveHandle) -> Tensor:
    """Sum rows [S, ...] that came back into [T, ...], in rank order, not yet rounded."""
    total = parts.new_zeros(
        (handle.num_tokens, *parts.shape[1:]), dtype=accumulator_dtype(parts.dtype)
    )
    # Within one rank's part no token occurs twice, so the order is the loop's on any device.
    indices = handle.send_index.split(handle.send_rows)
    for index, part in zip(indices, parts.split(handle.send_rows), strict=True):
        total.index_add_(0, index, part.to(total.dtype))
    return total
