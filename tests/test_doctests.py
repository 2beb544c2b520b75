"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def modules_with_examples() -> list[str]:
    """Those of the package, and the kernels, which are part of it once installed."""
    names = []
    for folder, package in ((ROOT / "dualpipe_ext", "dualpipe_ext"),
                            (ROOT / "kernels", "dualpipe_ext.kernels")):  # fmt: skip
        for file in sorted(folder.rglob("*.py")):
            if ">>>" in file.read_text():
                parts = file.relative_to(folder).with_suffix("").parts
                names.append(".".join((package, *parts)).removesuffix(".__init__"))
    return names


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0
