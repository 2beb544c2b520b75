"""Sizes of the language model, and the presets ``dualpipe train`` offers."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from dualpipe_ext.ep.fp8 import BLOCK
from dualpipe_ext.memory.levels import MemoryPlan


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes of a DeepSeek-style Mixture-of-Experts language model.

    Attributes:
        vocab_size: number of token ids; 256 for bytes.
        hidden: width H of the residual stream.
        num_layers: transformer layers, each with attention and a MoE block.
        num_heads: attention heads; each is ``hidden // num_heads`` wide.
        num_experts: routed (logical) experts E per layer.
        top_k: experts K that each token uses.
        num_groups: groups the experts are divided into for group-limited routing.
        top_groups: groups that a token may choose its experts from.
        expert_hidden: inner width I of a routed expert's SwiGLU.
        shared_hidden: inner width of the shared expert, which sees every token; 0 for none.
        route_scale: factor on the normalised routing weights (DeepSeek-V3: 2.5).
        rope_base: base of the rotary position embedding.
        memory_level: which activations are kept for the backward, 0 (all) to 3 (fewest); see
            :class:`dualpipe_ext.memory.MemoryPlan`. No size, and nothing of the parameters.
        fp8_experts: multiply in FP8 in the routed experts, forward and backward; ``hidden`` and
            ``expert_hidden`` are then multiples of 128.
    """

    vocab_size: int = 256
    hidden: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_experts: int = 16
    top_k: int = 4
    num_groups: int = 4
    top_groups: int = 2
    expert_hidden: int = 64
    shared_hidden: int = 128
    route_scale: float = 2.5
    rope_base: float = 10_000.0
    memory_level: int = 1
    fp8_experts: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value <= 0 and field.name not in ("shared_hidden", "memory_level", "fp8_experts"):
                raise ValueError(f"expected a positive {field.name}, got {value}")
        _expect_divides("num_heads", self.num_heads, "hidden", self.hidden)
        if (self.hidden // self.num_heads) % 2:
            raise ValueError(
                f"expected an even head width for rotary embedding, "
                f"got hidden // num_heads = {self.hidden // self.num_heads}"
            )
        _expect_divides("num_groups", self.num_groups, "num_experts", self.num_experts)
        if self.top_groups > self.num_groups:
            raise ValueError(
                f"expected top_groups of at most num_groups = {self.num_groups}, "
                f"got {self.top_groups}"
            )
        reachable = self.top_groups * (self.num_experts // self.num_groups)
        if self.top_k > reachable:
            raise ValueError(
                f"expected top_k of at most {reachable} "
                f"(the experts in {self.top_groups} groups), got {self.top_k}"
            )
        for name in ("hidden", "expert_hidden") if self.fp8_experts else ():
            if getattr(self, name) % BLOCK:
                raise ValueError(
                    f"expected {name} to be a multiple of {BLOCK} for fp8_experts, "
                    f"got {getattr(self, name)}"
                )
        self._check_memory_level()

    def _check_memory_level(self) -> None:
        plan = MemoryPlan.of_level(self.memory_level)
        widths = {"hidden": self.hidden} if plan.fp8_rows else {}
        if plan.fp8_swiglu:
            widths["2 * expert_hidden"] = 2 * self.expert_hidden
            widths["2 * shared_hidden"] = 2 * self.shared_hidden
        for name, width in widths.items():
            if width % BLOCK:
                raise ValueError(
                    f"expected {name} to be a multiple of {BLOCK} for memory_level "
                    f"{self.memory_level}, which keeps it in FP8, got {width}"
                )

    def with_overrides(self, **overrides: Any) -> ModelConfig:
        """A copy in which every override that is not ``None`` replaces the preset's value."""
        return replace(self, **{k: v for k, v in overrides.items() if v is not None})


def _expect_divides(name: str, value: int, of_name: str, of: int) -> None:
    if of % value:
        raise ValueError(f"expected {name} to divide {of_name} = {of}, got {value}")


PRESETS = {
    # Trains on two CPU cores in a few minutes.
    "tiny": ModelConfig(),
    # A few hundred million parameters: a first run on GPUs.
    "small": ModelConfig(
        hidden=1024,
        num_layers=8,
        num_heads=16,
        num_experts=64,
        top_k=6,
        num_groups=8,
        top_groups=4,
        expert_hidden=512,
        shared_hidden=1024,
    ),
}
