"""What every rank checks of CUDA graphs: replays with new inputs and routing equal eager calls.

Shapes: R ranks, T tokens of a rank, H hidden, K top-k, M rows of a fixed output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dualpipe_ext.ep import Buffer, Handle
from tests.ep.cases import Case, make_case
from tests.ep.rank_checks import LAYOUTS, expect_same_tensor
from tests.ep.ranks import Ranks

TOKENS = 24
ROOM = 1000  # R * T * K at 8 ranks, padding included


def graph_equals_eager(ranks: Ranks) -> None:
    """Dispatch, experts, combine and their backward, the routing found in the graph."""
    for how in LAYOUTS:
        case = _draw(ranks, 0)
        buffer = ranks.make_buffer(case)
        x, idx, weights = ranks.inputs(case)
        x.requires_grad_()

        def layer(
            x: Tensor = x,
            idx: Tensor = idx,
            weights: Tensor = weights,
            buffer: Buffer = buffer,
            how: dict = how,
        ) -> dict[str, Tensor]:
            recv, handle = buffer.dispatch(x, idx, weights, max_recv_tokens=ROOM, **how)
            if how["layout"] == "token":
                gains = recv.topk_weights.sum(1, keepdim=True).to(recv.tokens.dtype)
                rows, factors = recv.tokens * gains, None
            else:
                rows, factors = recv.tokens * _expert_of_row(recv.offsets), recv.weights
            y, _ = buffer.combine(rows.relu(), handle, weights=factors)
            (grad,) = torch.autograd.grad(y, x, y.detach())
            return {"recv": recv.tokens.detach(), "y": y.detach(), "x.grad": grad}

        _compare(ranks, buffer, layer, (x, idx, weights), f"{how}")


def graph_of_a_cached_handle(ranks: Ranks) -> None:
    """The routing is the handle's, found before; several calls of two handles in one graph."""
    case = _draw(ranks, 0)
    buffer = ranks.make_buffer(case)
    x, idx, weights = ranks.inputs(case)
    _, of_tokens = buffer.dispatch(x, idx, weights)
    _, of_experts = buffer.dispatch(x, idx.flip(0), weights, layout="expert", alignment=4)

    def layer() -> dict[str, Tensor]:
        results = {}
        handles: list[tuple[str, Handle]] = [("token", of_tokens), ("expert", of_experts)]
        for name, handle in handles * 2:
            recv, _ = buffer.dispatch(x, None, weights, handle=handle)
            y, _ = buffer.combine(recv.tokens * 2, handle, bias=x)
            results[f"{name} recv"], results[f"{name} y"] = recv.tokens.detach(), y.detach()
        return results

    _compare(ranks, buffer, layer, (x, None, weights), "cached")


def graph_of_groups(ranks: Ranks) -> None:
    """Groups of fixed size, and weights that come when the rows go back: what a server replays."""
    case = _draw(ranks, 0)
    buffer = ranks.make_buffer(case)
    x, idx, weights = ranks.inputs(case)

    @torch.no_grad()
    def layer() -> dict[str, Tensor]:
        recv, handle = buffer.dispatch(x, idx, layout="expert", rows_per_expert=ROOM)
        late, _ = buffer.dispatch_weights(weights, handle)
        y, _ = buffer.combine(recv.tokens * 2, handle, weights=late)
        groups = recv.tokens.view(len(recv.counts), ROOM, -1)
        filled = torch.arange(ROOM, device=x.device) < recv.counts.unsqueeze(1)
        return {"recv": groups.where(filled.unsqueeze(2), 0), "y": y, "counts": recv.counts}

    _compare(ranks, buffer, layer, (x, idx, weights), "groups")


def _draw(ranks: Ranks, seed: int) -> Case:
    """Every rank has the same T in all draws: the shapes of a graph are fixed."""
    return make_case(
        "uneven" if seed % 2 else "repeated",
        ranks.num_ranks,
        seed=seed,
        dtype=torch.bfloat16,
        hidden=64,
        tokens=TOKENS,
    )


def _expert_of_row(offsets: Tensor) -> Tensor:
    """[M, 1]: 1 + the expert of each row, as a factor."""
    rows = torch.arange(ROOM, device=offsets.device)
    return (
        (torch.searchsorted(offsets, rows, right=True, out_int32=True) + 1).unsqueeze(1).bfloat16()
    )


def _compare(
    ranks: Ranks,
    buffer: Buffer,
    layer: Callable[[], dict[str, Tensor]],
    inputs: tuple[Tensor | None, ...],
    what: str,
) -> None:
    def fill(seed: int) -> None:
        with torch.no_grad():
            for static, fresh in zip(inputs, ranks.inputs(_draw(ranks, seed)), strict=True):
                if static is not None:
                    static.copy_(fresh)

    for _ in range(2):
        layer()  # loads kernels and makes what is made once
    ranks.synchronize()
    replay, static_results = ranks.capture(layer)
    for seed in range(1, 9):
        fill(seed)
        replay()
        if seed % 3 == 0:
            # Nothing new: a replay may follow a replay at once.
            replay()
        results = {name: tensor.clone() for name, tensor in static_results.items()}
        for name, wanted in layer().items():
            expect_same_tensor(results[name], wanted, f"graph {what} replay {seed}: {name}")
    ranks.synchronize()
    buffer.check()
