"""Hypothesis strategies for routings.

Shapes: R ranks, T tokens of a rank, E experts, K top-k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor


class Routing(NamedTuple):
    num_experts: int
    topk_idx: list[Tensor]
    """int64 [T, K] by rank."""


@st.composite
def routings(draw: st.DrawFn, max_ranks: int = 4) -> Routing:
    """Any routing of small sizes: empty ranks, dropped and repeated choices included."""
    num_ranks = draw(st.integers(1, max_ranks))
    num_experts = num_ranks * draw(st.integers(1, 3))
    top_k = draw(st.integers(1, 4))
    choice = st.integers(-1, num_experts - 1)
    token = st.lists(choice, min_size=top_k, max_size=top_k)
    topk_idx = [
        torch.tensor(draw(st.lists(token, max_size=5)), dtype=torch.int64).view(-1, top_k)
        for _ in range(num_ranks)
    ]
    return Routing(num_experts, topk_idx)
