"""What ranks must receive and get back, by tensor operations on any device, many calls at a time.

For numbers of calls and tokens at which the loops of ``dualpipe_ext.ep.reference`` take too long;
test_expected.py holds it to them. Instead of rows it deals in their sources: row ``r * T + t`` is
token t of rank r.

Shapes: C calls, R ranks, T most tokens of a rank, E experts, G = E / R experts per rank, K top-k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routes(NamedTuple):
    """The routing of C calls on all ranks."""

    num_experts: int
    topk_idx: Tensor
    """int64 [C, R, T, K]; -1 where a choice was dropped or a rank has no such token."""
    topk_weights: Tensor
    """float32 [C, R, T, K]"""


class Rows(NamedTuple):
    """The rows of one rank, those that are empty included."""

    source: Tensor
    """int64 [C, M], -1 where the row is empty."""
    num_rows: Tensor
    """int64 [C], rows without those past the end (padding between experts is included)."""
    counts: Tensor
    """int64 [C, G]"""
    weights: Tensor
    """float32; token layout: [C, M, K], expert layout: [C, M]."""
    topk_idx: Tensor | None
    """Token layout: int64 [C, M, K]."""
    offsets: Tensor | None
    """Expert layout: int32 [C, G]."""


def rows_at(routes: Routes, rank: int, layout: str, alignment: int, num_rows: int) -> Rows:
    """What a rank receives with ``max_recv_tokens=num_rows``, which must be enough."""
    num_local = routes.num_experts // routes.topk_idx.shape[1]
    local = routes.topk_idx - rank * num_local
    local = torch.where((local >= 0) & (local < num_local), local, -1)
    counts = torch.zeros((len(local), num_local + 1), dtype=torch.int64, device=local.device)
    pairs = torch.where(local >= 0, local, num_local).flatten(1)
    counts = counts.scatter_add_(1, pairs, torch.ones_like(pairs))[:, :num_local]
    if layout == "token":
        return _token_rows(local.flatten(1, 2), routes.topk_weights.flatten(1, 2), counts, num_rows)
    weights = routes.topk_weights.flatten(1)
    return _expert_rows(pairs, weights, counts, alignment, num_rows, local.shape[-1])


def _token_rows(local: Tensor, weights: Tensor, counts: Tensor, num_rows: int) -> Rows:
    arrives = (local >= 0).any(-1)
    # Stable: those that arrive first, in their order.
    order = torch.argsort((~arrives).to(torch.int8), dim=1, stable=True)
    total = arrives.sum(1)
    if num_rows > order.shape[1]:
        order = torch.nn.functional.pad(order, (0, num_rows - order.shape[1]))
    order = order[:, :num_rows]
    filled = torch.arange(num_rows, device=local.device) < total.unsqueeze(1)
    at = order.unsqueeze(-1).expand(-1, -1, local.shape[-1])
    ids = torch.where(filled.unsqueeze(-1), local.gather(1, at), -1)
    return Rows(
        source=torch.where(filled, order, -1),
        num_rows=total,
        counts=counts,
        weights=torch.where(ids >= 0, weights.gather(1, at), 0),
        topk_idx=ids,
        offsets=None,
    )


def _expert_rows(
    pairs: Tensor, weights: Tensor, counts: Tensor, alignment: int, num_rows: int, top_k: int
) -> Rows:
    """``pairs`` int64 [C, R * T * K]: the local expert of each choice, G where it is not here."""
    num_local = counts.shape[1]
    padded = (counts + alignment - 1) // alignment * alignment
    ends = padded.cumsum(1)
    # Row of an expert's group less the place of its first pair among all pairs sorted by expert.
    shift = (ends - padded) - (counts.cumsum(1) - counts)
    order = torch.argsort(pairs, dim=1, stable=True)
    expert = pairs.gather(1, order)
    place = torch.arange(pairs.shape[1], device=pairs.device)
    position = place + shift.gather(1, expert.clamp_max(num_local - 1))
    # What is not here goes to a row past the end.
    position = torch.where(expert < num_local, position, num_rows)
    source = torch.full((len(pairs), num_rows + 1), -1, device=pairs.device)
    row_weights = weights.new_zeros((len(pairs), num_rows + 1))
    return Rows(
        source=source.scatter_(1, position, order // top_k)[:, :num_rows],
        num_rows=ends[:, -1],
        counts=counts,
        weights=row_weights.scatter_(1, position, weights.gather(1, order))[:, :num_rows],
        topk_idx=None,
        offsets=ends.to(torch.int32),
    )


def rank_sum(routes: Routes, rank: int, layout: str) -> Tensor:
    """float32 [C, T]: y / x of a rank's tokens if every rank r returns its rows times r + 1.

    In expert layout each choice counts, times its weight; in token layout each rank counts once.
    """
    num_ranks = routes.topk_idx.shape[1]
    num_local = routes.num_experts // num_ranks
    idx = routes.topk_idx[:, rank]
    owner = torch.where(idx >= 0, idx // num_local, -1)
    if layout == "expert":
        return ((owner + 1) * routes.topk_weights[:, rank]).sum(-1)
    total = torch.zeros(idx.shape[:2], device=idx.device)
    for r in range(num_ranks):
        total += (r + 1) * (owner == r).any(-1)
    return total
