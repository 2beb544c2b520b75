"""What dispatch and combine mean: loops over ranks, tokens and experts in one process.

Every transport must equal this bit for bit. No speed, no communication, no gradients; obvious
instead. Inputs and outputs are lists with one entry per rank.

Shapes: R ranks, T tokens of a rank (each its own), H hidden, E experts, K top-k,
N received token rows of a rank, M expert rows of a rank. Expert e lives on rank ``e // (E / R)``.

Example: two ranks with two experts each (E=4), K=2. Rank 0 has tokens a and b, rank 1 token c.
``a`` chose experts 2 and 3, both on rank 1: it is sent there once. ``b`` chose 0 and 2: one row
stays, one goes to rank 1. ``c`` chose 1 and dropped its second choice.

>>> a, b, c = torch.eye(3).unbind()
>>> xs = [torch.stack([a, b]), c.unsqueeze(0)]
>>> topk_idx = [torch.tensor([[2, 3], [0, 2]]), torch.tensor([[1, -1]])]
>>> on_0, on_1 = dispatch(xs, topk_idx, num_experts=4)
>>> on_0.tokens.tolist()                       # b, then c: by source rank, then by token
[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
>>> on_0.topk_idx.tolist(), on_1.topk_idx.tolist()
([[0, -1], [1, -1]], [[0, 1], [-1, 0]])
>>> on_0.counts.tolist(), on_1.counts.tolist()
([1, 1], [2, 1])

In expert layout rank 1 holds expert 2's rows (a, b), then expert 3's (a), then padding:

>>> on_0, on_1 = dispatch(xs, topk_idx, num_experts=4, layout="expert", alignment=2)
>>> on_1.tokens.tolist()
[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
>>> on_1.offsets.tolist()
[2, 4]

Experts that return what they were given make combine count a token's rows:

>>> combine([on_0.tokens, on_1.tokens], topk_idx, num_experts=4, layout="expert", alignment=2)
[tensor([[2., 0., 0.],
        [0., 2., 0.]]), tensor([[0., 0., 1.]])]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dualpipe_ext.ep.fp8 import quantize
from dualpipe_ext.ep.handle import ExpertMajor, Layout, TokenMajor


class _TokenRow(NamedTuple):
    """A row that a rank receives in token layout."""

    source: int
    token: int
    local_ids: list[int]
    """[K], local expert ids, -1 for choices that live elsewhere or were dropped."""


class _Choice(NamedTuple):
    """A row that a rank has in expert layout: choice ``k`` of token row ``n``."""

    n: int
    k: int


def dispatch(
    xs: Sequence[Tensor],
    topk_idx: Sequence[Tensor],
    topk_weights: Sequence[Tensor] | None = None,
    *,
    num_experts: int,
    layout: Layout = "token",
    alignment: int = 1,
    max_recv_tokens: int | None = None,
    rows_per_expert: int | None = None,
    fp8: bool = False,
    pow2_scales: bool = False,
) -> list[TokenMajor] | list[ExpertMajor]:
    """What every rank receives; arguments as of ``Buffer.dispatch``, by rank.

    Rows that ``rows_per_expert`` leaves unwritten are zero here.
    """
    scales = None
    if fp8:
        xs, scales = zip(*(quantize(x, pow2_scales=pow2_scales) for x in xs), strict=True)
    num_local = num_experts // len(xs)
    received = []
    for rank in range(len(xs)):
        token_rows = _token_rows(rank, topk_idx, num_local)
        chosen = [e for row in token_rows for e in row.local_ids if e >= 0]
        counts = torch.tensor([chosen.count(e) for e in range(num_local)])
        if layout == "token":
            sources = [(row.source, row.token) for row in token_rows]
            sources += [None] * ((max_recv_tokens or 0) - len(sources))
            ids = [row.local_ids for row in token_rows]
            ids += [[-1] * topk_idx[0].shape[1]] * (len(sources) - len(ids))
            received.append(
                TokenMajor(
                    tokens=_gather(xs, sources),
                    scales=None if scales is None else _gather(scales, sources),
                    counts=counts,
                    topk_idx=torch.tensor(ids, dtype=torch.int64).view(-1, topk_idx[0].shape[1]),
                    topk_weights=_gather_weights(topk_weights, sources, ids),
                )
            )
        else:
            groups = _expert_groups(token_rows, num_local, alignment, rows_per_expert)
            choices = [choice for group in groups for choice in group]
            choices += [None] * ((max_recv_tokens or 0) - len(choices))
            rows = [None if c is None else token_rows[c.n] for c in choices]
            sources = [None if row is None else (row.source, row.token) for row in rows]
            ends = [sum(len(group) for group in groups[: e + 1]) for e in range(num_local)]
            received.append(
                ExpertMajor(
                    tokens=_gather(xs, sources),
                    scales=None if scales is None else _gather(scales, sources),
                    counts=counts,
                    offsets=torch.tensor(ends, dtype=torch.int32),
                    weights=_gather_choice_weights(topk_weights, sources, choices),
                )
            )
    return received


def combine(
    rows: Sequence[Tensor],
    topk_idx: Sequence[Tensor],
    *,
    num_experts: int,
    layout: Layout = "token",
    alignment: int = 1,
    rows_per_expert: int | None = None,
    weights: Sequence[Tensor] | None = None,
    biases: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """What every rank gets back, given each rank's expert outputs and the routing they came by.

    Each rank first sums a token's rows over its local experts (expert layout only), in float32, in
    top-k order, times their weights if given, and rounds; then the source sums these parts in rank
    order in float32, adds the bias and rounds. float64 rows are summed in float64.
    """
    dtype, hidden = rows[0].dtype, rows[0].shape[1]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    num_local = num_experts // len(rows)
    totals = [torch.zeros(len(idx), hidden, dtype=exact) for idx in topk_idx]
    for rank in range(len(rows)):
        token_rows = _token_rows(rank, topk_idx, num_local)
        groups = _expert_groups(token_rows, num_local, alignment, rows_per_expert)
        place = {choice: m for m, choice in enumerate(c for group in groups for c in group)}
        for n, token_row in enumerate(token_rows):
            if layout == "token":
                part = rows[rank][n]
            else:
                part = torch.zeros(hidden, dtype=exact)
                for k, expert in enumerate(token_row.local_ids):
                    if expert >= 0:
                        m = place[_Choice(n, k)]
                        factor = 1.0 if weights is None else weights[rank][m].to(exact)
                        part = part + rows[rank][m].to(exact) * factor
            totals[token_row.source][token_row.token] += part.to(dtype).to(exact)
    if biases is not None:
        totals = [total + bias.to(exact) for total, bias in zip(totals, biases, strict=True)]
    return [total.to(dtype) for total in totals]


def _token_rows(rank: int, topk_idx: Sequence[Tensor], num_local: int) -> list[_TokenRow]:
    """The rows of one rank in token layout, in order."""
    rows = []
    for source, choices in enumerate(topk_idx):
        for token, experts in enumerate(choices.tolist()):
            # -1 // num_local is -1: a dropped choice is at no rank.
            local_ids = [e % num_local if e // num_local == rank else -1 for e in experts]
            if max(local_ids) >= 0:
                rows.append(_TokenRow(source, token, local_ids))
    return rows


def _expert_groups(
    token_rows: list[_TokenRow], num_local: int, alignment: int, rows_per_expert: int | None
) -> list[list[_Choice | None]]:
    """The rows of one rank in expert layout, by local expert; None is padding."""
    groups = []
    for expert in range(num_local):
        group: list[_Choice | None] = [
            _Choice(n, k)
            for n, row in enumerate(token_rows)
            for k, chosen in enumerate(row.local_ids)
            if chosen == expert
        ]
        while len(group) % alignment or len(group) < (rows_per_expert or 0):
            group.append(None)
        groups.append(group)
    return groups


def _gather(by_rank: Sequence[Tensor], sources: Sequence[tuple[int, int] | None]) -> Tensor:
    """The rows of (rank, token) pairs, zeros for None."""
    out = torch.zeros(len(sources), by_rank[0].shape[1], dtype=by_rank[0].dtype)
    for i, source in enumerate(sources):
        if source is not None:
            rank, token = source
            out[i] = by_rank[rank][token]
    return out


def _gather_weights(
    topk_weights: Sequence[Tensor] | None,
    sources: Sequence[tuple[int, int] | None],
    ids: Sequence[Sequence[int]],
) -> Tensor | None:
    """Token layout: the weights of the choices that are here, 0 elsewhere."""
    if topk_weights is None:
        return None
    out = _gather(topk_weights, sources)
    for i, row in enumerate(ids):
        for k, expert in enumerate(row):
            if expert < 0:
                out[i, k] = 0
    return out


def _gather_choice_weights(
    topk_weights: Sequence[Tensor] | None,
    sources: Sequence[tuple[int, int] | None],
    choices: Sequence[_Choice | None],
) -> Tensor | None:
    """Expert layout: each row's weight, 0 in padding."""
    if topk_weights is None:
        return None
    out = torch.zeros(len(sources), dtype=topk_weights[0].dtype)
    for i, (source, choice) in enumerate(zip(sources, choices, strict=True)):
        if source is not None and choice is not None:
            rank, token = source
            out[i] = topk_weights[rank][token, choice.k]
    return out
