"""Starting the ranks of a run on one machine: processes, rendezvous, results, and a clean end.

Used by ``dualpipe train`` and by every test that needs more than one rank. Under ``torchrun`` the
processes exist already and nothing here is used but :func:`init_from_env`.
"""

from __future__ import annotations

import datetime
import faulthandler
import math
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dualpipe_ext.errors import CommTimeoutError, WorkerFailedError

# Workers fork from a server that has imported these once: 8 ranks start in well under a second,
# where "spawn" imports torch again in every one of them. (The last is what autograd imports at the
# first backward with given gradients.)
_PRELOAD = ["torch", "torch.distributed", "torch.fx.experimental.symbolic_shapes"]


_SEEN_LATE_S = 0.5


def preload(*modules: str) -> None:
    """Have the server import these too; before the first run of this process.

    Ranks that share the cores of a machine would import them all at the same time. Only for modules
    that touch no GPU when they are imported: workers of a server that has could not use any.
    """
    _PRELOAD.extend(name for name in modules if name not in _PRELOAD)


def default_backend() -> str:
    """``nccl`` (with gloo for CPU tensors) where there is a GPU, else ``gloo``."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def init_from_env(*, backend: str | None = None, timeout_s: float = 600.0) -> None:
    """Join the process group that ``torchrun`` describes in the environment."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group(
        backend or default_backend(), timeout=datetime.timedelta(seconds=timeout_s)
    )


def _worker(
    rank: int,
    fn: Callable[..., Any],
    num_ranks: int,
    init_file: str,
    backend: str,
    timeout_s: float,
    environment: dict[str, str],
    args: tuple[Any, ...],
) -> None:
    # While there is one thread, and never after: before glibc 2.41 a getenv may crash beside a
    # setenv of another thread, and the NCCL heartbeat that init_process_group starts calls it
    # (pytorch issue 175724).
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    # A terminal's Ctrl-C reaches every process: leave at once and silently, the launcher reports.
    # os._exit, because a rank inside a collective would never see a Python exception.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    # Unbuffered, and open until the process ends: what is written when it crashes is read after.
    faulthandler.enable(_crash_file(init_file, rank).open("wb", buffering=0))
    if "OMP_NUM_THREADS" not in os.environ:
        # Ranks share the cores of one machine: more threads than cores make every rank slower.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        backend,
        init_method=f"file://{init_file}",
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    # Bytes, not tensors: torch would pass tensors as file descriptors of a process about to end.
    # Renamed, so that it is whole or not there: a rank may die at any time.
    result = _result_file(init_file, rank)
    unfinished = result.with_suffix(".unfinished")
    unfinished.write_bytes(pickle.dumps(fn(*args)))
    unfinished.rename(result)
    # Only after success: on failure the traceback must be on disk before the peers notice.
    dist.destroy_process_group()


def _crash_file(init_file: str, rank: int) -> Path:
    """Where a rank that crashes leaves what its threads were at."""
    return Path(f"{init_file}-crash-{rank}")


def _result_file(init_file: str, rank: int) -> Path:
    """Where a rank leaves its result."""
    return Path(f"{init_file}-result-{rank}")


def _leave_with_parent() -> None:
    """End this process when the launcher is gone, however it went."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run_ranks(
    fn: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    backend: str | None = None,
    timeout_s: float = 300.0,
    run_timeout_s: float | None = None,
    grace_s: float = 5.0,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Run ``fn(*args)`` on ``num_ranks`` processes joined by one process group.

    Args:
        fn: a module-level function. It sees an initialised ``torch.distributed``.
        num_ranks: number of processes; on GPUs rank r takes GPU r modulo their number.
        backend: torch.distributed backend; by default what the machine has.
        timeout_s: longest wait inside one collective, in seconds.
        run_timeout_s: longest time for the whole run, in seconds, from when all processes have
            started; ``None`` for no limit (training).
        grace_s: how long the other processes have to end by themselves once one has failed, and
            again between asking them to stop and killing them, in seconds.
        environment: variables that every rank has besides, set before it has a second thread. A
            rank must set none later: threads of NCCL read them, and that may crash it. What torch
            reads when it is imported is read before.

    Returns:
        The results of all ranks, in rank order. They are pickled; return plain data or CPU tensors.

    Raises:
        WorkerFailedError: a rank raised or died; it names the first one that did. All others are
            stopped before this is raised, as they are on ``KeyboardInterrupt``.
        CommTimeoutError: the run took longer than ``run_timeout_s``.
    """
    multiprocessing.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory(prefix="dualpipe-") as folder:
        init_file = str(Path(folder) / "rendezvous")
        shared = (init_file, backend or default_backend(), timeout_s, dict(environment or {}))
        context = mp.start_processes(
            _worker,
            args=(fn, num_ranks, *shared, args),
            nprocs=num_ranks,
            join=False,
            daemon=False,
            start_method="forkserver",
        )
        deadline = math.inf if run_timeout_s is None else time.monotonic() + run_timeout_s
        try:
            ended = _watch(context.processes, init_file, deadline, grace_s)
        finally:
            _stop(context.processes, grace_s)
        if _failed(ended, init_file):
            raise _first_failure(ended, context.error_files, init_file)
        results = [_result_file(init_file, rank) for rank in range(num_ranks)]
        if len(ended) < num_ranks:
            raise CommTimeoutError(
                f"expected {num_ranks} ranks to finish within {run_timeout_s:g} s, "
                f"got results from ranks {[r for r, f in enumerate(results) if f.exists()]} only"
            )
        return [pickle.loads(file.read_bytes()) for file in results]


class _End(NamedTuple):
    """How a rank ended, and when that was seen, in seconds as files have their times."""

    code: int
    time: float


def _watch(
    processes: Sequence[Any], init_file: str, deadline: float, grace_s: float
) -> dict[int, _End]:
    """Wait for the ranks; returns the ends of those that ended, in that order.

    Not torch's ``join``: it stops the other ranks itself before it tells that one failed, and a
    rank killed by the launcher then looks like one that was killed by somebody else.

    Args:
        deadline: when to leave, by the monotonic clock; ``grace_s`` after a rank failed.
    """
    ended: dict[int, _End] = {}
    failed = False
    while len(ended) < len(processes) and (left := deadline - time.monotonic()) > 0:
        running = [p.sentinel for rank, p in enumerate(processes) if rank not in ended]
        connection.wait(running, min(left, 60.0))  # which knows no infinity
        for rank, process in enumerate(processes):
            if rank not in ended and process.exitcode is not None:
                ended[rank] = _End(process.exitcode, time.time())
        if not failed and _failed(ended, init_file):
            # The others may say more: whoever failed first is told from the tracebacks of all.
            failed, deadline = True, time.monotonic() + grace_s
    return ended


def _failed(ended: dict[int, _End], init_file: str) -> list[int]:
    """Those that ended otherwise than with a result and well, in the order in which they did."""
    return [r for r, end in ended.items() if end.code or not _result_file(init_file, r).exists()]


def _first_failure(
    ended: dict[int, _End], error_files: Sequence[str], init_file: str
) -> WorkerFailedError:
    """Tell the rank that failed from the ranks that failed because it did.

    A rank that died without a traceback (killed, crashed) is the cause, unless it may have ended
    itself because another had raised (as NCCL's watchdog does). Otherwise the oldest traceback is.

    Args:
        ended: of the ranks that did by themselves: how one went that was stopped tells nothing.
        error_files: where torch has put tracebacks, by rank.
    """
    raised = [
        (os.path.getmtime(file), rank)
        for rank, file in enumerate(error_files)
        if os.path.exists(file) and os.path.getsize(file)
    ]
    died = [r for r in _failed(ended, init_file) if r not in {rank for _, rank in raised}]
    last_words = ""
    if died:
        # Who is asked to stop because another one is gone may end sooner than that one.
        cause = next((r for r in died if ended[r].code != -signal.SIGTERM), died[0])
        last_words = _last_words(cause, ended[cause].code, init_file)
        ended_itself = ended[cause].code > 0 or ended[cause].code == -signal.SIGABRT
        # That it has ended is seen a little later than others fail because of it.
        before = ended[cause].time - _SEEN_LATE_S
        if not (ended_itself and raised and min(raised)[0] < before):
            return WorkerFailedError(cause, last_words)
        last_words = f"\nThen rank {cause} failed: {last_words}"
    _, rank = min(raised)
    text = pickle.loads(Path(error_files[rank]).read_bytes()).strip()
    return WorkerFailedError(rank, text + last_words)


def _last_words(rank: int, code: int, init_file: str) -> str:
    """How a rank ended that left no traceback, and what it left instead."""
    how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
    if _result_file(init_file, rank).exists():
        how += " after it had given its result"
    elif code == 0:
        how += " before it had given a result"
    crash = _crash_file(init_file, rank)
    trace = crash.read_text(errors="replace").strip() if crash.exists() else ""
    return f"its process {how}" + (trace and f"\n{trace}")


def _stop(processes: list[Any], grace_s: float) -> None:
    """Leave no process behind: ask first, then kill."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    deadline = time.monotonic() + grace_s
    for process in processes:
        process.join(timeout=max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
