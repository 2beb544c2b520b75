"""The table of environment variables is complete, and bad values are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dualpipe_ext import env

ROOT = Path(__file__).parents[1]


def test_every_variable_in_the_code_is_in_the_table():
    files = [ROOT / "setup.py", *(ROOT / "dualpipe_ext").rglob("*.py")]
    files += (ROOT / "kernels").rglob("*.py")
    used = {name for f in files for name in re.findall(r"\bDUALPIPE_[A-Z_]+\b", f.read_text())}
    assert used == {variable.name for variable in env.VARIABLES}


def test_read(monkeypatch):
    monkeypatch.delenv("DUALPIPE_CUDA", raising=False)
    assert env.read("DUALPIPE_CUDA") == "auto"
    monkeypatch.setenv("DUALPIPE_CUDA", "1")
    assert env.read("DUALPIPE_CUDA") == "1"
    assert env.in_force()["DUALPIPE_CUDA"] == "1"
    monkeypatch.setenv("DUALPIPE_CUDA", "yes")
    with pytest.raises(ValueError, match="to be one of auto, 0, 1, got 'yes'"):
        env.read("DUALPIPE_CUDA")
