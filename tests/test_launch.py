import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from dualpipe_ext.errors import CommTimeoutError, WorkerFailedError
from dualpipe_ext.launch import run_ranks


def all_ranks_sum(scale: float) -> torch.Tensor:
    # Larger than a pipe's buffer: a result nobody drains would block its rank.
    value = torch.full((200_000,), float(dist.get_rank()))
    dist.all_reduce(value)
    return value * scale


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("no such flavour")
    dist.barrier()


def exit_on(rank: int, code: int) -> None:
    if dist.get_rank() == rank:
        os._exit(code)
    dist.barrier()


def kill_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def crash_on(rank: int) -> None:
    if dist.get_rank() == rank:
        ctypes.string_at(0)
    dist.barrier()


def end_by(how: signal.Signals, rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), how)
    time.sleep(60)


def exit_in_turn(first: int, code: int) -> None:
    if dist.get_rank() != first:
        time.sleep(1)
    os._exit(code if dist.get_rank() == first else 9)


def raise_while_others_cannot_be_stopped(rank: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    dist.barrier()
    if dist.get_rank() == rank:
        raise KeyError("no such flavour")
    time.sleep(60)


def crash_at_the_end(rank: int) -> None:
    dist.barrier()  # a rank that left sooner could fail one that still connects to it
    if dist.get_rank() == rank:
        dist.destroy_process_group = lambda: ctypes.string_at(0)


def variables(*names: str) -> list[str | None]:
    dist.barrier()
    return [os.environ.get(name) for name in names]


def stall() -> None:
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(60)


def test_results_come_in_rank_order():
    results = run_ranks(all_ranks_sum, 3, 2.0, run_timeout_s=60)
    assert [tuple(r.shape) for r in results] == [(200_000,)] * 3
    assert all(torch.equal(r, torch.full((200_000,), 6.0)) for r in results)


@pytest.mark.parametrize(
    ("fn", "args", "message"),
    [
        (raise_on, (2,), "no such flavour"),
        (exit_on, (1, 7), "exited with code 7$"),
        (exit_on, (1, 0), "exited with code 0 before it had given a result$"),
        (exit_in_turn, (2, 7), "exited with code 7$"),
        (kill_on, (0,), "killed by signal 9$"),
        (crash_on, (1,), r"(?s)killed by signal 11\nFatal Python error.*in crash_on"),
        (crash_at_the_end, (1,), "killed by signal 11 after it had given its result\nFatal Python"),
    ],
)
def test_the_failing_rank_is_named(fn, args, message):
    started = time.monotonic()
    with pytest.raises(WorkerFailedError, match=message) as caught:
        run_ranks(fn, 3, *args, run_timeout_s=60)
    assert caught.value.rank == args[0]
    assert time.monotonic() - started < 20


def test_a_rank_that_somebody_stops_is_named():
    with pytest.raises(WorkerFailedError, match=r"killed by signal 15$") as caught:
        run_ranks(end_by, 2, signal.SIGTERM, 1, run_timeout_s=60, grace_s=1)
    assert caught.value.rank == 1


def test_a_rank_that_had_to_be_killed_is_not_the_cause():
    with pytest.raises(WorkerFailedError, match="no such flavour") as caught:
        run_ranks(raise_while_others_cannot_be_stopped, 3, 1, run_timeout_s=60, grace_s=1)
    assert caught.value.rank == 1


def abort_because_of(rank: int) -> None:
    dist.barrier()
    if dist.get_rank() == rank:
        raise KeyError("no such flavour")
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    time.sleep(1.0)
    os.abort()


def test_a_rank_that_ends_itself_because_of_another_is_not_the_cause():
    told = r"(?s)no such flavour.*\nThen rank 0 failed: its process was killed by signal 6\nFatal"
    with pytest.raises(WorkerFailedError, match=told) as caught:
        run_ranks(abort_because_of, 2, 1, run_timeout_s=60)
    assert caught.value.rank == 1


def test_ranks_have_the_environment_that_is_given():
    environment = {"DUALPIPE_TEST_FLAVOUR": "mint", "RANK": "7"}
    names = ("DUALPIPE_TEST_FLAVOUR", "RANK", "WORLD_SIZE")
    results = run_ranks(variables, 2, *names, run_timeout_s=60, environment=environment)
    assert results == [["mint", "0", "2"], ["mint", "1", "2"]]
    assert "DUALPIPE_TEST_FLAVOUR" not in os.environ


def test_ranks_have_it_before_they_join_their_group():
    """It would be too late after: gloo looks up its interface once."""
    with pytest.raises(WorkerFailedError, match=r"(?s)init_process_group.*no-such-interface"):
        run_ranks(
            variables,
            1,
            backend="gloo",
            run_timeout_s=60,
            environment={"GLOO_SOCKET_IFNAME": "no-such-interface"},
        )


def test_a_run_that_takes_too_long_is_ended():
    with pytest.raises(CommTimeoutError, match=r"finish within 2 s, got results from ranks \[0\]"):
        run_ranks(stall, 2, run_timeout_s=2, grace_s=1)


SLEEPERS = """
import os, sys, time
from tests.test_launch import sleeper
from dualpipe_ext.launch import run_ranks
if __name__ == "__main__":
    run_ranks(sleeper, 2, sys.argv[1])
"""


def sleeper(folder: str) -> None:
    with open(os.path.join(folder, str(dist.get_rank())), "w") as file:
        file.write(str(os.getpid()))
    time.sleep(120)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie that nobody has waited for is gone for our purpose.
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_launcher(how, tmp_path):
    script = tmp_path / "launch_sleepers.py"
    script.write_text(SLEEPERS)
    pids = tmp_path / "pids"
    pids.mkdir()
    launcher = subprocess.Popen(
        [sys.executable, str(script), str(pids)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])},
        stderr=subprocess.DEVNULL,
        # As from a terminal: what a shell starts in the background inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while len(list(pids.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    workers = [int(file.read_text()) for file in pids.iterdir()]
    assert len(workers) == 2
    launcher.send_signal(how)
    launcher.wait(timeout=20)
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)
