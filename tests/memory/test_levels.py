from itertools import pairwise

import pytest
from torch import nn

from dualpipe_ext.memory import MAX_LEVEL, MemoryPlan, set_memory_level


def test_each_level_keeps_less_than_the_one_before():
    plans = [MemoryPlan.of_level(level) for level in range(MAX_LEVEL + 1)]
    chosen = [{name for name in MemoryPlan.__slots__ if getattr(plan, name)} for plan in plans]
    assert chosen[0] == set()
    assert all(a < b for a, b in pairwise(chosen))
    assert chosen[-1] == set(MemoryPlan.__slots__)


@pytest.mark.parametrize("level", [-1, 4, 1.0, "1", None])
def test_other_levels_are_refused(level):
    with pytest.raises(ValueError, match=r"expected a memory_level from 0 to 3, got"):
        MemoryPlan.of_level(level)


def test_all_modules_that_follow_are_switched():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"MemoryPlan as \.memory, got none"):
        set_memory_level(model, 1)
    model.memory = model[1][0].memory = MemoryPlan.of_level(0)
    with pytest.raises(ValueError, match="from 0 to 3, got 4"):
        set_memory_level(model, 4)
    assert model.memory == MemoryPlan.of_level(0)
    set_memory_level(model, 2)
    assert model.memory == model[1][0].memory == MemoryPlan.of_level(2)
    assert not hasattr(model[0], "memory")
