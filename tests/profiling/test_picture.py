import json

import pytest

from dualpipe_ext.profiling import analyze, read_trace
from dualpipe_ext.profiling.picture import draw_overlap
from tests.profiling.test_report import document


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(document()))
    return read_trace(path)


def test_legend_names_every_phase(trace, tmp_path):
    draw_overlap(trace, analyze(trace), tmp_path / "p.svg")
    svg = (tmp_path / "p.svg").read_text()
    for label in ("attention", "dispatch", "layer", "waiting for ranks", "60.0% of the"):
        assert f"<!-- {label}" in svg
    draw_overlap(trace, analyze(trace), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_other_formats_are_refused(trace, tmp_path):
    with pytest.raises(ValueError, match="expected a picture ending in"):
        draw_overlap(trace, analyze(trace), tmp_path / "p.bmp")
    assert not (tmp_path / "p.bmp").exists()
