"""The language model cut into pipeline stages, with an initialisation that no cut changes.

N sequences, L positions, H hidden, V vocabulary, S physical expert slots, R expert-parallel ranks.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dualpipe_ext.ep import Buffer
from dualpipe_ext.memory import MemoryPlan
from dualpipe_ext.models.config import ModelConfig
from dualpipe_ext.models.layers import RMSNorm
from dualpipe_ext.models.moe import Experts, MoELayer
from dualpipe_ext.pipeline.overlap import Phase
from dualpipe_ext.pipeline.weight_grad import linear


class LanguageModelStage(nn.Module):
    """A run of layers, with the embedding before the first and the head after the last.

    Parameters are named by their layer in the whole model ("layers.3.attention.qkv.weight"), so a
    checkpoint and the initialisation know them wherever the model was cut.
    """

    def __init__(
        self, config: ModelConfig, layers: range, *, buffer: Buffer, replica_offset: int = 0
    ) -> None:
        super().__init__()
        self.memory = MemoryPlan.of_level(config.memory_level)
        self.embedding = None
        if layers.start == 0:
            self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleDict(
            {
                str(index): MoELayer(config, buffer=buffer, replica_offset=replica_offset)
                for index in layers
            }
        )
        self.norm = self.head = None
        if layers.stop == config.num_layers:
            self.norm = RMSNorm(config.hidden)
            self.head = nn.Linear(config.hidden, config.vocab_size, bias=False)

    def is_expert(self, name: str) -> bool:
        """Whether the parameter ``name`` belongs to routed experts (and so to this rank alone)."""
        return isinstance(self.get_submodule(name.rpartition(".")[0]), Experts)

    def phases(self) -> list[Phase]:
        """All layers' phases; the embedding joins the first, the head is a phase of its own."""
        phases = [p for index, layer in self.layers.items() for p in layer.phases(f"{index}.")]
        if self.embedding is not None:
            first, embedding = phases[0], self.embedding
            phases[0] = Phase(first.name, "compute", lambda tokens: first.fn(embedding(tokens)))
        if self.head is not None:
            phases.append(Phase("head", "compute", self._head))
        return phases

    def _head(self, x: Tensor) -> tuple[Tensor]:
        kept = self.norm.kept(x, self.memory)
        return (linear(self.norm(x), self.head.weight, kept=kept),)

    def forward(self, x: Tensor) -> Tensor:
        """Token ids int64 [N, L] (first stage) or activations [N, L, H] -> activations [N, L, H]
        or, on the last stage, logits [N, L, V]."""
        state: tuple[Any, ...] = (x,)
        for phase in self.phases():
            state = phase.fn(*state)
        return state[0]


def split_layers(num_layers: int, num_stages: int) -> list[range]:
    """Cut ``num_layers`` into ``num_stages`` runs that differ by at most one layer.

    >>> split_layers(5, 2)
    [range(0, 3), range(3, 5)]
    """
    if num_layers < num_stages:
        raise ValueError(
            f"expected at least one layer per stage: {num_stages} stages, got {num_layers} layers"
        )
    short, extra = divmod(num_layers, num_stages)
    ends = [(s + 1) * short + min(s + 1, extra) for s in range(num_stages)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


@torch.no_grad()
def initialize(
    stage: LanguageModelStage,
    config: ModelConfig,
    *,
    seed: int,
    local_experts: dict[int, Sequence[int]],
) -> None:
    """Draw every parameter from a generator seeded by its name, and each expert by its own.

    So the same seed gives the same model for every pipeline and expert-parallel size, and replicas
    start equal.

    Args:
        local_experts: for each layer, the logical expert in each of this rank's slots.
    """
    residual_scale = 1.0 / math.sqrt(2 * config.num_layers)
    for name, parameter in stage.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)  # RMSNorm
            continue
        into_residual = name.endswith(("out.weight", "down.weight", "experts.down"))
        std = 0.02 * (residual_scale if into_residual else 1.0)
        if not stage.is_expert(name):
            _draw(parameter, f"{seed}:{name}", std)
            continue
        layer = int(name.split(".")[1])
        for slot, expert in enumerate(local_experts[layer]):
            _draw(parameter[slot], f"{seed}:{name}:{expert}", std)


def _draw(tensor: Tensor, key: str, std: float) -> None:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    # On the CPU in float32, whatever the model's device and precision: the same numbers everywhere.
    tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
