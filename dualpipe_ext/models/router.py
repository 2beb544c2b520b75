"""Group-limited sigmoid routing with bias-based balancing, as in DeepSeek-V3.

Here belong the router's parameters and its matrix product; the choice itself, which needs no
parameters, is ``kernels/router.py``.

T tokens, H hidden, E experts, K top-k, X most replicas of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dualpipe_ext.kernels.bf16_parts import NUM_PARTS, bf16_parts
from dualpipe_ext.kernels.router import Routing, route
from dualpipe_ext.models.config import ModelConfig


class Router(nn.Module):
    """Chooses K of E experts for each token, and a replica of each.

    Source: DeepSeek-V3 technical report, section 2.1.2: sigmoid affinities; a bias that takes part
    in the selection only; a group's score is the sum of its two best experts; the chosen affinities
    are normalised to sum to one and scaled.

    The bias is no parameter: :meth:`update_bias` nudges it after each step toward equal loads.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_groups = config.num_groups
        self.top_groups = config.top_groups
        self.top_k = config.top_k
        self.route_scale = config.route_scale
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden))
        self.register_buffer("bias", torch.zeros(config.num_experts))

    def forward(
        self,
        x: Tensor,
        *,
        log2phy: Tensor | None = None,
        logcnt: Tensor | None = None,
        replica_offset: int = 0,
        split: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Routing:
        """Route ``x`` [T, H].

        Args:
            x: the tokens; they are not copied into a wider dtype if they are bfloat16.
            log2phy, logcnt, replica_offset, split, counts: as
                :func:`~dualpipe_ext.kernels.router.route` takes them.

        Returns:
            The :class:`~dualpipe_ext.kernels.router.Routing`: logical experts, weights in float32
            (float64 for a float64 model) with gradients to ``x`` and the weight, slots and counts.
        """
        return route(
            routing_logits(x, self.weight),
            self.bias,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            top_k=self.top_k,
            route_scale=self.route_scale,
            log2phy=log2phy,
            logcnt=logcnt,
            replica_offset=replica_offset,
            split=split,
            counts=counts,
        )

    @torch.no_grad()
    def update_bias(self, counts: Tensor, *, rate: float) -> None:
        """Move each expert's bias by ``rate`` toward a load equal to the mean.

        Args:
            counts: [E] tokens that chose each expert in the last step, over all ranks.
            rate: the bias update speed (DeepSeek-V3: 0.001).
        """
        load = counts.to(self.bias.dtype)
        self.bias.add_(torch.sign(load.mean() - load), alpha=rate)


def routing_logits(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in at least float32, whatever the model's precision.

    Rounding must not decide who is chosen. Where ``x`` is bfloat16, it would take a float32 copy of
    it, kept for the backward, and a product without tensor cores, or in TF32 if somebody has set
    that. Instead the weight is cut into three bfloat16 numbers that sum to it exactly; products of
    two bfloat16 numbers are exact in float32, in which tensor cores add them up: one bfloat16
    product with three times the columns. (Henry, Tang and Heinecke, "Leveraging the bfloat16
    artificial intelligence datatype for higher-precision computations", 2019.) No number is rounded
    but in the sums. Tensor cores round those toward zero, once for every 16 products, so that their
    error can be a few times that of float32 sums (Ootomo and Yokota, 2022): some 2**-16 of a logit,
    where rounding ``x`` to bfloat16 has cost 2**-9 of every term.

    Other dtypes take a plain product, in which float32 follows
    ``torch.set_float32_matmul_precision``: "highest" unless somebody asks for less.

    Args:
        x: floating [T, H].
        weight: floating [E, H].

    Returns:
        float32 [T, E], or float64 if ``x`` is. Gradients have the dtypes of ``x`` and ``weight``.
    """
    if x.dtype == torch.bfloat16:
        return _Bf16TimesFloat32.apply(x, weight)
    wide = torch.promote_types(x.dtype, torch.float32)
    return nn.functional.linear(x.to(wide), weight.to(wide))


# Orders of parts in which all products below find theirs next to each other: of the weight along E
# (its rows), of the gradient along E (its columns).
_OF_WEIGHT, _OF_GRAD = (2, 1, 0, 0), (2, 0, 1, 0)


class _Bf16TimesFloat32(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        parts = bf16_parts(weight.float(), _OF_WEIGHT[:NUM_PARTS], dim=0)  # [3E, H]
        low, middle, high = _mm(x, parts.t()).view(len(x), NUM_PARTS, len(weight)).unbind(1)
        return (low + middle) + high

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        num_experts = len(weight)
        g = bf16_parts(grad, _OF_GRAD, dim=1)  # [T, 4E]
        if ctx.needs_input_grad[0]:
            # Rounded to bfloat16 in the end: two parts each, without the product of the small ones,
            # are 2**8 times as exact: g0 w1 + g1 w0 + g0 w0, added up by the product.
            w = bf16_parts(weight.float(), _OF_WEIGHT[1:], dim=0)
            grad_x = g[:, num_experts:] @ w
        if ctx.needs_input_grad[1]:
            by_part = _mm(g[:, : NUM_PARTS * num_experts].t(), x).view(NUM_PARTS, *weight.shape)
            low, high, middle = by_part.unbind(0)
            grad_weight = ((low + middle) + high).to(weight.dtype)
        return grad_x, grad_weight


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """Product of two bfloat16 matrices, not rounded to bfloat16."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
