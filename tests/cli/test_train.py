"""``dualpipe train`` as a user runs it: files left behind, resuming, failures, Ctrl-C."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from dualpipe_ext.cli.main import main

TINY = [
    "--hidden=32", "--layers=4", "--experts=8", "--top-k=2", "--seq-len=32", "--seed=1"
]  # fmt: skip


def dualpipe(*args: str, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dualpipe_ext", "train", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_a_run_leaves_metrics_plot_summary_and_checkpoint(tmp_path: Path):
    done = dualpipe(*TINY, "--steps=6", "--out=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert len(losses(run)) == 6
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["transport"] == "collective"
    assert summary["stage sends"] == "collective"
    assert summary["communication"] == "none of its own"
    assert "communication  none of its own" in done.stdout
    assert "2 pipeline x 2 expert-parallel" in done.stdout
    assert "bubble" in done.stdout
    assert (run / "checkpoints" / "step-00000006" / "rank-00003.pt").is_file()
    assert not list(run.glob("*.partial"))


def test_fp8_experts(tmp_path: Path):
    sizes = ["--hidden=128", "--expert-hidden=128", "--layers=4", "--experts=8", "--top-k=2"]
    args = [*sizes, "--seq-len=32", "--steps=2", "--fp8-experts"]
    done = dualpipe(*args, "--out=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    layout = (tmp_path / "run" / "checkpoints" / "step-00000002" / "layout.json").read_text()
    assert json.loads(layout)["model"]["fp8_experts"] is True
    done = dualpipe(*TINY, "--fp8-experts", "--out=other", cwd=tmp_path)
    assert "expected hidden to be a multiple of 128 for fp8_experts, got 32" in done.stderr
    assert not (tmp_path / "other").exists()


def test_a_resumed_run_repeats_the_losses_bit_for_bit(tmp_path: Path):
    common = [*TINY, "--steps=8", "--rebalance-every=3"]
    assert dualpipe(*common, "--out=straight", "--save-every=5", cwd=tmp_path).returncode == 0
    straight = losses(tmp_path / "straight")
    # As after a crash in step 7: metrics past the checkpoint, which must not stay.
    checkpoint = "straight/checkpoints/step-00000005"
    resumed = dualpipe(*common, f"--resume={checkpoint}", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path / "straight") == straight


def test_an_average_is_saved_and_resumed_and_the_memory_level_may_change(tmp_path: Path):
    common = ["--layers=4", "--seq-len=16", "--pp=1", "--ep=2", "--ema=0.9", "--ema-dtype=bfloat16"]
    done = dualpipe(*common, "--steps=2", "--memory-level=2", "--out=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "run/checkpoints/step-00000002/rank-00001.pt"
    saved = torch.load(file, weights_only=True)["ema"]
    assert saved["steps"] == 2
    assert {t.dtype for t in saved["average"].values()} == {torch.bfloat16}
    again = dualpipe(*common, "--steps=3", "--memory-level=0", "--resume=run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    file = tmp_path / "run/checkpoints/step-00000003/rank-00001.pt"
    assert torch.load(file, weights_only=True)["ema"]["steps"] == 3
    other = dualpipe(*common, "--steps=4", "--ema=0.5", "--resume=run", cwd=tmp_path)
    assert other.returncode == 2
    assert "ema = 0.9 (this run: 0.5)" in other.stderr


def test_a_run_is_compared_with_one_that_nobody_balances(tmp_path: Path):
    done = dualpipe(
        *TINY, "--steps=6", "--rebalance-every=2", "--spare-mib=0", "--compare-unbalanced",
        "--out=run", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    with (run / "unbalanced.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(7, 15))  # 2 to warm up, and as many
    assert all(float(row["moved_bytes"]) == 0 and row["rebalance"] == "0" for row in rows)
    assert len(losses(run)) == 6
    summary = json.loads((run / "summary.json").read_text())
    times = [summary[name] for name in ("step time, last 4 steps", "the same, unbalanced")]
    assert all(float(time.split()[0]) > 0 and "p20" in time and "p80" in time for time in times)
    ratio = float(times[1].split()[0]) / float(times[0].split()[0])
    assert float(summary["speed-up over unbalanced"][:-1]) == pytest.approx(ratio, rel=0.01)
    assert "unbalanced 0." in summary["expert balance of these"]
    assert "experts move: " in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--memory-level=4"], "expected a memory_level from 0 to 3, got 4"),
        (["--memory-level=2", "--hidden=64"], "expected hidden to be a multiple of 128"),
        (["--ema=1"], "expected decay above 0 and below 1, got 1.0"),
        (["--ema-dtype=int8"], "expected an ema_dtype of float32, bfloat16, got 'int8'"),
        (["--spare-mib=-1"], "expected spare_bytes of at least 0, got -1048576"),
        (
            ["--ep=3", "--pp=1", "--redundant-experts=2", "--batch=12", "--compare-unbalanced"],
            "expected experts + redundant experts to be a multiple of 3 expert-parallel ranks, "
            "got 16 + 0",
        ),
        (["--pp=0"], "expected a positive pp, got 0"),
        (["--chunks=0"], "expected a positive num_chunks, got 0"),
        (["--batch=7"], "expected batch to be a multiple"),
        (["--schedule=gpipe"], "gpipe"),
        (["--chunks=3"], "chunks"),
        (["--data=missing.txt"], "expected a readable text file for --data, got missing.txt"),
        (["--resume=nowhere"], "expected a checkpoint or a run's folder, got nowhere"),
        (["--model=huge"], "expected --model of tiny, small, got 'huge'"),
        (["--transport=pigeon"], "pigeon"),
        (["--stage-transport=pigeon"], "pigeon"),
        (["--comm-sms=many"], "expected --comm-sms of auto or a number of at least 0, got 'many'"),
        (["--comm-sms=-1"], "expected --comm-sms of auto or a number of at least 0, got '-1'"),
        (["--comm-sms="], "expected --comm-sms of auto or a number of at least 0, got ''"),
        (["--comm-sms=8"], "expected --comm-sms auto without GPUs, which have the SMs, got 8"),
        (
            ["--sm-means=loud"],
            "expected sm_means to be one of none, persistent, yielding, carve_out, green",
        ),
        (["--sm-means=carve_out"], "with comm_sms='auto', got 'carve_out'; give a number"),
        (["--steps=many"], "'--steps'"),
        (["--dtype="], "expected a dtype of float64, float32, bfloat16, got ''"),
        (["--model="], "expected --model of tiny, small, got ''"),
        (["--lr=nan"], "expected lr above 0 and finite, got nan"),
        (["--timeout-s=inf"], "expected timeout_s above 0 and finite, got inf"),
        (["--save-every=-1"], "expected save_every of at least 0, got -1"),
        (["--seed=-1"], "expected a seed from 0 to 2**32 - 1, got -1"),
        (["--pp=100000"], "expected at least one layer per pipeline rank, got 4 layers"),
        (["--seq-len=100000000"], "expected training text of at least 100000001 bytes"),
        (["--data=/dev/null"], "expected a readable text file for --data, got /dev/null"),
        ([f"--out={__file__}"], "expected a folder that can be made for --out"),
        ([f"--out={__file__}/run"], "expected a folder that can be made for --out"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, message, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *args]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert errors.startswith("dualpipe: error: ")
    assert message in errors
    assert not list(tmp_path.iterdir())


def test_the_environments_transport_is_checked_before_any_rank_starts(
    tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALPIPE_TRANSPORT", "pigeon")
    assert main(["train"]) == 2
    assert (
        "expected transport to be one of auto, nvlink, copy_engine, low_latency, collective, got"
        in (capsys.readouterr().err)
    )
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, monkeypatch, capsys):
    alone = [*TINY, "--pp=1", "--ep=1"]
    assert dualpipe(*alone, "--steps=1", "--out=run", cwd=tmp_path).returncode == 0
    (tmp_path / "run/checkpoints/step-00000001/rank-00000.pt").write_bytes(b"PK")
    monkeypatch.chdir(tmp_path)
    assert main(["train", *alone, "--steps=2", "--resume=run"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("dualpipe: error: expected a readable checkpoint in run/")
    assert errors.count("\n") == 1


def torchrun(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "-m", "dualpipe_ext", "train", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip


def test_torchrun_gives_the_losses_of_the_launcher(tmp_path: Path):
    common = [*TINY, "--pp=2", "--ep=1", "--steps=2"]
    assert dualpipe(*common, "--out=here", cwd=tmp_path).returncode == 0
    done = torchrun(*common, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # Every rank wrote into one folder, though each has a clock of its own.
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "checkpoints" / "step-00000002" / "rank-00001.pt").is_file()
    assert losses(folder) == losses(tmp_path / "here")


def test_a_folder_with_a_run_in_it_is_not_overwritten(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("precious")
    assert main(["train", "--out=run"]) == 2
    assert (
        "expected --out without a run in it (or --resume run), got run" in capsys.readouterr().err
    )
    assert (tmp_path / "run" / "metrics.csv").read_text() == "precious"


def start(*args: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dualpipe_ext", "train", *args],
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # As from a terminal: what a shell starts in the background inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(path: Path, run: subprocess.Popen[str], seconds: float = 60) -> None:
    """Wait until ``run`` has made ``path``."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def session_members(session: int) -> dict[int, str]:
    """Processes of a session and what each was started as."""
    members = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                members[int(entry.name)] = (entry / "cmdline").read_text()
        except OSError:
            continue  # ended while we looked
    return members


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="reads /proc")
@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_nothing_behind(how, code, tmp_path: Path, monkeypatch):
    # Not below tmp_path: the fork server's socket is in it, and its path must be short.
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setenv("TMPDIR", str(temporary))
    run = start(*TINY, "--steps=100000", "--out=run", cwd=tmp_path)
    wait_for(tmp_path / "run" / "metrics.csv", run)
    # Ctrl-C on a terminal reaches every process, a job scheduler's SIGTERM the first one.
    (os.killpg if how == signal.SIGINT else os.kill)(run.pid, how)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == code, errors
    assert "Traceback" not in errors
    assert not list(temporary.glob("dualpipe-*"))
    shutil.rmtree(temporary)
    deadline = time.monotonic() + 20
    while session_members(run.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not session_members(run.pid)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="reads /proc")
def test_a_killed_worker_ends_the_run_and_the_checkpoint_is_intact(tmp_path: Path):
    run = start(*TINY, "--steps=100000", "--save-every=2", "--out=run", cwd=tmp_path)
    wait_for(tmp_path / "run" / "checkpoints" / "step-00000002", run)
    # Workers are the forked children of the fork server: no process has a child of its own.
    parents = {
        int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
        for pid in session_members(run.pid)
    }
    workers = [
        pid for pid, how in session_members(run.pid).items()
        if pid not in parents and "forkserver" in how
    ]  # fmt: skip
    assert len(workers) == 4
    started = time.monotonic()
    os.kill(workers[2], signal.SIGKILL)
    _, errors = run.communicate(timeout=30)
    assert time.monotonic() - started < 20
    assert run.returncode == 1
    assert "killed by signal 9" in errors
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    steps = int(newest.name.removeprefix("step-"))
    again = dualpipe(*TINY, f"--steps={steps + 2}", f"--resume={newest}", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert len(losses(tmp_path / "run")) == steps + 2
