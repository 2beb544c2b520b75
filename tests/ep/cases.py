"""Inputs for dispatch and combine: routings of every awkward kind, equal on all ranks.

Every rank makes all ranks' inputs from the seed, so that each can run the reference by itself.

Shapes: R ranks, T tokens of a rank, H hidden, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = (
    "uneven",  # every rank its own number of tokens, random experts
    "some_ranks_empty",  # even ranks have no token
    "all_empty",  # nobody has a token
    "one_expert",  # every first choice is expert 0, the others dropped
    "last_rank_only",  # every choice lives on the last rank
    "masked",  # a third of the choices dropped
    "all_dropped",  # tokens, but no choices
    "repeated",  # a token may name an expert twice
)


@dataclass(frozen=True)
class Case:
    """All ranks' inputs; lists by rank."""

    num_experts: int
    xs: list[Tensor]
    topk_idx: list[Tensor]
    topk_weights: list[Tensor]

    @property
    def top_k(self) -> int:
        return self.topk_idx[0].shape[1]


def make_case(
    kind: str,
    num_ranks: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    hidden: int = 8,
    experts_per_rank: int = 3,
    top_k: int = 3,
    max_tokens: int = 7,
    tokens: int | None = None,
) -> Case:
    """Draw the inputs of one case; every rank has ``tokens`` tokens, if given, else up to
    ``max_tokens``, each its own number."""
    gen = torch.Generator().manual_seed(1000 * seed + KINDS.index(kind))
    num_experts = num_ranks * experts_per_rank
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    xs, topk_idx, topk_weights = [], [], []
    for rank in range(num_ranks):
        drawn = int(torch.randint(1, max_tokens + 1, (), generator=gen))
        rows = drawn if tokens is None else tokens
        if kind == "all_empty" or (kind == "some_ranks_empty" and rank % 2 == 0):
            rows = 0
        xs.append(torch.randn(rows, hidden, generator=gen, dtype=torch.float64).to(dtype))
        topk_idx.append(_choices(kind, rows, top_k, num_experts, experts_per_rank, gen))
        weights = torch.rand(rows, top_k, generator=gen, dtype=torch.float64)
        topk_weights.append(weights.to(weight_dtype))
    return Case(num_experts, xs, topk_idx, topk_weights)


def _choices(
    kind: str, tokens: int, top_k: int, num_experts: int, per_rank: int, gen: torch.Generator
) -> Tensor:
    if kind == "repeated":
        return torch.randint(0, num_experts, (tokens, top_k), generator=gen)
    pool = per_rank if kind == "last_rank_only" else num_experts
    # A permutation per token: no expert twice; -1 where there are fewer experts than choices.
    order = torch.rand(tokens, pool, generator=gen).argsort(dim=1)[:, :top_k]
    idx = torch.full((tokens, top_k), -1)
    idx[:, : order.shape[1]] = order + (num_experts - pool)
    if kind == "one_expert":
        idx.fill_(-1)[:, 0] = 0
    elif kind == "masked":
        idx[torch.rand(idx.shape, generator=gen) < 1 / 3] = -1
    elif kind == "all_dropped":
        idx.fill_(-1)
    return idx
