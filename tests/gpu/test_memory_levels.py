"""Memory levels on a GPU: what the allocator really holds, and gradients in bfloat16."""

from __future__ import annotations

import pytest
import torch

from dualpipe_ext.ep import Buffer
from dualpipe_ext.launch import run_ranks
from dualpipe_ext.memory import (
    MAX_LEVEL,
    gradient_errors,
    in_fp8,
    recomputed,
    saved_as,
    set_memory_level,
)
from dualpipe_ext.models import ModelConfig, MoELayer
from dualpipe_ext.models.activations import kept_bytes_per_token

CONFIG = ModelConfig(
    hidden=2048,
    num_heads=16,
    num_experts=32,
    top_k=8,
    num_groups=1,
    top_groups=1,
    expert_hidden=1024,
    shared_hidden=1024,
)
TOKENS = 4096
LEVELS = range(MAX_LEVEL + 1)


def build() -> tuple[MoELayer, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    with torch.device("cuda"):
        buffer = Buffer(
            hidden=2048, num_experts=32, top_k=8, max_tokens=TOKENS, dtype=torch.bfloat16
        )
        layer = MoELayer(CONFIG, buffer=buffer, replica_offset=0).bfloat16()
        layer.router.float()
        for parameter in layer.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.02)
        x, grad = torch.randn(2, 4, TOKENS // 4, 2048).bfloat16()
    return layer, x.requires_grad_(), grad


def kept_bytes() -> list[float]:
    """Bytes per token that the allocator holds after a forward, at every level."""
    layer, x, grad = build()
    found = []
    for level in LEVELS:
        set_memory_level(layer, level)
        layer(x).backward(grad)
        layer.zero_grad(set_to_none=True)
        x.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = layer(x)
        torch.cuda.synchronize()
        found.append((torch.cuda.memory_allocated() - before - y.nbytes) / TOKENS)
        del y
    return found


def test_the_allocator_holds_what_was_predicted():
    found = run_ranks(kept_bytes, 1, run_timeout_s=300)[0]
    for level, per_token in zip(LEVELS, found, strict=True):
        predicted = kept_bytes_per_token(CONFIG.with_overrides(memory_level=level))
        # The input is there before; ids, maps and the allocator's rounding come on top.
        expected = sum(predicted.values()) - predicted["layer input"]
        assert expected * 0.98 <= per_token <= expected * 1.08 + 1024, level
    assert found[3] <= 0.65 * found[0]


def errors() -> dict[int, dict[str, float]]:
    layer, x, grad = build()
    return {
        level: gradient_errors(layer, lambda: (layer(x.detach()) * grad).sum(), level=level)
        for level in LEVELS
    }


def test_gradients_in_bfloat16():
    found = run_ranks(errors, 1, run_timeout_s=300)[0]
    # Other roundings of the experts' outputs; attention's backward adds up in another order every
    # time.
    assert max(found[1].values()) < 0.02
    # And FP8 in one gradient.
    assert 2.0**-8 < found[2]["experts.gate_up"] < 2.0**-4
    assert max(e for name, e in found[2].items() if name != "experts.gate_up") < 2.0**-4
    assert max(found[3].values()) < 2 * 2.0**-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stand_ins_are_the_same_on_both_devices(dtype):
    x = torch.randn(64, 256).to(dtype)
    for make in (in_fp8, lambda t: recomputed(torch.neg, in_fp8(t))):
        here, there = make(x), make(x.cuda())
        back = there.restore(*there.tensors).cpu()
        assert torch.equal(back, here.restore(*here.tensors))
    g = x.cuda().requires_grad_()
    with saved_as(g, in_fp8(g)):
        y = g.square()
    y.sum().backward()
    kept = in_fp8(g)
    assert torch.equal(g.grad, 2 * kept.restore(*kept.tensors))
