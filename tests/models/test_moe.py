"""What the MoE layer's routing leaves behind: counts, slots, and one count per token."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dualpipe_ext.ep import Buffer
from dualpipe_ext.eplb import Placement, count_experts, select_replicas
from dualpipe_ext.eplb.shares import to_shares
from dualpipe_ext.models import ModelConfig, MoELayer
from dualpipe_ext.pipeline.overlap import ChunkGraph, Launcher
from dualpipe_ext.pipeline.weight_grad import WeightGradStore

CONFIG = ModelConfig(hidden=32, num_layers=1, num_heads=2, expert_hidden=16, shared_hidden=0)
TOKENS = 2 * 24


def make_layer(*, num_slots: int = 16, replica_offset: int = 0) -> MoELayer:
    torch.manual_seed(0)
    buffer = Buffer(hidden=32, num_experts=num_slots, top_k=4, max_tokens=TOKENS)
    layer = MoELayer(CONFIG, buffer=buffer, replica_offset=replica_offset)
    torch.nn.init.normal_(layer.router.weight)
    return layer


class Log(TorchDispatchMode):
    """What torch does, and between that whatever else is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.notes.append(str(func))
        return func(*args, **(kwargs or {}))


def rows() -> torch.Tensor:
    return torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(1))


def slots_of(layer: MoELayer, x: torch.Tensor) -> torch.Tensor:
    """What the first phase hands to dispatch."""
    *_, slot_idx, _ = layer.phases()[0].fn(x)
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
        out, *_, weights = attention(x)
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


MOVED = "moved"
# Launch nothing.
FREE = ("aten.alias", "aten.detach", "aten.empty", "aten.view")


@pytest.mark.parametrize("level", [1, 2, 3])
def test_phases_of_communication_end_with_what_moves(level):
    """A kernel behind it would hold up whoever waits, and, in one hardware queue, everybody."""
    config = CONFIG.with_overrides(
        hidden=128, expert_hidden=64, shared_hidden=64, memory_level=level
    )
    buffer = Buffer(hidden=128, num_experts=16, top_k=4, max_tokens=TOKENS)
    layer = MoELayer(config, buffer=buffer, replica_offset=0)
    log = Log()
    for name in ("dispatch", "combine"):
        move = getattr(buffer._transport, name)

        def and_note(*args, move=move, **kwargs):
            result = move(*args, **kwargs)
            log.notes.append(MOVED)
            return result

        setattr(buffer._transport, name, and_note)
    launcher = Launcher(torch.device("cpu"), on_launch=lambda name: log.notes.append(f"> {name}"))
    x = torch.randn(2, 24, 128, generator=torch.Generator().manual_seed(1))
    graph = ChunkGraph(
        layer.phases(), (x,), (True,), launcher=launcher, store=WeightGradStore(), key=0
    )
    grad = torch.ones_like(x)
    with log:
        graph.forward()
        graph.take_outputs()
        graph.start_backward([grad])
        graph.backward(defer=True)
    launches = "\n".join(log.notes).split("> ")[1:]
    moving = [launch.splitlines() for launch in launches if MOVED in launch]
    assert [lines[0] for lines in moving] == [
        *("dispatch(F)", "combine(F)", "combine(B)", "dispatch(B)")
    ]
    for name, *done in moving:
        after = done[done.index(MOVED) + 1 :]
        assert [op for op in after if not op.startswith(FREE)] == [], name
