"""Buffers for callers that name neither sizes nor a buffer: made at the first call, then shared.

What belongs here: what the integrations of frameworks have in common that hand over tokens and
routing only. Other code makes its own ``Buffer``.

Shapes: T tokens of this rank, H hidden, E experts, K top-k.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from dualpipe_ext.ep import Buffer

_logger = logging.getLogger(__name__)


@dataclass(eq=False)
class SharedBuffers:
    """One ``Buffer`` for each group and shape of calls.

    And a second one, of next to no size, for calls before it in which no rank has tokens.

    Attributes:
        remedy: what a user who has more tokens than ``max_tokens`` can do, for the error.
        max_tokens: most tokens of a rank in a call; None: the most of any rank in the first one
            that has some.
        options: further arguments of ``Buffer``.

    Raises:
        ValueError: ``max_tokens`` below 1.
    """

    remedy: str
    max_tokens: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    _made: dict[tuple[Any, ...], Buffer] = field(default_factory=dict, init=False)
    # Kept to the end, as handles of such calls must stay good, and a reset() must be of the same
    # buffers on all ranks.
    _without_tokens: dict[tuple[Any, ...], Buffer] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        most = self.max_tokens
        if most is None:
            return
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise ValueError(
                f"expected max_tokens to be None or an integer of at least 1, got {most!r}"
            )

    def get(
        self,
        group: dist.ProcessGroup,
        *,
        tokens: int,
        hidden: int,
        num_experts: int,
        top_k: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Buffer:
        """The buffer for a call with ``tokens`` rows [T, H] of ``dtype`` at this rank.

        Called on all ranks of the group, in one order: the first time they make it together.

        Raises:
            ValueError: more tokens than it has room for; or arguments that no buffer can have.
        """
        key = (group, hidden, num_experts, top_k, dtype)
        buffer = self._made.get(key)
        if buffer is None:
            most = self.max_tokens or _largest_of_all(tokens, group, device)
            # A call without tokens tells nothing of those to come: its buffer is not theirs.
            kept = self._made if most > 0 else self._without_tokens
            buffer = kept.get(key)
            if buffer is None:
                sizes = {"hidden": hidden, "num_experts": num_experts, "top_k": top_k}
                buffer = self._make(group, max_tokens=max(most, 1), dtype=dtype, **sizes)
                kept[key] = buffer
        if tokens > buffer.config.max_tokens:
            raise ValueError(
                f"expected at most {buffer.config.max_tokens} tokens of a rank in one call, got "
                f"{tokens}: {self.remedy}"
            )
        return buffer

    def _make(self, group: dist.ProcessGroup, **arguments: Any) -> Buffer:
        # No slabs: nobody here leaves rows in the communication memory.
        buffer = Buffer(group, num_slabs=0, **arguments, **self.options)
        sms = "" if buffer.num_sms is None else f", {buffer.num_sms} SMs"
        mib = buffer.memory_bytes / 2**20
        _logger.info("made a buffer: transport %s%s, %.0f MiB", buffer.transport, sms, mib)
        return buffer

    def made(self) -> list[Buffer]:
        """All that there are, in one order on all ranks."""
        return [*self._without_tokens.values(), *self._made.values()]

    def clear(self) -> None:
        """Forget all of them; called on all ranks."""
        self._without_tokens.clear()
        self._made.clear()


def _largest_of_all(tokens: int, group: dist.ProcessGroup, device: torch.device) -> int:
    largest = torch.tensor([tokens], device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return int(largest)
