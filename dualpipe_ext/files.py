"""Writing a file whole or not at all.

What belongs here: what pictures, traces, tables and summaries share, without loading a library.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

PICTURES = (".svg", ".png", ".pdf")


def check_picture(path: str | os.PathLike[str]) -> str:
    """The suffix of ``path`` if it is a format that ``draw`` writes, else ``ValueError``."""
    suffix = Path(path).suffix.lower()
    if suffix not in PICTURES:
        raise ValueError(f"expected a picture ending in {', '.join(PICTURES)}, got {path}")
    return suffix


def check_target(path: str | os.PathLike[str]) -> Path:
    """``path``, if a file of that name can be there, else ``ValueError``."""
    target = Path(path)
    if not target.parent.is_dir():
        raise ValueError(f"expected a file in an existing folder, got {target}")
    if target.is_dir():
        raise ValueError(f"expected a file name, got the folder {target}")
    if target.exists() and not target.is_file():
        # A rename would put a plain file in the place of the device or pipe.
        raise ValueError(f"expected a regular file or a new one, got {target}")
    return target


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a file to be written in place of ``path``, which changes only if the block succeeds.

    Raises:
        ValueError: ``path`` is a folder or a device, or is in a folder that does not exist.
    """
    # What a symbolic link points to is replaced, not the link.
    target = check_target(path).resolve()
    # In the same folder, because a rename is atomic only within a file system.
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        # mkstemp makes files for the owner only; give the one that stays the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
