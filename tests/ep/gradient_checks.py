"""What every rank checks of gradients through a transport.

Shapes: R ranks, T tokens of a rank, H hidden, E experts, K top-k, N token rows, M expert rows.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dualpipe_ext.ep import Buffer
from tests.ep.cases import KINDS, Case, make_case
from tests.ep.rank_checks import LAYOUTS, leaf, scramble
from tests.ep.ranks import Ranks


def gradients_equal_dense(ranks: Ranks) -> None:
    """float64 gradients of everything differentiable, against one process without dispatch."""
    rank, num_ranks = ranks.rank, ranks.num_ranks
    cases = {kind: make_case(kind, num_ranks, dtype=torch.float64) for kind in KINDS}
    buffer = ranks.make_buffer(cases[KINDS[0]])
    for kind, case in cases.items():
        want = ranks.once(functools.partial(_dense, case))
        for mode in ("token", "expert", "expert_weights", "checkpoint"):
            got = _distributed(ranks, case, buffer, mode)
            for name, tensor in got.items():
                wanted = want[name][rank]
                error = (tensor.detach().cpu() - wanted).abs()
                worst = float(error.max()) if error.numel() else 0.0
                assert worst <= 1e-12, f"{kind} {mode}: {name} differs by {worst}"


def _parameters(case: Case) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Expert weights [E, H, H], and per rank the bias and the loss weight of each output."""
    gen = torch.Generator().manual_seed(7)
    hidden = case.xs[0].shape[1]
    experts = torch.randn(case.num_experts, hidden, hidden, generator=gen, dtype=torch.float64)
    biases = [torch.randn(x.shape, generator=gen, dtype=torch.float64) for x in case.xs]
    loss_weights = [torch.randn(x.shape, generator=gen, dtype=torch.float64) for x in case.xs]
    return experts / hidden, biases, loss_weights


def _dense(case: Case) -> dict[str, list[Tensor]]:
    """y_t = bias_t + sum over k of w_tk * tanh(x_t W_e), all ranks' tokens in one graph."""
    experts, biases, loss_weights = _parameters(case)
    experts.requires_grad_()
    xs, weights, biases = (
        [t.clone().requires_grad_() for t in ts] for ts in (case.xs, case.topk_weights, biases)
    )
    ys = []
    for x, idx, w, bias in zip(xs, case.topk_idx, weights, biases, strict=True):
        y = bias
        for k in range(case.top_k):
            out = torch.tanh(torch.einsum("th,thg->tg", x, experts[idx[:, k].clamp_min(0)]))
            y = y + out * (w[:, k] * (idx[:, k] >= 0)).unsqueeze(1)
        ys.append(y)
    loss = sum((y * c).sum() for y, c in zip(ys, loss_weights, strict=True))
    loss.backward()
    return {
        "y": [y.detach() for y in ys],
        "x": [x.grad for x in xs],
        "topk_weights": [w.grad for w in weights],
        "bias": [b.grad for b in biases],
        "experts": list(experts.grad.chunk(len(xs))),
    }


def _distributed(ranks: Ranks, case: Case, buffer: Buffer, mode: str) -> dict[str, Tensor]:
    rank, num_ranks, device = ranks.rank, ranks.num_ranks, ranks.device
    all_experts, biases, loss_weights = _parameters(case)
    experts = all_experts.chunk(num_ranks)[rank].clone().to(device).requires_grad_()
    x, w, bias = (
        t[rank].clone().to(device).requires_grad_() for t in (case.xs, case.topk_weights, biases)
    )
    idx = case.topk_idx[rank].to(device)

    def layer(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        if mode == "token":
            recv, handle = buffer.dispatch(x, idx, w)
            rows = torch.zeros_like(recv.tokens)
            for k in range(case.top_k):
                here = recv.topk_idx[:, k]
                each = experts[here.clamp_min(0)]
                out = torch.tanh(torch.einsum("nh,nhg->ng", recv.tokens, each))
                rows = rows + out * recv.topk_weights[:, k : k + 1]
            return buffer.combine(rows, handle, bias=bias)[0]
        recv, handle = buffer.dispatch(x, idx, w, layout="expert", alignment=4)
        starts = [0, *recv.offsets.tolist()]
        rows = torch.cat(
            [
                torch.tanh(recv.tokens[start:end] @ weight)
                for start, end, weight in zip(starts[:-1], starts[1:], experts, strict=True)
            ]
        )
        if mode == "expert":
            rows = rows * recv.weights.unsqueeze(1)
            return buffer.combine(rows, handle, bias=bias)[0]
        return buffer.combine(rows, handle, weights=recv.weights, bias=bias)[0]

    if mode == "checkpoint":
        y = checkpoint(layer, x, w, bias, use_reentrant=False)
    else:
        y = layer(x, w, bias)
    (y * loss_weights[rank].to(device)).sum().backward()
    return {
        "y": y,
        "x": x.grad,
        "topk_weights": w.grad,
        "bias": bias.grad,
        "experts": experts.grad,
    }


def gradients_join_everywhere(ranks: Ranks) -> None:
    """A rank that needs no gradient, or uses only some outputs, takes part all the same."""
    rank, num_ranks, device = ranks.rank, ranks.num_ranks, ranks.device
    case = make_case("uneven", num_ranks, dtype=torch.float64)
    buffer = ranks.make_buffer(case)
    needs_grad = rank == 0
    x = leaf(case.xs[rank], device, needs_grad)
    w = leaf(case.topk_weights[rank], device, needs_grad)
    recv, handle = buffer.dispatch(x, case.topk_idx[rank].to(device), w)
    rows = recv.tokens
    if rank % 2:
        # Only odd ranks use the weights: even ones have no gradient for them.
        rows = rows * recv.topk_weights.sum(1, keepdim=True)
    y, _ = buffer.combine(rows, handle)
    y.sum().backward()
    assert (x.grad is not None) == needs_grad
    if needs_grad:
        per_rank = case.num_experts // num_ranks
        at = case.topk_idx[0] // per_rank
        odd = (at % 2 == 1) & (case.topk_idx[0] >= 0)
        want_w = case.xs[0].sum(1, keepdim=True) * odd
        assert torch.allclose(w.grad.cpu(), want_w, rtol=0, atol=1e-12)
    # Without any use of the rows, the weights alone lead back.
    x2 = leaf(case.xs[rank], device)
    recv, _ = buffer.dispatch(x2, handle=handle, topk_weights=w)
    recv.topk_weights.sum().backward()
    assert torch.equal(x2.grad, torch.zeros_like(x2))
    with torch.no_grad():
        recv, _ = buffer.dispatch(x, handle=handle)
        assert not recv.tokens.requires_grad


def fp8_gradient_is_straight_through(ranks: Ranks) -> None:
    """The gradient is that of a dispatch without quantisation."""
    rank, num_ranks, device = ranks.rank, ranks.num_ranks, ranks.device
    for how in LAYOUTS:
        case = make_case("uneven", num_ranks, dtype=torch.bfloat16, hidden=128)
        # The rows that come back are float32.
        buffer = ranks.make_buffer(case, dtype=torch.float32)
        grads = []
        for fp8 in (False, True):
            x = leaf(case.xs[rank], device)
            recv, handle = buffer.dispatch(x, case.topk_idx[rank].to(device), fp8=fp8, **how)
            rows = recv.dequantize(torch.float32) if fp8 else recv.tokens.float()
            gain = scramble(torch.empty(rows.shape, dtype=torch.float32), 3).to(device)
            y, _ = buffer.combine(rows * gain, handle)
            (y * scramble(torch.empty(y.shape, dtype=torch.float32), 4).to(device)).sum().backward()
            grads.append(x.grad)
        assert torch.equal(*grads)
        assert grads[0].dtype == torch.bfloat16


def padding_rows_do_not_matter(ranks: Ranks) -> None:
    """Whatever a GEMM leaves in padding rows reaches neither outputs nor gradients."""
    rank, num_ranks, device = ranks.rank, ranks.num_ranks, ranks.device
    case = make_case("uneven", num_ranks)
    buffer = ranks.make_buffer(case)
    results = []
    for filler in (0.0, float("nan")):
        x = leaf(case.xs[rank], device)
        w = leaf(case.topk_weights[rank], device)
        recv, handle = buffer.dispatch(
            x, case.topk_idx[rank].to(device), w, layout="expert", alignment=4, max_recv_tokens=200
        )
        padding = recv.weights.detach() == 0
        rows = torch.where(padding.unsqueeze(1), filler, recv.tokens)
        gain = torch.ones((), device=device, requires_grad=True)
        y, _ = buffer.combine(rows, handle, weights=recv.weights * gain)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, w.grad, gain.grad))
    for zeros, nans in zip(*results, strict=True):
        assert torch.equal(zeros, nans)
