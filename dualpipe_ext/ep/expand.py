"""Token layout <-> expert layout, for transports whose rows arrive token-major.

Shapes: N token rows, M expert rows, H hidden, G local experts, K top-k, P (row, choice) pairs that
have a local expert. Deterministic on every device: no index is written twice by one operation.

Torch operations define the results. For CUDA tensors Triton kernels with the same bits, in
``kernels/permute.py``, move the rows once instead of once per operation.

Example used below: three rows, two experts, two choices each, groups padded to multiples of 2.
Row 0 chose expert 1; row 1 chose experts 0 and 1; row 2 chose expert 1. Expert 0 gets rows
[1, padding], expert 1 gets rows [0, 1, 2, padding].
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from dualpipe_ext.kernels.backend import accumulator_dtype


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ExpertMap:
    """Which expert row belongs to which choice of which token row; pairs in (row, choice) order."""

    row: Tensor
    """int64 [P], token-layout row of each pair."""
    choice: Tensor
    """int64 [P], its place among the row's K choices."""
    position: Tensor
    """int64 [P], its expert-layout row."""
    turn: Tensor
    """int64 [P], how many pairs of the same row come before it."""
    num_turns: int
    """Largest number of pairs of one row."""
    top_k: int
    offsets: Tensor
    """int32 [G], END row of each expert's group, padding included."""
    num_rows: int
    """Rows of the expert layout."""


def build_map(
    topk_idx: Tensor,
    counts: Tensor,
    *,
    alignment: int = 1,
    num_rows: int | None = None,
    rows_per_expert: int | None = None,
) -> ExpertMap:
    """Lay out expert groups for the choices of N token rows.

    Args:
        topk_idx: int64 [N, K], local expert ids or -1.
        counts: int64 [G], pairs of each expert.
        alignment: each group's rows are padded to a multiple of this.
        num_rows: rows of the expert layout, at least the padded total; default the total.
        rows_per_expert: of every group, instead of an alignment; at least the largest count.

    >>> topk_idx = torch.tensor([[1, -1], [0, 1], [-1, 1]])
    >>> m = build_map(topk_idx, torch.tensor([1, 3]), alignment=2)
    >>> m.row.tolist(), m.choice.tolist(), m.position.tolist(), m.offsets.tolist(), m.num_rows
    ([0, 1, 1, 2], [0, 0, 1, 1], [2, 0, 3, 4], [2, 6], 6)
    """
    here = topk_idx >= 0
    row, choice = here.nonzero(as_tuple=True)
    turn = (here.cumsum(dim=1) - 1)[row, choice]
    expert = topk_idx[row, choice]
    sizes = (counts + alignment - 1) // alignment * alignment
    if rows_per_expert is not None:
        sizes = torch.full_like(counts, rows_per_expert)
    ends = sizes.cumsum(0)
    # Stable: inside an expert the pairs stay in (row, choice) order.
    order = torch.argsort(expert, stable=True)
    by_expert = expert[order]
    padding_before = ends.roll(1) - counts.cumsum(0).roll(1)
    padding_before[:1] = 0
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device) + padding_before[by_expert]
    return ExpertMap(
        row=row,
        choice=choice,
        position=position,
        turn=turn,
        num_turns=int(turn.max()) + 1 if len(turn) else 0,
        top_k=topk_idx.shape[1],
        offsets=ends.to(torch.int32),
        num_rows=int(ends[-1]) if num_rows is None else num_rows,
    )


def expand(tokens: Tensor, expert_map: ExpertMap) -> Tensor:
    """Copy token rows [N, H] to their expert rows [M, H]; padding is zero.

    >>> m = build_map(torch.tensor([[1, -1], [0, 1], [-1, 1]]), torch.tensor([1, 3]), alignment=2)
    >>> expand(torch.tensor([[10.0], [20.0], [30.0]]), m).flatten().tolist()
    [20.0, 0.0, 10.0, 20.0, 30.0, 0.0]
    """
    if (kernels := _kernels_for(tokens)) is not None:
        table = _table(kernels, expert_map, len(tokens))
        return kernels.expand_rows(tokens, table, expert_map.position, expert_map.num_rows)
    out = tokens.new_zeros((expert_map.num_rows, *tokens.shape[1:]))
    out[expert_map.position] = tokens[expert_map.row]
    return out


def reduce(rows: Tensor, expert_map: ExpertMap, num_rows: int, weights: Tensor | None) -> Tensor:
    """Sum the expert rows [M, H] of each token row, in top-k order, and round once.

    Args:
        num_rows: N.
        weights: [M] factors, or None for a plain sum.

    Returns:
        [N, H] in the dtype of ``rows``; accumulated in float32 (float64 for float64 rows).

    >>> m = build_map(torch.tensor([[1, -1], [0, 1], [-1, 1]]), torch.tensor([1, 3]), alignment=2)
    >>> rows = torch.tensor([[1.0], [0.0], [2.0], [3.0], [4.0], [0.0]])
    >>> reduce(rows, m, 3, None).flatten().tolist()
    [2.0, 4.0, 4.0]
    """
    if (kernels := _kernels_for(rows, weights)) is not None:
        return kernels.reduce_rows(rows, _table(kernels, expert_map, num_rows), weights)
    total = rows.new_zeros((num_rows, rows.shape[1]), dtype=accumulator_dtype(rows.dtype))
    # One pass per place in the sum: within a pass no token row occurs twice.
    for turn in range(expert_map.num_turns):
        now = expert_map.turn == turn
        position = expert_map.position[now]
        part = rows[position].to(total.dtype)
        if weights is not None:
            part = part * weights[position].to(total.dtype).unsqueeze(1)
        total.index_add_(0, expert_map.row[now], part)
    return total.to(rows.dtype)


def expand_weights(topk_weights: Tensor, expert_map: ExpertMap) -> Tensor:
    """[N, K] -> [M]: each choice's number to its expert row; 0 in padding.

    >>> m = build_map(torch.tensor([[1, -1], [0, 1], [-1, 1]]), torch.tensor([1, 3]), alignment=2)
    >>> expand_weights(torch.tensor([[1., 0.], [3., 4.], [0., 6.]]), m).tolist()
    [3.0, 0.0, 1.0, 4.0, 6.0, 0.0]
    """
    out = topk_weights.new_zeros(expert_map.num_rows)
    out[expert_map.position] = topk_weights[expert_map.row, expert_map.choice]
    return out


def collapse_weights(weights: Tensor, expert_map: ExpertMap, num_rows: int) -> Tensor:
    """[M] -> [N, K]: the inverse of :func:`expand_weights`; 0 where a choice is not here."""
    out = weights.new_zeros((num_rows, expert_map.top_k))
    out[expert_map.row, expert_map.choice] = weights[expert_map.position]
    return out


def _table(kernels: ModuleType, expert_map: ExpertMap, num_rows: int) -> Tensor:
    m = expert_map
    return kernels.expert_rows_of(m.row, m.turn, m.position, num_rows=num_rows, top_k=m.top_k)


def _kernels_for(*tensors: Tensor | None) -> ModuleType | None:
    """The Triton kernels, if they can do this: on CUDA, eagerly, and without autograd's records."""
    given = [t for t in tensors if t is not None]
    if not given[0].is_cuda or torch.compiler.is_compiling():
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return None
    # Not at the top: it imports Triton, which takes longer than all of this package.
    from dualpipe_ext.kernels import permute

    return permute if permute.AVAILABLE else None
