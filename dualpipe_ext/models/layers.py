"""Dense building blocks of the language model: rotary attention and the shared expert.

N sequences, L positions, H hidden, A heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualpipe_ext.kernels.swiglu import swiglu
from dualpipe_ext.models.config import ModelConfig


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary position embedding over the last dimension of ``x`` [N, A, L, H/A].

    Source: Su et al., RoFormer, 2021; pairs are (i, i + H/2A), as in GPT-NeoX.
    """
    half = x.shape[-1] // 2
    exponents = torch.arange(half, device=x.device, dtype=torch.float32) / half
    positions = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
    angles = positions[:, None] * base**-exponents  # [L, H/2A]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.rope_base = config.rope_base
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [N, L, H] -> [N, L, H]."""
        heads = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # [N, L, 3, A, H/A]
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = rotate(query, self.rope_base), rotate(key, self.rope_base)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class SharedExpert(nn.Module):
    """The SwiGLU expert that every token passes through."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden, 2 * config.shared_hidden, bias=False)
        self.down = nn.Linear(config.shared_hidden, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [T, H] -> [T, H]."""
        return self.down(swiglu(self.gate_up(x)))
