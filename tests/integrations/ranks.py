"""Where the checks of integrations run, which serve gloo and NCCL alike."""

from __future__ import annotations

import torch
import torch.distributed as dist


def device() -> torch.device:
    """This rank's."""
    if dist.get_backend() == "gloo":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
