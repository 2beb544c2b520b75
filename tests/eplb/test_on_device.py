"""The planner kernel's host side on a machine without a GPU: what it refuses, and what is used."""

from __future__ import annotations

import pytest
import torch

from dualpipe_ext import core
from dualpipe_ext.eplb import on_device
from dualpipe_ext.eplb.balanced import Sizes

needs_core = pytest.mark.skipif(not core.available(), reason=core.why_unavailable())

SIZES = {
    "num_layers": 58,
    "num_experts": 256,
    "num_slots": 288,
    "num_groups": 8,
    "num_nodes": 4,
    "num_gpus": 32,
}


@needs_core
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_experts": 1024, "num_slots": 2048, "num_gpus": 512},
        {"num_groups": 4},
        {"num_slots": 256},
        {"num_layers": 2**31 // 4 - 1},
    ],
)
def test_sizes_up_to_the_limits(change):
    core.module().PlannerSizes(**SIZES | change)


@needs_core
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers from 1 to 536870911, got 0"),
        ({"num_layers": 2**29}, "num_layers from 1 to 536870911, got 536870912"),
        ({"num_experts": 1032}, "num_experts from 1 to 1024, got 1032"),
        ({"num_experts": 0}, "num_experts from 1 to 1024, got 0"),
        ({"num_slots": 224}, "num_slots from 256 to 2048, got 224"),
        ({"num_slots": 2080}, "num_slots from 256 to 2048, got 2080"),
        ({"num_gpus": 0}, "num_gpus from 1 to 512, got 0"),
        ({"num_gpus": 576}, "num_gpus from 1 to 512, got 576"),
        ({"num_nodes": 33}, "num_nodes from 1 to 32, got 33"),
        ({"num_groups": 3}, "num_groups from 4 to 256, got 3"),
        ({"num_groups": 512}, "num_groups from 4 to 256, got 512"),
        ({"num_slots": 289}, r"num_slots to be a multiple of num_gpus \(32\), got 289"),
        ({"num_nodes": 3}, r"num_gpus to be a multiple of num_nodes \(3\), got 32"),
        ({"num_groups": 6}, r"num_groups to be a multiple of num_nodes \(4\), got 6"),
        ({"num_groups": 12}, r"num_experts to be a multiple of num_groups \(12\), got 256"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        core.module().PlannerSizes(**SIZES | change)


@needs_core
def test_addresses_that_are_none():
    c = core.module()
    addresses = dict.fromkeys(("loads", "phy2log", "replica", "log2phy", "logcnt", "status"), 0)
    with pytest.raises(ValueError, match="addresses of loads, phy2log, logcnt and status, got 0"):
        c.plan_experts(
            c.PlannerSizes(**SIZES),
            **addresses,
            width=33,
            max_load=1.0,
            suspect_load=1.0,
            stream=0,
        )


@pytest.mark.parametrize(
    ("num_experts", "sizes", "capability", "usable"),
    [
        (256, Sizes(288, 8, 4, 32), (9, 0), True),
        (1024, Sizes(2048, 1, 1, 512), (9, 0), True),
        (1025, Sizes(2048, 1, 1, 512), (9, 0), False),
        (1024, Sizes(2049, 1, 1, 3), (9, 0), False),
        (512, Sizes(1026, 1, 1, 513), (9, 0), False),
        (256, Sizes(288, 8, 4, 32), (8, 0), False),
        (256, Sizes(288, 8, 4, 32), (10, 0), False),
    ],
)
@needs_core
def test_the_kernel_is_for_hopper_and_up_to_its_limits(
    monkeypatch, num_experts, sizes, capability, usable
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert on_device.usable(torch.device("cuda"), num_experts, sizes) == usable
    assert not on_device.usable(torch.device("cpu"), num_experts, sizes)


def test_without_the_core_there_is_no_kernel(monkeypatch):
    monkeypatch.setattr(core, "_load", lambda: (None, "it was not built"))
    assert not on_device.usable(torch.device("cuda"), 256, Sizes(288, 8, 4, 32))
