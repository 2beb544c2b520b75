"""What scripts of benchmarks/ share."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from dualpipe_ext.bench import ranks, script


def test_numbers_have_defaults_and_are_whole() -> None:
    parser = argparse.ArgumentParser()
    script.add_numbers(parser, {"top-k": 8, "calls": 3})
    assert vars(parser.parse_args(["--calls", "5"])) == {"top_k": 8, "calls": 5}
    with pytest.raises(SystemExit):
        parser.parse_args(["--calls", "many"])


def test_rows_are_told_and_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    given = []

    def start(measure, num_ranks, options, *, virtual, device_type):
        given.append((num_ranks, options, virtual, device_type))
        return measure(None, options)

    monkeypatch.setattr(ranks, "start", start)

    def measure(_, options):
        return [{"us": options}, {"us": options + 1}]

    script.run("made_up", ["python it.py", "--us 4"], measure, 4, lambda row: f"{row['us']} us")
    assert given == [(2, 4, False, "cuda")]
    assert capsys.readouterr().out.splitlines()[:2] == ["4 us", "5 us"]
    kept = (tmp_path / "made_up.csv").read_text().splitlines()
    assert len(kept) == 3
    assert "python it.py --us 4" in kept[1]

    # Another rank of torchrun has nothing to tell.
    monkeypatch.setattr(ranks, "start", lambda *_, **__: None)
    script.run("made_up", [], measure, 4, str)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match="expected a GPU that torch can use, got none"):
        script.run("made_up", [], measure, 4, str)
