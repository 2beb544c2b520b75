"""Memory levels: which activations a layer keeps for its backward, chosen together by a number.

What belongs here: what each level means, for any model. A module that follows the levels has an
attribute ``memory``, a :class:`MemoryPlan`, and asks it in its forward; a layer of the language
model does (``dualpipe_ext/models/moe.py``). What the levels save there is in docs/internals.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

MAX_LEVEL = 3


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a layer keeps for its backward.

    Attributes:
        recompute: from level 1. Outputs of RMSNorm and SwiGLU are computed again from what those
            keep themselves, and reshaped or cast copies are made again. The same bits.
        weighted_experts: from level 1. An expert's rows are multiplied by their top-k weights
            inside SwiGLU, so that combine is a plain sum and need not keep the experts' outputs.
            Equal but for rounding: in FP8, if the experts multiply in it.
        fp8_rows: from level 2. The rows that experts receive are kept in FP8 for the weight
            gradient; no other gradient depends on them.
        fp8_swiglu: from level 3. The inputs of SwiGLU are kept in FP8. (As in DeepSeek-V3:
            technical report, section 3.3.3.) Gradients of all that comes before depend on them.
    """

    recompute: bool
    weighted_experts: bool
    fp8_rows: bool
    fp8_swiglu: bool

    @classmethod
    def of_level(cls, level: int) -> MemoryPlan:
        """The plan of a level, 0 (plain autograd) to 3.

        Raises:
            ValueError: no such level.
        """
        check_memory_level(level)
        return cls(
            recompute=level >= 1,
            weighted_experts=level >= 1,
            fp8_rows=level >= 2,
            fp8_swiglu=level >= 3,
        )


def check_memory_level(level: object) -> None:
    """Refuse with ``ValueError`` what is no memory level."""
    if not isinstance(level, int) or not 0 <= level <= MAX_LEVEL:
        raise ValueError(f"expected a memory_level from 0 to {MAX_LEVEL}, got {level!r}")


def set_memory_level(model: nn.Module, level: int) -> None:
    """Switch all of ``model`` that follows the levels to ``level``, from its next forward on.

    Widths are not checked again: for FP8 an unfit one raises in the forward.

    Raises:
        ValueError: no such level, or nothing in ``model`` follows the levels; nothing has changed.
    """
    set_memory_plan(model, MemoryPlan.of_level(level))


def set_memory_plan(model: nn.Module, plan: MemoryPlan) -> None:
    """As :func:`set_memory_level`, with a plan that need be no level's."""
    found = [m for m in model.modules() if isinstance(getattr(m, "memory", None), MemoryPlan)]
    if not found:
        raise ValueError(
            "expected a model with modules that have a MemoryPlan as .memory, got none"
        )
    for module in found:
        module.memory = plan
