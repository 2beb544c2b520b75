"""What a layer of the language model keeps for its backward, by arithmetic.

What belongs here: the budget of bytes per token behind the memory levels. What autograd really
keeps is counted by ``dualpipe_ext.memory.saved_bytes`` and compared with this in the tests.
"""

from __future__ import annotations

from dualpipe_ext.ep.fp8 import BLOCK
from dualpipe_ext.memory import MemoryPlan
from dualpipe_ext.models.config import ModelConfig

_SCALE_BYTES = 4


def kept_bytes_per_token(config: ModelConfig, *, itemsize: int = 2) -> dict[str, int]:
    """Bytes that one layer keeps per token at ``config.memory_level``, by what they are.

    Tokens are spread evenly: a rank receives as many rows as its own tokens have choices. Left out
    is what depends on the sequence only (angles of the rotary embedding), or takes a few bytes per
    choice (ids, weights).

    Args:
        itemsize: bytes per value of the model's dtype. Routing and the statistics of attention are
            kept in float32 at least.
    """
    plan, fp8 = MemoryPlan.of_level(config.memory_level), config.fp8_experts
    hidden, wide = config.hidden, max(4, itemsize)
    rows, inner, shared = config.top_k, config.expert_hidden, config.shared_hidden

    def plain(values: int, *, unless: bool = False) -> int:
        return 0 if unless else values * itemsize

    def quantised(values: int, *, when: bool) -> int:
        return values + values // BLOCK * _SCALE_BYTES if when else plain(values)

    return {
        "layer input": plain(hidden),
        "attention norm": plain(hidden, unless=plan.recompute),
        "query, key, value": plain(3 * hidden),
        "attention output": plain(hidden) + config.num_heads * wide,
        "MoE input": plain(hidden),
        "MoE norm": plain(hidden, unless=plan.recompute),
        "router scores": config.num_experts * wide,
        "expert rows": quantised(rows * hidden, when=plan.fp8_rows or fp8),
        "gate and up": quantised(rows * 2 * inner, when=plan.fp8_swiglu),
        "activated": 0 if plan.recompute else quantised(rows * inner, when=fp8),
        "expert outputs": plain(rows * hidden, unless=plan.weighted_experts),
        "shared gate and up": quantised(2 * shared, when=plan.fp8_swiglu),
        "shared activated": plain(shared, unless=plan.recompute),
    }
