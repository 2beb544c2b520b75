"""Checkpoints: one folder per saved step, one file per rank, complete or absent.

A step is written to a temporary folder that every rank fills; rank 0 renames it once all have
finished. A crash in between leaves the previous checkpoint and a temporary folder that the next
save of the same step replaces.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dualpipe_ext.errors import CheckpointError

_NAME = re.compile(r"step-(\d{8})")
_KEEP = 2  # the newest, and the one before it


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints below ``folder``, in the order they were saved.

    That is not always the order of their steps: a run resumed from an earlier one saves anew.
    """
    if not folder.is_dir():
        return []
    complete = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(complete, key=lambda path: (path.stat().st_mtime_ns, path.name))


def save(folder: Path, step: int, layout: dict[str, Any], state: dict[str, Any]) -> Path:
    """Write this rank's ``state`` after ``step`` steps; called by every rank together.

    Args:
        folder: where the run keeps its checkpoints.
        step: optimizer steps done.
        layout: plain data that must be equal when the checkpoint is resumed.
        state: tensors and plain data of this rank.

    Returns:
        The checkpoint's folder.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "layout.json").write_text(json.dumps({"step": step, **layout}, indent=1))
    _barrier()
    torch.save(state, _file_of(partial, rank))
    _barrier()
    if rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in checkpoints(folder)[:-_KEEP]:
            shutil.rmtree(old, ignore_errors=True)
    _barrier()
    return final


def find(path: Path) -> Path:
    """The checkpoint that ``path`` names: a checkpoint, or the newest of a run's folder."""
    if (path / "layout.json").is_file():
        return path
    found = checkpoints(path) or checkpoints(path / "checkpoints")
    if not found:
        raise CheckpointError(f"expected a checkpoint or a run's folder, got {path}")
    return found[-1]


def check_layout(path: Path, layout: dict[str, Any]) -> int:
    """Compare the checkpoint's layout with the run's; return the steps it has done.

    Raises:
        CheckpointError: it cannot be read, or a setting differs; the message names the settings.
    """
    try:
        saved = json.loads((path / "layout.json").read_text())
        step = int(saved.pop("step"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"expected a readable checkpoint in {path}, got: {error}") from None
    # Through JSON, so that a tuple equals the list it was saved as.
    wanted = json.loads(json.dumps(layout))
    differing = [
        f"{key} = {saved.get(key)!r} (this run: {wanted.get(key)!r})"
        for key in sorted({*saved, *wanted})
        if saved.get(key) != wanted.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"expected the settings of the checkpoint {path}: " + ", ".join(differing)
        )
    return step


def check_file(path: Path, rank: int) -> None:
    """Read the file of ``rank`` through once, and compare what it holds with its checksums.

    :func:`load` compares no checksums: a flipped bit would go on into the training.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    file = _file_of(path, rank)
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise _unreadable(file, error) from None
    if damaged is not None:
        raise CheckpointError(f"expected a readable checkpoint in {file}, got a damaged {damaged}")


def load(path: Path) -> dict[str, Any]:
    """This rank's state from the checkpoint ``path``.

    Raises:
        CheckpointError: the rank's file is missing or damaged.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    file = _file_of(path, rank)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise _unreadable(file, error) from None


def _file_of(path: Path, rank: int) -> Path:
    return path / f"rank-{rank:05d}.pt"


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(f"expected a readable checkpoint in {file}, got: {reason}")
