"""Experts of a test are worth moving on a GPU too."""

from __future__ import annotations

from typing import Any

from dualpipe_ext.training import costs, experts


def reckon_as_on_a_cpu() -> None:
    """Judge re-balancings in this process by a CPU's costs.

    A GPU computes what the tests' experts do in no time, so that on one it never pays to move them.
    """

    def judge(*args: Any, **kwargs: Any) -> Any:
        return costs.judge(*args, **{**kwargs, "device_type": "cpu"})

    experts.judge = judge
