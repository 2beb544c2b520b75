"""Dense building blocks of the language model: RMSNorm, rotary attention, the shared expert.

N sequences, L positions, H hidden, A heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualpipe_ext.kernels.rmsnorm import rms_norm
from dualpipe_ext.kernels.rotary import rotary
from dualpipe_ext.kernels.swiglu import swiglu
from dualpipe_ext.memory import Kept, MemoryPlan, in_fp8, recomputed, saved_as
from dualpipe_ext.models.config import ModelConfig
from dualpipe_ext.pipeline.weight_grad import linear

EPS = 1e-6


class RMSNorm(nn.Module):
    """The fused RMSNorm over rows of ``hidden`` values."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., H] -> [..., H]."""
        return rms_norm(x, self.weight, EPS)

    def kept(self, x: Tensor, memory: MemoryPlan) -> Kept | None:
        """How what consumes the norm of ``x`` keeps it: None for as it is."""
        return recomputed(_norm, x, self.weight) if memory.recompute else None


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS)


def kept_swiglu(
    x: Tensor, weights: Tensor | None, memory: MemoryPlan
) -> tuple[Tensor, Kept | None]:
    """SwiGLU, and how what consumes it keeps it.

    Args:
        x: [M, 2I].
        weights: [M], or None; see :func:`swiglu`.

    Returns:
        [M, I], and what to give the linear layer behind: None to keep it as it is.
    """
    if not memory.recompute:
        return swiglu(x, weights), None
    if not (memory.fp8_swiglu and torch.is_grad_enabled()):
        return swiglu(x, weights), recomputed(swiglu, x, weights)
    inputs = in_fp8(x)
    with saved_as(x, inputs):
        return swiglu(x, weights), recomputed(swiglu, inputs, weights)


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.memory = MemoryPlan.of_level(config.memory_level)
        self.rope_base = config.rope_base
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x: Tensor, *, kept: Kept | None = None) -> Tensor:
        """``x`` [N, L, H] -> [N, L, H]; ``x`` is kept as ``kept`` for the gradient of a weight."""
        heads = linear(x, self.qkv.weight, kept=kept)
        query, key, value = rotary(heads, self.num_heads, self.rope_base)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        # What attention returned is kept for its own backward; some kernels need a copy here.
        kept = recomputed(_join_heads, mixed) if self.memory.recompute else None
        return linear(_join_heads(mixed), self.out.weight, kept=kept)


def _join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # [N, A, L, H/A] -> [N, L, H]


class SharedExpert(nn.Module):
    """The SwiGLU expert that every token passes through."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.memory = MemoryPlan.of_level(config.memory_level)
        self.gate_up = nn.Linear(config.hidden, 2 * config.shared_hidden, bias=False)
        self.down = nn.Linear(config.shared_hidden, config.hidden, bias=False)

    def forward(self, x: Tensor, *, kept: Kept | None = None) -> Tensor:
        """``x`` [T, H] -> [T, H]; ``x`` is kept as ``kept`` for the gradient of a weight."""
        gate_up = linear(x, self.gate_up.weight, kept=kept)
        activated, kept_activated = kept_swiglu(gate_up, None, self.memory)
        return linear(activated, self.down.weight, kept=kept_activated)
