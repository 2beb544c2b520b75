"""Tiers: what needs a GPU is skipped, with the reason, where there is none.

``tests/gpu`` needs one Hopper GPU, ``tests/multi_gpu`` two or more. The folder decides, so a file
there needs no marker of its own; elsewhere single tests may carry the marker.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

# Tests and the ranks they start share few cores: OpenMP threads that wait for each other would spin
# away the time of the others. Before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What most of the ranks that tests start would import, each for itself; a second of every run.
PRELOADED = (
    "pytest",
    "hypothesis",
    "dualpipe_ext.training.run",
    "dualpipe_ext.bench.ep_run",
    "dualpipe_ext.bench.pipeline_run",
    "dualpipe_ext.integrations.deep_ep",
)

# How long an example takes says nothing on a machine that others use.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")

HERE = Path(__file__).parent
HOPPER = (9, 0)
TIERS = {"gpu": 1, "multi_gpu": 2}  # marker and folder -> GPUs needed


def pytest_configure() -> None:
    # The Triton kernels are not below dualpipe_ext/ in the tree: only an install maps them there.
    if importlib.util.find_spec("dualpipe_ext.kernels") is None:
        pytest.exit("dualpipe_ext is not installed: run `make test`, or `pip install -e .`", 2)
    if not _num_hopper_gpus():  # not tried where workers go on to use GPUs
        from dualpipe_ext import launch

        launch.preload(*PRELOADED)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(HERE).parts[0]
        for tier, needed in TIERS.items():
            if folder == tier:
                item.add_marker(getattr(pytest.mark, tier))
            if item.get_closest_marker(tier) and (found := _num_hopper_gpus()) < needed:
                reason = f"needs {needed} Hopper GPU(s) and a CUDA build of torch, found {found}"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _many_hardware_queues(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch orders depend on the queues: without a GPU, tests set them where they want them."""
    if not any(request.node.get_closest_marker(tier) for tier in TIERS):
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)


@cache
def _num_hopper_gpus() -> int:
    import torch

    return sum(
        torch.cuda.get_device_capability(i) == HOPPER for i in range(torch.cuda.device_count())
    )
