"""``dualpipe bench ep`` as a user runs it: table, files, mistakes, and exit codes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dualpipe_ext.bench import ep_run
from dualpipe_ext.cli.main import main
from tests.bench.runs import run_with_flipped_bit

SMALL = [
    *("--device", "cpu", "--tokens", "6", "--hidden", "128", "--experts", "4", "--top-k", "2"),
    *("--rounds", "2", "--calls", "2"),
]
FEW = ["--what", "dispatch-bf16-token,combine-token"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go into the current folder, not into the results of this repository."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def bench(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main(["bench", "ep", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_rows_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transports = "collective,gloo,nccl,nvlink"
    args = [*SMALL, *FEW, "--transports", transports, "--sms", "4"]
    code, out, _ = bench(capsys, *args, "--picture", "p.svg", "--no-gemm")
    assert code == 0
    assert "2 ranks on a CPU; 6 tokens per rank x 128, 4 experts, top-2; median of 2 rounds" in out
    assert "Wrote p.svg" in out
    assert "<!-- combine-token, gloo-per-rank" in (tmp_path / "p.svg").read_text()
    rows = read(tmp_path / "ep.csv")
    by_status = {(row["transport"], row["case"]): row for row in rows if row["status"] == "ok"}
    assert set(by_status) == {
        (transport, case)
        for transport in ("collective", "gloo-per-rank")
        for case in ("dispatch-bf16-token", "combine-token")
    }
    assert all(float(row["us_p50"]) > 0 for row in by_status.values())
    given = " ".join([*args, "--no-gemm"])
    assert all(sorted(r["command"].split()[3:]) == sorted(given.split()) for r in rows)
    missing = {row["transport"]: row["reason"] for row in rows if row["status"] == "unavailable"}
    assert set(missing) == {"nvlink", "push_kernel", "nccl-per-expert", "nccl-per-rank"}
    assert "expected --device cuda for nccl, got cpu" in missing["nccl-per-rank"]
    assert "nvlink" in missing["nvlink"]


def test_json_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [*SMALL, "--ranks", 1, "--what", "combine-token", "--output", "mine.csv", "--json"]
    code, out, _ = bench(capsys, *args)
    assert code == 0
    document = json.loads(out)
    assert document["command"].startswith("dualpipe bench ep --ranks 1 --device cpu")
    assert "--json" not in document["command"]
    assert {row["transport"] for row in document["rows"]} == {"collective", "gloo-per-rank"}
    assert all(row["status"] == "ok" and row["wire_bytes"] == 0 for row in document["rows"])
    assert len(read(tmp_path / "mine.csv")) == 2


def test_wrong_results_are_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ep_run, "run", run_with_flipped_bit)
    what = ["--what", "dispatch-bf16-token,dispatch-bf16-expert", "--transports", "collective"]
    code, out, _ = bench(capsys, *SMALL, *what)
    assert code == 1
    assert "FAILED: dispatch-bf16-expert, collective: uncached: rank 1: tokens: 1 of" in out
    rows = {row["case"]: row for row in read(tmp_path / "ep.csv")}
    assert rows["dispatch-bf16-expert"]["status"] == "FAILED"
    assert rows["dispatch-bf16-expert"]["us_p50"] == ""
    assert rows["dispatch-bf16-token"]["status"] == "ok"


def test_nothing_measured_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = bench(capsys, *SMALL, *FEW, "--virtual-ranks", 2)
    assert code == 1
    assert "unavailable: collective: rank 0: expected a process per rank for collective" in out


def test_under_torchrun_its_ranks_are_used(tmp_path: Path) -> None:
    program = "import sys; from dualpipe_ext.cli.main import main; sys.exit(main(sys.argv[1:]))"
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, "bench", "ep", *SMALL, *FEW],
            env={**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert "combine-token" in outputs[0]
    assert outputs[1] == ""
    assert len(read(tmp_path / "ep.csv")) == 4


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = bench(capsys)
    assert (code, out) == (2, "")
    assert err.startswith("dualpipe: error: expected a GPU, got none; to try it out on the CPU: ")
    assert err.count("\n") == 1
    # What it recommends can be typed; it is checked here up to where it would start.
    words = err.split("dualpipe bench ep ")[1].split()
    assert bench(capsys, *words, "--tokens", "0")[2].endswith("--tokens of at least 1, got 0\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--transports", "nvlink,ib"],
            "--transports of nvlink, copy_engine, low_latency, collective",
        ),
        (["--transports", ","], "got ','"),
        (["--what", "gather"], "--what of dispatch, combine, dispatch-bf16-buffer"),
        (["--sms", "8,many"], "--sms as integers separated by commas, got '8,many'"),
        (["--sms", "0"], "--sms of at least 1, got 0"),
        (["--device", "tpu"], "--device of cuda, cpu, got 'tpu'"),
        (["--ranks", "0"], "--ranks of at least 1, got 0"),
        (["--virtual-ranks", "-1"], "--virtual-ranks of at least 1, got -1"),
        (["--ranks", "2", "--virtual-ranks", "2"], "--ranks or --virtual-ranks, got both"),
        (["--ranks", "3"], "--experts to be a multiple of 3 ranks, got 4"),
        (["--hidden", "64"], "--hidden to be a multiple of 128"),
        (["--calls", "0"], "--calls of at least 1, got 0"),
        (["--picture", "p.gif"], "a picture ending in"),
        (["--picture", "no/p.png"], "existing folder"),
        (["--output", "no/ep.csv"], "existing folder"),
        (["--output", "other.csv"], "expected the columns date, commit"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    code, out, err = bench(capsys, *SMALL, *args)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other.csv"]


def test_ranks_that_torchrun_did_not_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = bench(capsys, *SMALL, "--ranks", 4)
    assert code == 2
    assert "expected the 2 ranks that torchrun started" in err


@pytest.mark.parametrize("args", [["bench"], ["bench", "--help"], ["bench", "ep", "--help"]])
def test_help_needs_no_torch(args: list[str]) -> None:
    program = (
        "import sys; from dualpipe_ext.cli.main import main\n"
        f"code = main({args!r})\n"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("--transports" if "ep" in args else "Time expert-parallel dispatch") in done.stdout
