"""``dualpipe bench eplb`` as a user runs it."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from dualpipe_ext.bench import eplb as bench
from dualpipe_ext.bench.eplb import Case
from dualpipe_ext.cli.bench import app

SMALL = Case(2, 288, 4, 32)


def test_the_command_prints_every_case(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "CASES", (SMALL,))
    target = ["--output", str(tmp_path / "rows.csv")]
    table = CliRunner().invoke(app, ["eplb", "--rounds", "1", *target], env={"COLUMNS": "80"})
    assert table.exit_code == 0, table.output
    assert table.output.count("2, 288 / 4 / 32") == 2
    found = CliRunner().invoke(
        app,
        ["eplb", "--rounds", "1", "--json", "--no-balance", "--output", str(tmp_path / "2.csv")],
    )
    (row,) = json.loads(found.output)
    assert row["numpy_us_p50"] > 0
    refused = CliRunner().invoke(app, ["eplb", "--rounds", "0"])
    assert isinstance(refused.exception, ValueError)
    first, *rest = (tmp_path / "rows.csv").read_text().splitlines()
    assert "numpy_us_p50" in first
    assert len(rest) == 1
    assert "dualpipe bench eplb --rounds 1" in rest[0]
