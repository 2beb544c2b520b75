"""One hardware queue is what the environment says, and pairs are launched accordingly."""

from __future__ import annotations

import pytest
import torch

from dualpipe_ext import hardware_queue
from dualpipe_ext.pipeline.launch_order import interleave
from dualpipe_ext.pipeline.overlap import Launcher, Phase

SIDE = [
    Phase(name, stream, tuple)
    for name, stream in (("attention", "compute"), ("dispatch", "comm"), ("mlp", "compute"))
]


@pytest.mark.parametrize(
    ("value", "shared"), [(None, False), ("", False), ("8", False), ("1", True), (" 1 ", True)]
)
def test_queue_of_this_process(monkeypatch, value, shared):
    monkeypatch.delenv(hardware_queue.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(hardware_queue.VARIABLE, value)
    assert hardware_queue.is_shared() is shared
    order, _ = Launcher(torch.device("cpu")).orders.begin(SIDE, SIDE, may_time=False)
    assert order == interleave(SIDE, SIDE, one_queue=shared)
    assert (order != interleave(SIDE, SIDE)) is shared
