"""Pictures: what is in them, that they repeat byte for byte, and that large ones work."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import image as mpl_image
from matplotlib.colors import to_rgb

from dualpipe_ext.pipeline import draw as draw_module
from dualpipe_ext.pipeline.draw import draw
from dualpipe_ext.pipeline.plan import KINDS, Op, Plan, build_plan
from dualpipe_ext.pipeline.simulate import Durations, simulate


def plan_of(kind: str, num_ranks: int = 4, num_chunks: int = 10) -> Plan:
    return build_plan(kind, num_ranks=num_ranks, num_chunks=num_chunks)


def texts(path: Path) -> list[str]:
    """The texts in an SVG: matplotlib names each in a comment beside its outlines."""
    return re.findall(r"<!-- (.*?) -->", path.read_text())


def test_svg_names_every_chunk(tmp_path: Path) -> None:
    path = tmp_path / "out.svg"
    draw(plan_of("dualpipe"), path)
    ElementTree.parse(path)
    found = texts(path)
    # The second direction is numbered on from the first. Numbers on the time axis are above 30.
    for chunk in range(10):
        # F and B on each of 4 ranks, and W where the backward is split.
        assert found.count(str(chunk)) >= 8
    assert any("DualPipe: 4 ranks, 10 chunks, time 32, bubble 2 (6.2%)" in text for text in found)
    assert {"forward", "backward", "backward for input", "backward for weights", "idle"} <= {*found}
    assert [f"rank {rank}" for rank in range(4)] == [t for t in found if t.startswith("rank ")]


def test_svg_repeats_byte_for_byte(tmp_path: Path) -> None:
    plans = [plan_of("dualpipev"), plan_of("1f1b")]
    draw(plans, tmp_path / "a.svg")
    draw(plans, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_several_share_one_picture(tmp_path: Path) -> None:
    path = tmp_path / "out.svg"
    draw([plan_of(kind) for kind in KINDS], path, durations=Durations(F=1, B=2))
    found = texts(path)
    for name in ("DualPipe", "DualPipeV", "1F1B", "ZB1P (ZB-H1)", "ZB-V"):
        assert sum(text.startswith(f"{name}: ") for text in found) == 1


def test_legend_has_only_what_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "out.svg"
    draw(plan_of("1f1b"), path)
    found = set(texts(path))
    assert {"forward", "backward"} <= found
    assert "backward for input" not in found
    assert not any("overlapped" in text or text.startswith("light") for text in found)


def test_png_has_the_colours(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    draw(simulate(plan_of("dualpipe")), path)
    pixels = mpl_image.imread(path)[..., :3].reshape(-1, 3)
    for op in Op:
        for colour in draw_module._COLOURS[op]:
            near = np.abs(pixels - np.array(to_rgb(colour))).max(axis=1) < 0.01
            # Legend patches alone are a few thousand pixels: cells must be there, too.
            assert near.sum() > 5_000, (op, colour)


@pytest.mark.parametrize("kind", KINDS)
def test_large_ones_are_images(kind: str, tmp_path: Path) -> None:
    plan = plan_of(kind, 64, 200)
    assert sum(map(len, plan.actions)) > draw_module._MOST_CELLS
    path = tmp_path / "out.svg"
    draw(plan, path)
    assert "<image" in path.read_text()
    assert path.stat().st_size < 2_000_000


def test_pixels_are_the_mean_of_what_happens() -> None:
    result = simulate(plan_of("1f1b", 2, 2))
    forward, backward, idle = (
        np.array(to_rgb(colour))
        for colour in (
            draw_module._COLOURS[Op.F][0],
            draw_module._COLOURS[Op.B][0],
            draw_module._IDLE,
        )
    )
    # Rank 0: F 0-1, F 1-2, idle 2-4, B 4-6, idle 6-7, B 7-9; the picture goes on to 10.
    edges = np.array([0, 2, 5, 7, 9, 10.0])
    row = draw_module._pixel_row(result, 0, edges)
    expected = [
        forward,
        (2 * idle + backward) / 3,
        (backward + idle) / 2,
        backward,
        np.ones(3),
    ]
    np.testing.assert_allclose(row, expected, atol=1e-12)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a picture ending in \.svg, \.png, \.pdf"):
        draw(plan_of("1f1b"), tmp_path / "out.jpg")
    with pytest.raises(ValueError, match="expected at least one schedule"):
        draw([], tmp_path / "out.svg")
    with pytest.raises(ValueError, match="existing folder"):
        draw(plan_of("1f1b"), tmp_path / "none" / "out.svg")
    assert list(tmp_path.iterdir()) == []
