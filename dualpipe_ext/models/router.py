"""Group-limited sigmoid routing with bias-based balancing, as in DeepSeek-V3.

T tokens, H hidden, E experts, K top-k, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualpipe_ext.models.config import ModelConfig


class Router(nn.Module):
    """Chooses K of E experts for each token.

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

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Route ``x`` [T, H].

        Returns:
            ``topk_idx`` int64 [T, K] of logical experts, and ``topk_weights`` [T, K] in float32
            (float64 for a float64 model), differentiable with respect to ``x`` and the weight.
        """
        # In float32 whatever the model's precision: rounding must not decide who is chosen.
        wide = torch.promote_types(x.dtype, torch.float32)
        scores = torch.sigmoid(nn.functional.linear(x.to(wide), self.weight.to(wide)))
        with torch.no_grad():
            topk_idx = self._select(scores + self.bias.to(wide))
        chosen = scores.gather(1, topk_idx)
        topk_weights = chosen / chosen.sum(dim=1, keepdim=True) * self.route_scale
        return topk_idx, topk_weights

    def _select(self, biased: Tensor) -> Tensor:
        grouped = biased.view(biased.shape[0], self.num_groups, -1)  # [T, G, E/G]
        group_scores = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(dim=2)
        groups = group_scores.topk(self.top_groups, dim=1).indices
        closed = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, groups, False)
        open_scores = grouped.masked_fill(closed.unsqueeze(2), float("-inf")).flatten(1)
        return open_scores.topk(self.top_k, dim=1).indices

    @torch.no_grad()
    def update_bias(self, counts: Tensor, *, rate: float) -> None:
        """Move each expert's bias by ``rate`` toward a load equal to the mean.

        Args:
            counts: [E] tokens that chose each expert in the last step, over all ranks.
            rate: the bias update speed (DeepSeek-V3: 0.001).
        """
        load = counts.to(self.bias.dtype)
        self.bias.add_(torch.sign(load.mean() - load), alpha=rate)
