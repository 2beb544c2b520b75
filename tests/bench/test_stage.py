"""Parameters depend on their names, not on how the model was cut."""

from __future__ import annotations

import torch

from dualpipe_ext.bench.stage import middle_stage
from dualpipe_ext.ep import Buffer
from tests.bench.pipeline_runs import MODEL


def test_a_layer_is_the_same_in_every_cut():
    sizes = {"hidden": MODEL.hidden, "num_experts": MODEL.num_experts, "top_k": MODEL.top_k}
    buffer = Buffer(**sizes, max_tokens=8, transport="collective")
    kind = {"buffer": buffer, "dtype": torch.bfloat16, "device": torch.device("cpu")}
    whole = dict(middle_stage(MODEL, range(2), **kind).named_parameters())
    last = middle_stage(MODEL, range(1, 2), **kind)
    assert last.embedding is None
    assert last.head is None
    for name, parameter in last.named_parameters():
        assert torch.equal(parameter, whole[name])
        router = "router" in name
        assert parameter.dtype == (torch.float32 if router else torch.bfloat16)
    first, second = (whole[f"layers.{i}.experts.down"] for i in (1, 2))
    assert not torch.equal(first, second)
    assert 0.015 < first.detach().float().std().item() < 0.025
    assert all(not values.any() for values in last.buffers())
