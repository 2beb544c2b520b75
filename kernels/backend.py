"""Whether a tensor goes to a Triton kernel or to the torch operations that define it, and what both
compute in.

What belongs here: the one rule for kernels that serve every dtype but float64. The GEMMs ask for
more (``persistent_gemm.usable_on``).
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Not on every platform that torch runs on. Found, not imported: that takes longer than all of this
# package.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def runs_triton(x: Tensor) -> bool:
    """Whether kernels on ``x`` are Triton's: on GPUs, but for float64, which is left to torch."""
    if not _HAS_TRITON or x.dtype == torch.float64:
        return False
    # The interpreter runs the kernels on CPU tensors; nobody but a test asks for it.
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays exact; everything else is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
