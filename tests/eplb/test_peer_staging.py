"""Where messages lie in staging memory: ranks played in turn by one process, over shared tensors.

The copies between GPUs themselves: tests/multi_gpu/test_migrator.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_ext.eplb import plan_moves
from dualpipe_ext.eplb.move_plan import RankMoves
from dualpipe_ext.eplb.peer_staging import PeerStaging
from dualpipe_ext.eplb.transfer import StagedLayer
from tests.eplb.ranks import expert_tables, random_map, same_bits


def slots_of(tables: list[torch.Tensor], phy2log: list[int], rank: int, per_rank: int):
    index = phy2log[rank * per_rank : (rank + 1) * per_rank]
    return [torch.stack([table[e] for e in index]) for table in tables]


@settings(max_examples=40)
@given(st.integers(2, 4), st.integers(1, 4), st.integers(0, 2**31))
def test_several_layers_arrive_bit_for_bit(num_ranks: int, per_rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_slots = num_ranks * per_rank
    num_experts = int(torch.randint(1, num_slots + 1, (), generator=generator))
    staging = [torch.full((1 << 14,), 255, dtype=torch.uint8) for _ in range(num_ranks)]
    carriers = [PeerStaging(staging, rank) for rank in range(num_ranks)]
    for wave in range(2):  # the second one finds the memory full of the first
        layers = []
        for layer in range(3):
            maps = [random_map(num_experts, num_slots, generator) for _ in range(2)]
            layers.append((expert_tables(num_experts, seed=10 * wave + layer), *maps))
        for carrier in carriers:
            carrier.begin()
        staged = []
        for rank, carrier in enumerate(carriers):
            for tables, old, new in layers:
                tensors = slots_of(tables, old, rank, per_rank)
                moves = plan_moves(old, new, num_ranks)
                one = StagedLayer(tensors, moves, carrier, num_ranks=num_ranks, rank=rank)
                staged.append((one, tensors, slots_of(tables, new, rank, per_rank)))
        for one, _, _ in staged:
            one.transfer(1.0)
        for one, tensors, wanted in staged:
            one.commit()
            assert all(same_bits(t, w) for t, w in zip(tensors, wanted, strict=True))


def test_memory_that_is_too_small_is_refused_before_anything_is_written() -> None:
    staging = [torch.zeros(48, dtype=torch.uint8) for _ in range(2)]
    carrier = PeerStaging(staging, 0)
    tensors = [torch.ones(2, 8)]
    moves = plan_moves([0, 1, 2, 3], [2, 3, 0, 1], 2)
    with pytest.raises(ValueError, match="at least 64 bytes of staging memory, got 48"):
        carrier.stage(tensors, moves, RankMoves.of(moves, 2, 0))
    assert not any(memory.any() for memory in staging)
