"""What the guide shows is what a reader gets: its stage trains, and its table is the model's.

T tokens, H hidden.
"""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualpipe_ext.ep import Buffer
from dualpipe_ext.launch import run_ranks
from dualpipe_ext.models import ModelConfig
from dualpipe_ext.models.moe import MoELayer
from dualpipe_ext.pipeline.launch_order import interleave
from dualpipe_ext.pipeline.overlap import Phase

GUIDE = (Path(__file__).parents[1] / "docs" / "guide.md").read_text()
H = 8


def blocks(language: str) -> list[str]:
    every = re.findall(r"```(\w*)\n(.*?)```", GUIDE, re.DOTALL)
    return [text for kind, text in every if kind == language]


def stage_class(source: str) -> Callable[[], nn.Module]:
    """The guide's ``Stage`` with the four methods that it leaves to the reader."""
    names = {"nn": nn}
    exec(source, names)

    class Layer(names["Stage"]):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(H, H), nn.Linear(H, H)
            self.double()
            self.buffer = Buffer(
                dist.new_group([dist.get_rank()]), hidden=H, num_experts=2, top_k=1, max_tokens=16
            )

        def attention(self, x: Tensor) -> tuple[object, ...]:
            return x + self.first(x).tanh(), (x.detach()[:, :1] > 0).long()

        def dispatch(self, x: Tensor, topk_idx: Tensor) -> tuple[object, ...]:
            recv, handle = self.buffer.dispatch(x, topk_idx)
            return x, recv.tokens, handle

        def experts(self, x: Tensor, rows: Tensor, handle: object) -> tuple[object, ...]:
            return x, self.second(rows).tanh(), handle

        def combine(self, x: Tensor, rows: Tensor, handle: object) -> tuple[object, ...]:
            return (x + self.buffer.combine(rows, handle)[0],)

    return Layer


def train_as_the_guide_does(stage_source: str, run_source: str) -> tuple[float, int]:
    """Largest difference of a gradient from plain autograd's, and the number of losses."""
    torch.manual_seed(0)
    make = stage_class(stage_source)
    stages = [make(), make()]
    tokens, targets = torch.randn(16, H).double(), torch.randn(16, H).double()
    names = {
        "group": dist.group.WORLD,
        "first_stage": stages[0],
        "last_stage": stages[1],
        "tokens": tokens,
        "targets": targets,
        "loss_fn": nn.functional.mse_loss,
    }
    exec(run_source, names)
    ours = [p.grad.clone() for stage in stages for p in stage.parameters()]
    for stage in stages:
        stage.zero_grad()
    for x, y in zip(tokens.chunk(8), targets.chunk(8), strict=True):
        nn.functional.mse_loss(stages[1](stages[0](x)), y).backward()
    theirs = [p.grad for stage in stages for p in stage.parameters()]
    worst = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    return worst, len(names["loss"])


def test_the_guides_memory_example_runs() -> None:
    (example,) = (text for text in blocks("pycon") if "saved_as" in text)
    parsed = doctest.DocTestParser().get_doctest(example, {"torch": torch}, "guide", None, 0)
    result = doctest.DocTestRunner().run(parsed, clear_globs=False)
    assert (result.failed, result.attempted) == (0, 8)
    assert parsed.globs["weight"].grad.shape == (256, 128)


def test_the_guides_stage_trains_like_plain_autograd() -> None:
    phases, running, *_ = blocks("python")
    ((worst, num_losses),) = run_ranks(
        train_as_the_guide_does, 1, phases, running, run_timeout_s=60
    )
    assert worst < 1e-12
    assert num_losses == 8


DROP_INS = [block.strip() for block in blocks("python") if "dualpipe_ext.integrations" in block]


def test_the_readme_shows_the_guides_drop_ins() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    rows = re.findall(
        r"^\| .* \| `(from dualpipe_ext.integrations[^`]*)` \|$", readme, re.MULTILINE
    )
    assert len(DROP_INS) == 3
    statements = [[s.partition("  #")[0] for s in block.split("\n") if s] for block in DROP_INS]
    assert {"; ".join(block) for block in statements} < set(rows)
    assert len(rows) == 4  # and DeepSeek's, which a script imports as it did


@pytest.mark.parametrize("block", DROP_INS, ids=lambda block: block.split()[3])
def test_a_drop_in_runs_as_it_stands(block: str) -> None:
    if "import megatron" in block:
        pytest.importorskip("megatron.core", reason="needs megatron-core")
    done = subprocess.run(
        [sys.executable, "-c", block], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_table_lists_the_phases_of_the_model() -> None:
    config = ModelConfig(hidden=32, num_layers=1, num_heads=2, expert_hidden=16, shared_hidden=32)
    buffer = Buffer(hidden=32, num_experts=16, top_k=4, max_tokens=8)
    layer = MoELayer(config, buffer=buffer, replica_offset=0)
    shown = re.findall(r"^\| (\w+) \| (compute|comm) \|", GUIDE, re.MULTILINE)
    assert shown == [(phase.name, phase.stream) for phase in layer.phases()]


def test_the_launch_order_is_the_engines() -> None:
    (shown,) = blocks("")
    phases = [
        Phase(name, stream, tuple)
        for name, stream in re.findall(r"^\| (\w+) \| (compute|comm) \|", GUIDE, re.MULTILINE)
    ]
    order = [f"{phases[one.index].name}({one.op})" for one in interleave(phases, phases)]
    assert shown.split() == order
