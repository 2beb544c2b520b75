"""Whether a dispatch or combine is right, before anybody times it.

Independent of the transports: from all ranks' inputs, gathered, by plain torch indexing, quick at
full size on a GPU. A dispatch must be equal bit for bit. A combine may differ from the float64 sum
by what the roundings of its definition can give.

Shapes: R ranks, T tokens of a rank, H hidden, L experts of a rank, K top-k, N token rows,
M expert rows. ``place`` numbers the tokens of all ranks: ``rank * T + token``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dualpipe_ext.bench.ep_cases import Case, Inputs, wire_rows
from dualpipe_ext.bench.ranks import Ranks

# Unit roundoff of bfloat16 and float32.
_U_BF16 = 2.0**-8
_U_F32 = 2.0**-24
# Bounds the memory of float64 temporaries.
_CHUNK = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where a rank's rows come from."""

    first_expert: int
    place: Tensor
    """int64 [N or M]: the token of each row, -1 in padding."""
    choice: Tensor | None
    """Expert layout: int64 [M], which of the token's K choices; -1 in padding."""
    counts: Tensor
    """int64 [L], rows of each expert."""
    offsets: Tensor
    """int64 [L], END row of each expert's group, padding included."""

    @property
    def num_rows(self) -> int:
        return len(self.place)


def placement(all_idx: Tensor, rank: int, num_local: int, case: Case) -> Placement:
    """The rows of one rank, as the documentation of TokenMajor and ExpertMajor orders them.

    Args:
        all_idx: int64 [R * T, K], every rank's choices.
        rank: the rank that receives.
        num_local: L.
        case: gives the layout and its alignment.

    Example: two ranks with two experts each, tokens a, b of rank 0 and c of rank 1.

    >>> idx = torch.tensor([[2, 3], [0, 2], [1, -1]])
    >>> from dualpipe_ext.bench.ep_cases import Case
    >>> placement(idx, 0, 2, Case("t", "dispatch", "token")).place.tolist()
    [1, 2]
    >>> p = placement(idx, 1, 2, Case("e", "dispatch", "expert", alignment=2))
    >>> p.place.tolist(), p.choice.tolist(), p.offsets.tolist()
    ([0, 1, 0, -1], [0, 1, 1, -1], [2, 4])
    """
    first = rank * num_local
    here = (all_idx >= first) & (all_idx < first + num_local)
    place, choice = here.nonzero(as_tuple=True)
    expert = all_idx[place, choice] - first
    counts = torch.bincount(expert, minlength=num_local)
    padded = (counts + case.alignment - 1).div(case.alignment, rounding_mode="floor")
    offsets = (padded * case.alignment).cumsum(0)
    if case.layout == "token":
        return Placement(first, here.any(1).nonzero().squeeze(1), None, counts, offsets)
    expert, order = expert.sort(stable=True)
    group_starts = offsets - padded * case.alignment
    in_group = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[expert]
    row = group_starts[expert] + in_group
    sources = torch.full((2, int(offsets[-1])), -1, device=row.device)
    sources[:, row] = torch.stack([place[order], choice[order]])
    return Placement(first, sources[0], sources[1], counts, offsets)


def placements(inputs: Inputs, ranks: Ranks, num_local: int, case: Case) -> list[Placement]:
    """:func:`placement` of every rank."""
    return [placement(inputs.all_idx, r, num_local, case) for r in range(ranks.num_ranks)]


def wrong_dispatch(received: object, case: Case, inputs: Inputs, at: Placement) -> str | None:
    """What is wrong with received rows, in one line; None if nothing is.

    Args:
        received: has ``tokens`` [rows, H]; whatever else :class:`~dualpipe_ext.ep.Received` has is
            checked where it is there. Rows beyond those of ``at`` must be zero.
        case: what was asked for.
        inputs: what all ranks sent.
        at: the placement of this rank.
    """
    tokens, scales = received.tokens, getattr(received, "scales", None)
    if len(tokens) < at.num_rows:
        return f"expected at least {at.num_rows} rows, got {len(tokens)}"
    if case.fp8:
        wanted = {"tokens": (tokens, inputs.all_quantised.values)}
        wanted["scales"] = (scales, inputs.all_quantised.scales)
    else:
        wanted = {"tokens": (tokens, inputs.all_x)}
    for name, (got, source) in wanted.items():
        if got is None or got.dtype != source.dtype:
            return f"expected {name} of {source.dtype}, got {None if got is None else got.dtype}"
        if (wrong := _wrong_rows(got, source, at)) is not None:
            return f"{name}: {wrong}"
    return _wrong_details(received, inputs, at)


def wrong_push(rows: Tensor, case: Case, inputs: Inputs, at: Placement, rank: int) -> str | None:
    """What is wrong with rows that were pushed, in one line; None if nothing is.

    Args:
        rows: uint8 [R * T, B], what this rank got into memory that was zero.
        case: what was asked for.
        inputs: what all ranks sent.
        at: the placement of this rank, in token layout.
        rank: this rank; its own rows are not moved, so they are zero.
    """
    source = wire_rows(inputs.all_quantised if case.fp8 else inputs.all_x)
    if rows.shape != source.shape:
        return f"expected rows {tuple(source.shape)}, got {tuple(rows.shape)}"
    num_tokens = len(inputs.topk_idx)
    own = at.place.div(num_tokens, rounding_mode="floor") == rank
    place = torch.full((len(rows),), -1, device=at.place.device)
    place[: at.num_rows] = torch.where(own, -1, at.place)
    return _wrong_rows(rows, source, replace(at, place=place))


def _wrong_rows(got: Tensor, source: Tensor, at: Placement) -> str | None:
    """Compare bits, a chunk at a time."""
    num_wrong, first = 0, None
    for begin in range(0, len(got), _CHUNK):
        part = got[begin : begin + _CHUNK].contiguous().view(torch.uint8)
        want = torch.zeros_like(part)
        place = at.place[begin : begin + _CHUNK]
        filled = (place >= 0).nonzero().squeeze(1)
        want[filled] = source.view(torch.uint8)[place[filled]]
        differs = (part != want).any(1)
        if bool(differs.any()):
            first = begin + int(differs.nonzero()[0]) if first is None else first
            num_wrong += int(differs.sum())
    if first is None:
        return None
    return f"{num_wrong} of {len(got)} rows differ, the first is row {first}"


def _wrong_details(received: object, inputs: Inputs, at: Placement) -> str | None:
    """Ids, weights, counts and offsets, as far as they are there."""
    num_rows = len(received.tokens)
    if at.choice is None:
        idx, weights = inputs.all_idx[at.place], inputs.all_weights[at.place]
        here = (idx >= at.first_expert) & (idx < at.first_expert + len(at.counts))
        wanted = {
            "topk_idx": _padded(torch.where(here, idx - at.first_expert, -1), num_rows, -1),
            "topk_weights": _padded(torch.where(here, weights, 0), num_rows, 0),
        }
    else:
        weights = inputs.all_weights[at.place.clamp_min(0), at.choice.clamp_min(0)]
        weights = torch.where(at.place >= 0, weights, 0)
        wanted = {"weights": _padded(weights, num_rows, 0), "offsets": at.offsets.int()}
    wanted["counts"] = at.counts
    for name, want in wanted.items():
        got = getattr(received, name, None)
        if got is not None and not torch.equal(got, want):
            return f"{name} differ"
    return None


def _padded(values: Tensor, num_rows: int, fill: int) -> Tensor:
    """``values`` with rows of ``fill`` behind them."""
    missing = values.new_full((num_rows - len(values), *values.shape[1:]), fill)
    return torch.cat([values, missing])


def wrong_combine(
    y: Tensor, all_rows: list[Tensor], at: list[Placement], rank: int, top_k: int
) -> str | None:
    """What is wrong with a combined output, in one line; None if nothing is.

    Each rank's part of a token is rounded to bfloat16 once and the total once: at most
    ``2^-8 * sum|part|`` and ``2^-8 * |total| (1 + 2^-8)``. Float32 sums of at most K + R terms add
    less than ``(K + R) * 2^-24 * sum|row|``.

    Args:
        y: bfloat16 [T, H], what this rank got.
        all_rows: bfloat16 [N or M, H] of every rank, what the ranks combined.
        at: every rank's placement.
        rank: this rank.
        top_k: K.
    """
    num_tokens, hidden = y.shape
    exact = torch.zeros(num_tokens, hidden, dtype=torch.float64, device=y.device)
    magnitude = torch.zeros_like(exact)
    for rows, placed in zip(all_rows, at, strict=True):
        mine = (placed.place.div(num_tokens, rounding_mode="floor") == rank).nonzero().squeeze(1)
        for part in mine.split(_CHUNK):
            token = placed.place[part] - rank * num_tokens
            values = rows[part].double()
            exact.index_add_(0, token, values)
            magnitude.index_add_(0, token, values.abs())
    bound = magnitude.mul_(2.1 * _U_BF16 + (top_k + len(all_rows)) * _U_F32)
    if y.dtype != torch.bfloat16:
        return f"expected y of torch.bfloat16, got {y.dtype}"
    error = (y.double() - exact).abs_()
    # Not "error > bound": that is false where y is not a number.
    wrong = (~(error <= bound)).any(1)
    if not bool(wrong.any()):
        return None
    first = int(wrong.nonzero()[0])
    return (
        f"{int(wrong.sum())} of {num_tokens} tokens are beyond what rounding can explain, "
        f"the first is token {first}"
    )
