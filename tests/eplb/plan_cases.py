"""Shapes and loads on which planners are compared with each other."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

LOADS = ("lognormal", "few values", "tokens", "none", "mostly none", "tiny", "huge", "equal")


@st.composite
def shapes(
    draw: st.DrawFn, *, max_nodes: int, max_gpus: int, max_experts: int, max_extra: int
) -> tuple[int, int, int, int, int, int]:
    """(layers, experts, slots, groups, nodes, GPUs) that fit together, both policies."""
    num_nodes = draw(st.integers(1, max_nodes))
    num_gpus = num_nodes * draw(st.integers(1, max(1, max_gpus // num_nodes)))
    if draw(st.booleans()):
        num_groups = num_nodes * draw(st.integers(1, max(1, max_experts // num_nodes)))
    else:
        num_groups = num_nodes + 1  # not divided by the nodes, unless there is one: global
    num_experts = num_groups * draw(st.integers(1, max(1, max_experts // num_groups)))
    least = -(-num_experts // num_gpus)
    num_slots = num_gpus * draw(st.integers(least, least + max_extra))
    return draw(st.integers(1, 3)), num_experts, num_slots, num_groups, num_nodes, num_gpus


def make_loads(kind: str, num_layers: int, num_experts: int, seed: int) -> Tensor:
    """[L, E] float32 loads of one of ``LOADS``: most with ties, some at the ends of float32."""
    generator = torch.Generator().manual_seed(seed)
    loads = torch.randn(num_layers, num_experts, generator=generator).exp()
    if kind == "few values":
        values = torch.tensor([0.0, 1.0, 2.0, 3.0, 1000.0, 0.1, 1 / 3])
        choice = torch.randint(len(values), loads.shape, generator=generator)
        return values[choice]
    if kind == "tokens":
        return (loads * 8).round()
    if kind == "none":
        return torch.zeros_like(loads)
    if kind == "mostly none":
        return loads * (torch.rand(loads.shape, generator=generator) < 0.2)
    if kind == "tiny":  # a few units of the smallest number that float32 has
        return torch.randint(20, loads.shape, generator=generator).float() * 2.0**-149
    if kind == "huge":  # as large as their sum allows
        return loads / loads.sum(1, keepdim=True) * 0.99e38
    if kind == "equal":
        return torch.full_like(loads, 7.0)
    return loads * 1000
