"""Tensors and streams as kernels take them: addresses of dense memory."""

from __future__ import annotations

import torch
from torch import Tensor


def current_device() -> int:
    """The index of the current device.

    Not ``torch.cuda.current_device()``, which first sees to it that CUDA is there: whoever has
    tensors on a device knows.
    """
    return torch._C._cuda_getDevice()


def current_stream() -> int:
    """The address of the current stream.

    Not ``torch.cuda.current_stream().cuda_stream``: making the object takes several microseconds,
    a tenth of a call.
    """
    return torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def rows_on_16_bytes(tensor: Tensor) -> Tensor:
    """The tensor itself if kernels can read it as it is: dense rows from a multiple of 16 bytes."""
    if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
