"""What the README shows is what a reader gets: its Python runs, its tables come from the code."""

from __future__ import annotations

import csv
import re
import runpy
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from dualpipe_ext import env
from dualpipe_ext.cli.main import main
from dualpipe_ext.launch import run_ranks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


class Experts(nn.Module):
    def forward(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        assert offsets[-1] == len(rows)
        return rows * 2


def run_python_block(source: str) -> tuple[list[float], bool, list[int]]:
    torch.manual_seed(0)
    idx = torch.stack([torch.randperm(64)[:6] for _ in range(10)])
    names = {
        "first_stage": nn.Embedding(11, 16),
        "last_stage": nn.Linear(16, 11),
        "pp_group": dist.group.WORLD,
        "ep_group": dist.group.WORLD,
        "tokens": torch.arange(16) % 11,
        "targets": torch.arange(16) % 11,
        "loss_fn": nn.functional.cross_entropy,
        "x": torch.randn(10, 512),
        "topk_idx": idx,
        "topk_weights": torch.rand(10, 6),
        "experts": Experts(),
        "loads": torch.rand(3, 64),
    }
    exec(source, names)
    expected = 2 * names["x"] * names["topk_weights"].sum(1, keepdim=True)
    close = torch.allclose(names["y"], expected, rtol=1e-5, atol=1e-5)
    return names["loss"].tolist(), close, list(names["phy2log"].shape)


def test_python_example_runs():
    (source,) = blocks("python")
    losses, combined, shape = run_ranks(run_python_block, 1, source, run_timeout_s=60)[0]
    assert len(losses) == 8
    assert combined
    assert shape == [3, 72]


def test_schedule_table_is_what_the_command_prints(capsys):
    command = next(line for b in blocks("bash") for line in b.splitlines() if "schedule" in line)
    assert main(command.split()[1:]) == 0
    printed = capsys.readouterr().out
    shown = next(b for b in blocks("text") if "zb1p" in b)
    assert shown.strip() == printed.strip()


def test_picture_commands_exist():
    for command in re.findall(r"`dualpipe (schedule [^`]*|eplb [^`]*)`", README):
        # All but the drawing itself, which would rewrite the picture.
        assert main(re.split(" --(?:out|picture) ", command)[0].split()) == 0


def test_every_environment_variable_is_listed():
    rows = dict(re.findall(r"^\| `(DUALPIPE_\w+)` \| (.*?) \|", README, re.MULTILINE))
    assert rows == {v.name: v.meaning for v in env.VARIABLES}


TOOL = runpy.run_path(str(ROOT / "tools" / "readme_tables.py"))


def test_tables_are_what_the_recorded_rows_say():
    marked = re.findall(r"<!-- table: (\w+) -->", README)
    assert sorted(marked) == sorted(TOOL["TABLES"])
    assert README.count("<!-- end of table -->") == len(marked)
    assert TOOL["filled"](README) == README, "run python tools/readme_tables.py"


QUEUE = "CUDA_DEVICE_MAX_CONNECTIONS=1"


def write_rows(folder: Path, rows: list[dict[str, str]], name: str = "eplb") -> None:
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_rows_of_a_gpu_replace_those_of_a_cpu(tmp_path, monkeypatch):
    with (ROOT / "benchmarks" / "results" / "eplb.csv").open(newline="") as file:
        cpu = next(csv.DictReader(file)) | {"gpu": "none", "kernel_us_p50": ""}
    cpu |= {"eager_us_p50": "", "numpy_over_kernel": "", "numpy_us_p50": "9000"}
    measured = {"gpu": "GPU A", "kernel_us_p50": "120.5", "eager_us_p50": "140", "date": "1st"}
    gpu = cpu | measured | {"numpy_us_p50": "9100", "numpy_over_kernel": "75.5"}
    newer = gpu | {"kernel_us_p50": "110.5", "date": "2nd"}
    # The functions of the tool look the folder up in what runpy returned.
    monkeypatch.setitem(TOOL["eplb"].__globals__, "RESULTS", tmp_path)
    write_rows(tmp_path, [cpu])
    assert "kernel, in a graph" not in TOOL["eplb"]()
    assert "9.0 ms" in TOOL["eplb"]()
    write_rows(tmp_path, [gpu, newer, cpu])
    table = TOOL["eplb"]()
    assert "| 110.5 us | 140.0 us |" in table
    assert "| 75.5x |" in table
    assert "9.1 ms" in table
    assert "9.0 ms" not in table
    assert "GPU A" in table
    assert "2nd" in table
    assert table.count("58 x 256 to 288 on 32 in 4 hosts") == 2


def test_rows_of_one_hardware_queue_replace_no_others(tmp_path, monkeypatch):
    with (ROOT / "benchmarks" / "results" / "memory.csv").open(newline="") as file:
        first = next(csv.DictReader(file)) | {"step_ms_p50": "11.5"}
    command = f"{QUEUE} {first['command']}"
    monkeypatch.setitem(TOOL["memory"].__globals__, "RESULTS", tmp_path)
    write_rows(tmp_path, [first, first | {"command": command, "step_ms_p50": "99.5"}], "memory")
    table = TOOL["memory"]()
    assert "| 11.5 |" in table
    assert "99.5" not in table


def test_pairs_in_one_hardware_queue_are_rows_of_their_own(tmp_path, monkeypatch):
    with (ROOT / "benchmarks" / "results" / "pipeline.csv").open(newline="") as file:
        usual = [row for row in csv.DictReader(file) if row["part"] == "pair"][-1]
    usual |= {"pair_ms_p50": "11.5", "command": "dualpipe bench pipeline"}
    shared = usual | {"pair_ms_p50": "99.5", "command": f"{QUEUE} dualpipe bench pipeline"}
    monkeypatch.setitem(TOOL["pairs"].__globals__, "RESULTS", tmp_path)
    write_rows(tmp_path, [shared, usual], "pipeline")
    table = TOOL["pairs"]()
    assert table.index("| 11.5 |") < table.index(", one hardware queue |") < table.index("| 99.5 |")


def test_shares_of_plain_pushes_and_copies_are_shown_where_measured(tmp_path, monkeypatch):
    with (ROOT / "benchmarks" / "results" / "ep.csv").open(newline="") as file:
        first = next(csv.DictReader(file))
    old = first | {"num_sms": "24", "of_push": "", "of_peer_copy": ""}
    copies = old | {"transport": "copy_engine", "num_sms": ""}
    monkeypatch.setitem(TOOL["ep"].__globals__, "RESULTS", tmp_path)
    write_rows(tmp_path, [old, copies], "ep")
    assert "plain" not in TOOL["ep"]()
    push = old | {"case": "push-bf16", "transport": "push_kernel"}
    new = [old | {"of_push": "0.9531"}, copies | {"of_peer_copy": "0.9612"}, push]
    write_rows(tmp_path, new, "ep")
    table = TOOL["ep"]()
    assert "| of a plain push, 24 SMs |" in table
    assert "| 95.3% |" in table
    assert "| 96.1% |" in table
    assert "push-bf16" not in table


def test_linked_files_exist():
    links = re.findall(r"\]\((?!http|#)([^)]+)\)", README)
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing
