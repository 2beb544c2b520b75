"""What the multi-rank tests of eplb share: experts of known contents, and where they belong."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

# (dtype, shape of one slot). Odd sizes, so that no section of a message ends on a round number.
LAYOUT = [
    (torch.float32, (3, 5)),
    (torch.bfloat16, (7,)),
    (torch.float64, ()),
    (torch.float8_e4m3fn, (2, 9)),
    (torch.int64, (1,)),
    (torch.bool, (3,)),
    (torch.float16, (2, 0)),
]


def needs_ranks(num_ranks: int) -> pytest.MarkDecorator:
    """Skip where there are GPUs but fewer than ranks: NCCL refuses two ranks on one."""
    num_gpus = torch.cuda.device_count()
    return pytest.mark.skipif(0 < num_gpus < num_ranks, reason=f"needs {num_ranks} GPUs or none")


def device() -> torch.device:
    """The device of this rank; ``run_ranks`` has made it the current one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def expert_tables(num_experts: int, seed: int) -> list[Tensor]:
    """[E, ...] for each entry of LAYOUT: random bits, NaN payloads included."""
    generator = torch.Generator().manual_seed(seed)
    tables = []
    for dtype, shape in LAYOUT:
        size = (num_experts, *shape, torch.empty((), dtype=dtype).element_size())
        high = 2 if dtype is torch.bool else 256
        bits = torch.randint(0, high, size, generator=generator, dtype=torch.uint8)
        tables.append(bits.view(dtype).squeeze(-1))
    return tables


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit; torch.equal alone would call NaN different and -0.0 equal."""

    def raw(tensor: Tensor) -> bytes:
        return bytes(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).tolist())

    return a.shape == b.shape and a.dtype == b.dtype and raw(a) == raw(b)


def local_rows(tables: Sequence[Tensor], phy2log: Sequence[int]) -> list[Tensor]:
    """What this rank's slots hold when the experts are placed by ``phy2log``."""
    per_rank = len(phy2log) // dist.get_world_size()
    start = dist.get_rank() * per_rank
    index = list(phy2log[start : start + per_rank])
    return [torch.stack([table[e] for e in index]).to(device()) for table in tables]


def random_map(num_experts: int, num_slots: int, generator: torch.Generator) -> list[int]:
    """Every expert at least once, the other slots at random, in random order."""
    extra = torch.randint(0, num_experts, (num_slots - num_experts,), generator=generator)
    slots = torch.cat([torch.arange(num_experts), extra])
    return slots[torch.randperm(num_slots, generator=generator)].tolist()
