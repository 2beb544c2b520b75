"""What was sent goes before its gradient comes."""

from __future__ import annotations

import time
import weakref

import torch
import torch.distributed as dist
from torch import nn

from dualpipe_ext.launch import run_ranks
from dualpipe_ext.pipeline import p2p
from dualpipe_ext.pipeline.runtime import Pipeline
from tests.pipeline.test_runtime import TIMEOUT_S, H, mse


class Watched(nn.Module):
    """Notes, when the backward of a chunk begins, whether the chunk's output is still there."""

    def __init__(self, delay_s):
        super().__init__()
        self.layer = nn.Linear(H, H).double()
        self.delay_s, self.there = delay_s, []

    def forward(self, x):
        y = self.layer(x)
        output = weakref.ref(y.untyped_storage())

        def note(grad):
            time.sleep(self.delay_s)
            self.there.append(output() is not None)

        y.register_hook(note)
        return y


def _early_release():
    # As on CUDA: what was sent is let go by the channel, and not by a thread that waits for it.
    def wait_only(pending, timeout):
        while (sent := pending.get()) is not None:
            for work in sent.works:
                work.wait(timeout)
            sent.waited.set()
            del sent, work  # or the thread would hold what it has just sent

    p2p._wait_for_sends = wait_only
    rank = dist.get_rank()
    # The second rank is late, so that sends are long done when the first one needs their answer.
    stage = Watched(0.1 * rank)
    pipeline = Pipeline("1f1b", stage, timeout_s=TIMEOUT_S)
    x = torch.ones(8, H, dtype=torch.float64)
    pipeline.step(
        *([x] if rank == 0 else []),
        num_chunks=4,
        criterion=mse,
        labels=([torch.zeros_like(x)] if rank else ()),
    )
    return stage.there


def test_outputs_are_gone_once_they_are_sent():
    first, _ = run_ranks(_early_release, 2, run_timeout_s=60)
    # The last of them too, behind which nothing is sent.
    assert first == [False] * 4
