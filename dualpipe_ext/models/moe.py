"""The MoE transformer layer as four phases: attention, dispatch, experts, combine.

N sequences, L positions, T = N*L tokens, H hidden, E logical experts, S physical slots (experts and
their replicas, over all ranks), R expert-parallel ranks, K top-k, M received expert-major rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dualpipe_ext.ep import Buffer
from dualpipe_ext.eplb import count_experts, select_replicas
from dualpipe_ext.kernels.swiglu import swiglu
from dualpipe_ext.models.config import ModelConfig
from dualpipe_ext.models.layers import Attention, SharedExpert
from dualpipe_ext.models.router import Router
from dualpipe_ext.pipeline.fp8_linear import grouped_linear_fp8
from dualpipe_ext.pipeline.overlap import Phase
from dualpipe_ext.pipeline.weight_grad import grouped_linear


class Experts(nn.Module):
    """The routed experts in this rank's slots: SwiGLU with grouped GEMMs."""

    def __init__(self, config: ModelConfig, *, num_local_slots: int) -> None:
        super().__init__()
        hidden, inner = config.hidden, config.expert_hidden
        self.grouped_linear = grouped_linear_fp8 if config.fp8_experts else grouped_linear
        self.gate_up = nn.Parameter(torch.empty(num_local_slots, hidden, 2 * inner))
        self.down = nn.Parameter(torch.empty(num_local_slots, inner, hidden))

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """``rows`` [M, H] grouped by slot, ``offsets`` int32 [S/R] cumulative ends -> [M, H]."""
        inner = swiglu(self.grouped_linear(rows, self.gate_up, offsets))
        return self.grouped_linear(inner, self.down, offsets)


class MoELayer(nn.Module):
    """Attention and a Mixture-of-Experts block, pre-norm, with residuals.

    Args:
        config: sizes.
        buffer: the expert-parallel buffer; its experts are the S physical slots.
        replica_offset: staggers the ranks' round robin over replicas; use the rank.
    """

    def __init__(self, config: ModelConfig, *, buffer: Buffer, replica_offset: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.router = Router(config)
        self.experts = Experts(config, num_local_slots=buffer.config.num_local_experts)
        self.shared_expert = SharedExpert(config) if config.shared_hidden else None
        self.buffer = buffer
        self.replica_offset = replica_offset
        self.log2phy: Tensor | None = None  # int64 [E, X] slots of each expert; None: slot = expert
        self.logcnt: Tensor | None = None  # int64 [E] replicas of each expert
        # Tokens per logical expert since the last reset, for balancing; read by the trainer.
        self.register_buffer(
            "counts", torch.zeros(config.num_experts, dtype=torch.int64), persistent=False
        )

    def phases(self, prefix: str = "") -> list[Phase]:
        """The layer in the four steps that a pipeline can interleave with another's."""
        return [
            Phase(f"{prefix}attention", "compute", self._attention),
            Phase(f"{prefix}dispatch", "comm", self._dispatch),
            Phase(f"{prefix}experts", "compute", self._experts),
            Phase(f"{prefix}combine", "comm", self._combine),
        ]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [N, L, H] -> [N, L, H]: the phases one after the other."""
        state: tuple[Any, ...] = (x,)
        for phase in self.phases():
            state = phase.fn(*state)
        return state[0]

    def _attention(self, x: Tensor) -> tuple[Any, ...]:
        x = x + self.attention(self.attention_norm(x))
        normed = self.moe_norm(x).flatten(0, 1)  # [T, H]
        topk_idx, topk_weights = self.router(normed)
        if self.training:
            self.counts += count_experts(topk_idx, self.counts.numel())
        return x, normed, self._slots(topk_idx), topk_weights

    def _slots(self, topk_idx: Tensor) -> Tensor:
        if self.log2phy is None or self.logcnt is None:
            return topk_idx
        return select_replicas(topk_idx, self.log2phy, self.logcnt, offset=self.replica_offset)

    def _dispatch(
        self, x: Tensor, normed: Tensor, slot_idx: Tensor, topk_weights: Tensor
    ) -> tuple[Any, ...]:
        recv, handle = self.buffer.dispatch(normed, slot_idx, topk_weights, layout="expert")
        return x, normed, recv.tokens, recv.weights, recv.offsets, handle

    def _experts(
        self, x: Tensor, normed: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor, handle: Any
    ) -> tuple[Any, ...]:
        out = self.experts(rows, offsets)
        if self.shared_expert is not None:
            # Here and not in the attention phase: compute that can hide the other half's dispatch.
            x = x + self.shared_expert(normed).view_as(x)
        return x, out, weights, handle

    def _combine(self, x: Tensor, out: Tensor, weights: Tensor, handle: Any) -> tuple[Any, ...]:
        routed, _ = self.buffer.combine(out, handle, weights=weights)
        return (x + routed.view_as(x),)
