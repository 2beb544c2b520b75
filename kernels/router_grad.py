"""The gradient of the router's weights with respect to its logits, in one kernel.

With scores ``s`` of a token's choices and ``w_i = scale s_i / sum(s)``, the gradient of the loss
for ``s_j`` is ``scale / sum(s) (g_j - sum(g s) / sum(s))``, and the slope of the sigmoid is
``s (1 - s)``. Experts that were not chosen get zero. In torch operations that is fifteen kernels.

T tokens, E experts, K top-k.
"""

from __future__ import annotations

import torch
from dualpipe_ext.kernels.backend import runs_triton
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform that torch runs on
    triton = None

# (token, choice) pairs of one program, and logits that it fills at a time.
_PAIRS, _COLUMNS = 64, 256


def route_grad(
    grad_weights: Tensor,
    topk_idx: Tensor,
    scores: Tensor,
    *,
    num_experts: int,
    route_scale: float,
) -> Tensor:
    """Gradient of the logits.

    Args:
        grad_weights: [T, K], of the weights, in the dtype of ``scores``.
        topk_idx: int64 [T, K] contiguous, the experts chosen, all different in a row.
        scores: float32 or float64 [T, K] contiguous, their sigmoids.

    Returns:
        [T, E] in the dtype of ``scores``.

    Example: scores [[0.5, 0.25]] of experts [[2, 0]] out of 3, gradients [[1, 0]] and scale 3 give
    [[-0.5, 0, 0.333333]].
    """
    if not runs_triton(scores):
        total = scores.sum(dim=1, keepdim=True)
        mean = (grad_weights * scores).sum(dim=1, keepdim=True) / total
        grad = (grad_weights - mean) * (route_scale / total) * scores * (1 - scores)
        return grad.new_zeros(len(grad), num_experts).scatter_(1, topk_idx, grad)
    num_tokens, top_k = scores.shape
    out = torch.empty(num_tokens, num_experts, dtype=scores.dtype, device=scores.device)
    if num_tokens == 0:
        return out
    padded = triton.next_power_of_2(top_k)
    tokens = max(1, _PAIRS // padded)
    with torch.cuda.device_of(scores):
        _kernel[(triton.cdiv(num_tokens, tokens),)](
            # Autograd may hand over an expanded gradient (of a sum), whose strides are 0.
            grad_weights.contiguous(),
            topk_idx,
            scores,
            out,
            num_tokens,
            num_experts,
            float(route_scale),
            TOP_K=top_k,
            TOP_K_PADDED=padded,
            TOKENS=tokens,
            COLUMNS=_COLUMNS,
        )
    return out


if triton is not None:

    @triton.jit
    def _kernel(
        grad_weights_ptr,
        topk_idx_ptr,
        scores_ptr,
        out_ptr,
        num_tokens,
        num_experts,
        route_scale,
        TOP_K: tl.constexpr,  # noqa: N803  Triton's convention for compile-time arguments
        TOP_K_PADDED: tl.constexpr,  # noqa: N803
        TOKENS: tl.constexpr,  # noqa: N803
        COLUMNS: tl.constexpr,  # noqa: N803
    ):
        token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        choice = tl.arange(0, TOP_K_PADDED)
        there = token < num_tokens
        inside = there[:, None] & (choice < TOP_K)[None, :]
        at = token[:, None] * TOP_K + choice[None, :]
        expert = tl.load(topk_idx_ptr + at, inside, other=0)
        score = tl.load(scores_ptr + at, inside, other=0.0)
        grad = tl.load(grad_weights_ptr + at, inside, other=0.0)
        total = tl.where(there, tl.sum(score, axis=1), 1.0)
        mean = tl.sum(grad * score, axis=1) / total
        grad = (grad - mean[:, None]) * (route_scale / total)[:, None] * score * (1.0 - score)
        rows = out_ptr + token * num_experts
        for start in range(0, num_experts, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            zeros = tl.zeros([TOKENS, COLUMNS], dtype=tl.float32)
            tl.store(
                rows[:, None] + column[None, :],
                zeros,
                there[:, None] & (column < num_experts)[None, :],
            )
        # Other threads may have filled the places of the chosen.
        tl.debug_barrier()
        tl.store(rows[:, None] + expert, grad, inside)
