"""Starting the ranks of a run on one machine: processes, rendezvous, results, and a clean end.

Used by ``dualpipe train`` and by every test that needs more than one rank. Under ``torchrun`` the
processes exist already and nothing here is used but :func:`init_from_env`.
"""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dualpipe_ext.errors import CommTimeoutError, WorkerFailedError

# Workers fork from a server that has imported these once: 8 ranks start in well under a second,
# where "spawn" imports torch again in every one of them. (The last is what autograd imports at the
# first backward with given gradients.)
_PRELOAD = ["torch", "torch.distributed", "torch.fx.experimental.symbolic_shapes"]


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
    results: Any,
    args: tuple[Any, ...],
) -> None:
    # A terminal's Ctrl-C reaches every process: leave at once and silently, the launcher reports.
    # os._exit, because a rank inside a collective would never see a Python exception.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    # Unbuffered, and open until the process ends: what is written when it crashes is read after.
    faulthandler.enable(_crash_file(init_file, rank).open("wb", buffering=0))
    if "OMP_NUM_THREADS" not in os.environ:
        # Ranks share the cores of one machine: more threads than cores make every rank slower.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
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
    results.put(pickle.dumps((rank, fn(*args))))
    # Only after success: on failure the traceback must be on disk before the peers notice.
    dist.destroy_process_group()


def _crash_file(init_file: str, rank: int) -> Path:
    """Where a rank that crashes leaves what its threads were at."""
    return Path(f"{init_file}-crash-{rank}")


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
) -> list[Any]:
    """Run ``fn(*args)`` on ``num_ranks`` processes joined by one process group.

    Args:
        fn: a module-level function. It sees an initialised ``torch.distributed``.
        num_ranks: number of processes; on GPUs rank r takes GPU r modulo their number.
        backend: torch.distributed backend; by default what the machine has.
        timeout_s: longest wait inside one collective, in seconds.
        run_timeout_s: longest time for the whole run, in seconds; ``None`` for no limit (training).
        grace_s: time between asking the other processes to stop and killing them, in seconds.

    Returns:
        The results of all ranks, in rank order. They are pickled; return plain data or CPU tensors.

    Raises:
        WorkerFailedError: a rank raised or died; it names the first one that did. All others are
            stopped before this is raised, as they are on ``KeyboardInterrupt``.
        CommTimeoutError: the run took longer than ``run_timeout_s``.
    """
    multiprocessing.set_forkserver_preload(_PRELOAD)
    deadline = None if run_timeout_s is None else time.monotonic() + run_timeout_s
    with tempfile.TemporaryDirectory(prefix="dualpipe-") as folder:
        # Drained while the workers run: a result larger than the pipe would block its sender.
        results = mp.get_context("forkserver").SimpleQueue()
        init_file = str(Path(folder) / "rendezvous")
        shared = (init_file, backend or default_backend(), timeout_s)
        context = mp.start_processes(
            _worker,
            args=(fn, num_ranks, *shared, results, args),
            nprocs=num_ranks,
            join=False,
            daemon=False,
            start_method="forkserver",
        )
        collected: dict[int, Any] = {}
        try:
            done = False
            while not done:
                done = context.join(timeout=0.05, grace_period=grace_s)
                while not results.empty():
                    rank, value = pickle.loads(results.get())
                    collected[rank] = value
                if not done and deadline is not None and time.monotonic() > deadline:
                    raise CommTimeoutError(
                        f"expected {num_ranks} ranks to finish within {run_timeout_s:g} s, "
                        f"got results from ranks {sorted(collected)} only"
                    )
        except (mp.ProcessRaisedException, mp.ProcessExitedException):
            raise _first_failure(context, init_file) from None
        finally:
            _stop(context.processes, grace_s)
        return [collected[rank] for rank in range(num_ranks)]


def _first_failure(context: Any, init_file: str) -> WorkerFailedError:
    """Tell the rank that failed from the ranks that failed because it did.

    A rank that died without a traceback (killed, crashed) is the cause: it cannot have been waiting
    for another. Otherwise the oldest traceback is.
    """
    raised: list[tuple[float, int, str]] = []
    for rank, (process, file) in enumerate(
        zip(context.processes, context.error_files, strict=True)
    ):
        if os.path.exists(file) and os.path.getsize(file):
            text = pickle.loads(Path(file).read_bytes())
            raised.append((os.path.getmtime(file), rank, text.strip()))
        elif process.exitcode not in (0, None, -signal.SIGTERM):
            code = process.exitcode
            how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
            crash = _crash_file(init_file, rank)
            trace = crash.read_text(errors="replace").strip() if crash.exists() else ""
            return WorkerFailedError(rank, f"its process {how}" + (trace and f"\n{trace}"))
    _, rank, text = min(raised)
    return WorkerFailedError(rank, text)


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
