"""The part of a model that benchmarks run: layers of its middle, without embedding and head.

R expert-parallel ranks; parameters have the values that their names say, whatever the model was
cut into.
"""

from __future__ import annotations

import zlib

import torch

from dualpipe_ext.ep import Buffer
from dualpipe_ext.models import LanguageModelStage, ModelConfig


def stage_buffer(
    config: ModelConfig,
    *,
    tokens: int,
    dtype: torch.dtype,
    transport: str,
    num_sms: int | None = None,
) -> Buffer:
    """A buffer for layers of ``config`` and micro-batches of so many tokens per rank, without slabs
    of its own for outputs: layers take them as tensors."""
    return Buffer(
        hidden=config.hidden,
        num_experts=config.num_experts,
        top_k=config.top_k,
        max_tokens=tokens,
        dtype=dtype,
        transport=transport,
        num_sms=num_sms,
        num_slabs=0,
    )


def middle_stage(
    config: ModelConfig,
    layers: range,
    *,
    buffer: Buffer,
    dtype: torch.dtype,
    device: torch.device,
) -> LanguageModelStage:
    """Layers ``layers`` of ``config.num_layers``, as if others came before and after them.

    Parameters are drawn on the device, in ``dtype``: at sizes that nearly fill a GPU there is no
    room for another copy. The experts of all expert-parallel ranks are alike.
    """
    whole = config.with_overrides(num_layers=config.num_layers + 2)
    with torch.device("meta"):
        stage = LanguageModelStage(
            whole, range(layers.start + 1, layers.stop + 1), buffer=buffer
        ).to(dtype)
        for layer in stage.layers.values():
            # Routing is decided in float32 at least, as in training.
            layer.router.to(torch.promote_types(dtype, torch.float32))
    stage.to_empty(device=device)
    with torch.no_grad():
        for values in stage.buffers():
            values.zero_()
        for name, parameter in stage.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)  # RMSNorm
            else:
                generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
                parameter.normal_(std=0.02, generator=generator)
    return stage
