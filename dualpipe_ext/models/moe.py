"""The MoE transformer layer as four phases: attention, dispatch, experts, combine.

N sequences, L positions, T = N*L tokens, H hidden, E logical experts, S physical slots (experts and
their replicas, over all ranks), R expert-parallel ranks, K top-k, M received expert-major rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dualpipe_ext.ep import Buffer
from dualpipe_ext.memory import MemoryPlan, in_fp8, saved_as
from dualpipe_ext.models.config import ModelConfig
from dualpipe_ext.models.layers import Attention, RMSNorm, SharedExpert, kept_swiglu
from dualpipe_ext.models.router import Router
from dualpipe_ext.pipeline.fp8_linear import grouped_linear_fp8
from dualpipe_ext.pipeline.overlap import Phase
from dualpipe_ext.pipeline.weight_grad import grouped_linear
from dualpipe_ext.sms import SMPartition


class Experts(nn.Module):
    """The routed experts in this rank's slots: SwiGLU with grouped GEMMs."""

    def __init__(self, config: ModelConfig, *, num_local_slots: int) -> None:
        super().__init__()
        hidden, inner = config.hidden, config.expert_hidden
        self.memory = MemoryPlan.of_level(config.memory_level)
        self.fp8 = config.fp8_experts
        self.partition: SMPartition | None = None  # says how many SMs the products take; None: all
        self.gate_up = nn.Parameter(torch.empty(num_local_slots, hidden, 2 * inner))
        self.down = nn.Parameter(torch.empty(num_local_slots, inner, hidden))

    def forward(self, rows: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Each slot's expert on its rows.

        Args:
            rows: [M, H], grouped by slot.
            offsets: int32 [S/R], the END row of each slot.
            weights: [M], factors of the results, or None.

        Returns:
            [M, H].
        """
        multiply = grouped_linear_fp8 if self.fp8 else grouped_linear
        # The FP8 layer keeps its rows in FP8 by itself.
        keeps_fp8 = self.memory.fp8_rows and not self.fp8 and torch.is_grad_enabled()
        kept_rows = in_fp8(rows) if keeps_fp8 else None
        max_sms = None if self.partition is None else self.partition.max_sms
        gate_up = multiply(rows, self.gate_up, offsets, kept=kept_rows, max_sms=max_sms)
        activated, kept_activated = kept_swiglu(gate_up, weights, self.memory)
        return multiply(activated, self.down, offsets, kept=kept_activated, max_sms=max_sms)


class MoELayer(nn.Module):
    """Attention and a Mixture-of-Experts block, pre-norm, with residuals.

    Args:
        config: sizes.
        buffer: the expert-parallel buffer; its experts are the S physical slots.
        replica_offset: staggers the ranks' round robin over replicas; use the rank.
    """

    def __init__(self, config: ModelConfig, *, buffer: Buffer, replica_offset: int) -> None:
        super().__init__()
        self.memory = MemoryPlan.of_level(config.memory_level)
        self.attention_norm = RMSNorm(config.hidden)
        self.attention = Attention(config)
        self.moe_norm = RMSNorm(config.hidden)
        self.router = Router(config)
        self.experts = Experts(config, num_local_slots=buffer.config.num_local_experts)
        self.shared_expert = SharedExpert(config) if config.shared_hidden else None
        self.buffer = buffer
        self.replica_offset = replica_offset
        self.log2phy: Tensor | None = None  # int64 [E, X] slots of each expert; None: slot = expert
        self.logcnt: Tensor | None = None  # int64 [E] replicas of each expert
        # int32 [E, X] how much of its tokens each replica gets (``ReplicaSplit.shares``); None: all
        # the same. Read when a token is routed: set it together with the maps, between two steps.
        self.replica_split: Tensor | None = None
        # Rows that come here at most, for steps without a wait of the host (CUDA graphs): more of
        # them are dropped and reported by the buffer. None: as many as come, for which it waits.
        self.max_recv_tokens: int | None = None
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
        kept = self.attention_norm.kept(x, self.memory)
        x = x + self.attention(self.attention_norm(x), kept=kept)
        normed = self.moe_norm(x).flatten(0, 1)  # [T, H]
        # A forward that a checkpoint repeats within a backward routes the same tokens again.
        count = self.training and not _in_backward()
        with saved_as(normed, self.moe_norm.kept(x.flatten(0, 1), self.memory)):
            routing = self.router(
                normed,
                log2phy=self.log2phy,
                logcnt=self.logcnt,
                replica_offset=self.replica_offset,
                split=self.replica_split,
                counts=self.counts if count else None,
            )
        # For the shared expert a view of its own: its gradient meets that of the dispatched rows
        # where this phase goes back, on the compute stream, and not behind the communication.
        shared = None if self.shared_expert is None else normed.view_as(normed)
        return x, shared, normed, routing.slot_idx, routing.topk_weights

    def _dispatch(
        self,
        x: Tensor,
        shared: Tensor | None,
        normed: Tensor,
        slot_idx: Tensor,
        topk_weights: Tensor,
    ) -> tuple[Any, ...]:
        recv, handle = self.buffer.dispatch(
            normed,
            slot_idx,
            topk_weights,
            layout="expert",
            max_recv_tokens=self.max_recv_tokens,
        )
        return x, shared, recv.tokens, recv.weights, recv.offsets, handle

    def _experts(
        self,
        x: Tensor,
        shared: Tensor | None,
        rows: Tensor,
        weights: Tensor,
        offsets: Tensor,
        handle: Any,
    ) -> tuple[Any, ...]:
        if self.memory.weighted_experts:
            out, weights = self.experts(rows, offsets, weights), None
        else:
            out = self.experts(rows, offsets)
        if self.shared_expert is not None:
            # Here and not in the attention phase: compute that can hide the other half's dispatch.
            kept = self.moe_norm.kept(x, self.memory)
            x = x + self.shared_expert(shared, kept=kept).view_as(x)
        return x, out, weights, handle

    def _combine(
        self, x: Tensor, out: Tensor, weights: Tensor | None, handle: Any
    ) -> tuple[Any, ...]:
        y, _ = self.buffer.combine(out, handle, weights=weights, bias=x.flatten(0, 1))
        return (y.view_as(x),)


def _in_backward() -> bool:
    """Whether autograd is running a backward pass on this thread right now."""
    # What torch.utils.checkpoint itself asks; there is no public name for it. A compiler traces a
    # forward once and repeats what it likes of it itself, without its side effects.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
