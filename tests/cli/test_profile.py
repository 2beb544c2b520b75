import json

import pytest

from dualpipe_ext.cli.main import main
from tests.profiling.test_report import document


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(document()))
    return path


def test_figures_table_json_and_picture(trace, tmp_path, capsys):
    files = [f"--json={tmp_path / 'r.json'}", f"--out={tmp_path / 'r.png'}"]
    assert main(["profile", str(trace), *files]) == 0
    printed = capsys.readouterr().out
    assert "60.0%" in printed
    assert "1.30x" in printed
    assert "20 of 132" in printed
    assert "attention" in printed
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["hidden"] == pytest.approx(0.6)
    assert report["gaps"][0]["duration_us"] == 4
    assert (tmp_path / "r.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["missing.json"], "missing.json"),
        (["{trace}", "--comm=("], "expected regular expressions"),
        (["{trace}", "--device=7"], "expected a GPU of [0]"),
        (["{trace}", "--out=x.bmp"], "expected a picture ending in"),
        (["{trace}", "--json=nowhere/x.json"], "existing folder"),
        (["{trace}", "--gaps=-1"], "--gaps of at least 0, got -1"),
        ([], "trace"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, message, trace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["profile", *(a.replace("{trace}", str(trace)) for a in args)]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert message.lower() in errors.lower()
    assert sorted(tmp_path.iterdir()) == before
