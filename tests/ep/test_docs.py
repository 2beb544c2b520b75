"""The numeric examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch


@pytest.mark.parametrize("name", ["buffer", "expand", "fp8", "reference"])
def test_examples(name: str) -> None:
    module = importlib.import_module(f"dualpipe_ext.ep.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0
