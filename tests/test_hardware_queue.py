"""One hardware queue is what the environment says, and pairs are launched accordingly."""

from __future__ import annotations

from types import SimpleNamespace

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
    if value is not None:
        monkeypatch.setenv(hardware_queue.VARIABLE, value)
    assert hardware_queue.is_shared() is shared
    for comm_sms in (None, 24):
        assert order_beside(comm_sms) == interleave(SIDE, SIDE, one_queue=shared)
    assert (order_beside(24) != interleave(SIDE, SIDE)) is shared
    # Copy engines wait before they unpack.
    assert order_beside(0) == interleave(SIDE, SIDE)


def order_beside(comm_sms):
    """The plain order of a pair while so many SMs communicate; 0: copy engines do."""
    partition = SimpleNamespace(comm_sms=comm_sms, follow=lambda then: None)
    launcher = Launcher(torch.device("cpu"), partition=partition)
    return launcher.orders.begin(SIDE, SIDE, may_time=False)[0]
