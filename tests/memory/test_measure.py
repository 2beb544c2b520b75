import math

import pytest
import torch
from torch import nn

from dualpipe_ext.memory import MemoryPlan, gradient_errors, saved_bytes


def test_storages_are_counted_once_and_whole():
    x = torch.zeros(10, 10, dtype=torch.float64, requires_grad=True)
    w = torch.zeros(10, 10, dtype=torch.float64, requires_grad=True)

    def forward():
        h = x + 1.0  # 800 bytes, saved twice and by a view
        return (h @ w).sum() + h.square().sum() + h[:2].square().sum()

    assert saved_bytes(forward, without=[x, w]) == 800
    assert saved_bytes(forward) == 1600  # w is saved too, x is not


class Scaled(nn.Module):
    """A layer whose gradient depends on its memory level as the test says."""

    def __init__(self, factors):
        super().__init__()
        self.memory = MemoryPlan.of_level(0)
        self.factors = factors
        self.weight = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        self.unused = nn.Parameter(torch.zeros(1))
        self.still = nn.Parameter(torch.zeros(2))

    def forward(self):
        factor = self.factors[MemoryPlan.of_level(2) == self.memory]
        return (self.weight * factor).sum() + (0.0 * self.still).sum()


def test_errors_are_relative_to_the_reference():
    model = Scaled({False: 2.0, True: 2.5})
    model.weight.grad = torch.ones(2, dtype=torch.float64)
    assert gradient_errors(model, model, level=2) == {"weight": pytest.approx(0.25), "still": 0.0}
    assert model.memory == MemoryPlan.of_level(2)
    assert model.weight.grad is None
    assert gradient_errors(model, model, level=0, reference=2)["weight"] == pytest.approx(0.2)
    gone = Scaled({False: 0.0, True: 1.0})
    assert gradient_errors(gone, gone, level=2)["weight"] == math.inf
    with pytest.raises(ValueError, match="memory_level from 0 to 3, got 5"):
        gradient_errors(model, model, level=5)
