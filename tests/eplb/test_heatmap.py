"""Heat maps: written whole, the same bytes each time, and true to their numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dualpipe_ext.eplb.heatmap import draw_heatmap


def test_an_svg_is_reproducible_and_says_the_balance(tmp_path: Path) -> None:
    panels = [("Before", torch.tensor([[1.0, 3.0], [0.0, 0.0]])), ("After", torch.ones(2, 2))]
    for name in ("a.svg", "b.svg"):
        draw_heatmap(panels, tmp_path / name, num_nodes=2)
    first = (tmp_path / "a.svg").read_text()
    assert first == (tmp_path / "b.svg").read_text()
    # Mean of 2/3 and, for the layer without load, 1.
    assert "balancedness 0.833   fullest GPU 1.50x" in first
    assert "balancedness 1.000   fullest GPU 1.00x" in first


def test_png(tmp_path: Path) -> None:
    draw_heatmap([("One", torch.rand(58, 320))], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_leave_no_file(tmp_path: Path) -> None:
    for panels, name, message in (
        ([("a", torch.ones(1, 2))], "x.txt", "picture ending in"),
        ([], "x.svg", "one size"),
        ([("a", torch.ones(1, 2)), ("b", torch.ones(1, 3))], "x.svg", "one size"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_heatmap(panels, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
