"""Whether all streams of this process share one hardware queue: ``CUDA_DEVICE_MAX_CONNECTIONS=1``.

Megatron wants that on Hopper for tensor parallelism: what is launched first begins first, so that a
small kernel of communication is in before a product fills the GPU. The price: a launch that waits
for another stream, or for the kernel before it on its own, holds up all that was launched behind
it, on any stream. Neither priorities nor green contexts change that (docs/LOG.md, "One hardware
queue").
"""

from __future__ import annotations

import os

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"


def is_shared() -> bool:
    """What the environment says now. CUDA reads it once, when the process first uses a GPU."""
    return os.environ.get(VARIABLE, "").strip() == "1"
