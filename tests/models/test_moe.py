"""What the MoE layer's routing leaves behind: counts, slots, and one count per token."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dualpipe_ext.ep import Buffer
from dualpipe_ext.eplb import Placement, count_experts, select_replicas
from dualpipe_ext.eplb.shares import to_shares
from dualpipe_ext.models import ModelConfig, MoELayer

CONFIG = ModelConfig(hidden=32, num_layers=1, num_heads=2, expert_hidden=16, shared_hidden=0)
TOKENS = 2 * 24


def make_layer(*, num_slots: int = 16, replica_offset: int = 0) -> MoELayer:
    torch.manual_seed(0)
    buffer = Buffer(hidden=32, num_experts=num_slots, top_k=4, max_tokens=TOKENS)
    layer = MoELayer(CONFIG, buffer=buffer, replica_offset=replica_offset)
    torch.nn.init.normal_(layer.router.weight)
    return layer


def rows() -> torch.Tensor:
    return torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(1))


def slots_of(layer: MoELayer, x: torch.Tensor) -> torch.Tensor:
    """What the first phase hands to dispatch."""
    _, _, slot_idx, _ = layer.phases()[0].fn(x)
    return slot_idx


def test_counts_add_up_in_training_only():
    layer = make_layer()
    expected = count_experts(slots_of(layer, rows()), 16)  # slots are experts here
    assert torch.equal(layer.counts, expected)
    assert int(expected.sum()) == 4 * TOKENS
    slots_of(layer, rows())
    assert torch.equal(layer.counts, 2 * expected)
    layer.eval()
    slots_of(layer, rows())
    assert torch.equal(layer.counts, 2 * expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputing_counts_nothing_twice(use_reentrant):
    layer = make_layer()
    x = rows().requires_grad_()
    attention = layer.phases()[0].fn
    forwards = 0

    def forward(x):
        nonlocal forwards
        forwards += 1
        out, _, _, weights = attention(x)
        return out.sum() + weights.square().sum()

    checkpoint(forward, x, use_reentrant=use_reentrant).backward()
    assert forwards == 2
    assert int(layer.counts.sum()) == 4 * TOKENS
    # The next step's forward counts again.
    slots_of(layer, rows())
    assert int(layer.counts.sum()) == 8 * TOKENS


def test_slots_follow_the_maps_and_the_split():
    layer = make_layer(num_slots=20, replica_offset=3)
    placement = Placement.identity(1, 16, 20)
    experts = slots_of(make_layer(), rows())
    layer.log2phy, layer.logcnt = placement.log2phy[0], placement.logcnt[0]
    maps = layer.log2phy, layer.logcnt
    assert torch.equal(slots_of(layer, rows()), select_replicas(experts, *maps, offset=3))
    weights = torch.tensor([[0.9, 0.1]] * 4 + [[1.0, 0.0]] * 12)
    layer.replica_split = to_shares(weights)
    slots = slots_of(layer, rows())
    expected = select_replicas(experts, *maps, offset=3, split=layer.replica_split)
    assert torch.equal(slots, expected)
    assert torch.equal(placement.phy2log[0][slots], experts)
    used, wanted = count_experts(slots, 20), count_experts(experts, 16)
    assert bool(((used[16:] - 0.1 * wanted[:4]).abs() <= 1).all())
    # Experts are counted, not slots.
    assert torch.equal(layer.counts, 2 * wanted)
