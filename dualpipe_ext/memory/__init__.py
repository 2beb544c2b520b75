"""What keeps the memory of a GPU small: recomputation, FP8, and state that lives on the host."""

from dualpipe_ext.memory.ema import ParameterEMA
from dualpipe_ext.memory.kept import Kept, in_fp8, recomputed, saved_as
from dualpipe_ext.memory.levels import MAX_LEVEL, MemoryPlan, set_memory_level
from dualpipe_ext.memory.measure import gradient_errors, saved_bytes

__all__ = [
    "MAX_LEVEL",
    "Kept",
    "MemoryPlan",
    "ParameterEMA",
    "gradient_errors",
    "in_fp8",
    "recomputed",
    "saved_as",
    "saved_bytes",
    "set_memory_level",
]
