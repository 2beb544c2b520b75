"""Time-outs: what one may be, and telling one from other failures of torch.distributed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dualpipe_ext.errors import CommTimeoutError

if TYPE_CHECKING:
    import torch

MAX_TIMEOUT_S = 1e9  # about 30 years; process groups overflow not far beyond


def check_timeout(timeout_s: object) -> None:
    """Refuse with ``ValueError`` what is no time-out in seconds that a process group can count."""
    if not isinstance(timeout_s, (int, float)) or not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise ValueError(
            f"expected timeout_s above 0 and at most {MAX_TIMEOUT_S:g} seconds, got {timeout_s!r}"
        )


def is_timeout(error: BaseException) -> bool:
    """Whether a failed wait ran out of time, as opposed to a lost connection.

    By its text: gloo and NCCL raise a plain ``RuntimeError`` for both.
    """
    text = str(error).lower()
    return "timed out" in text or "timeout" in text


def wait_for_event(event: torch.cuda.Event, timeout_s: float, late: str) -> None:
    """Wait on the host for a point of a stream, with a bound and without holding up other threads.

    Raises:
        CommTimeoutError: it did not come; ``late`` is the message.
    """
    deadline = time.monotonic() + timeout_s
    while not event.query():
        if time.monotonic() > deadline:
            raise CommTimeoutError(late)
        time.sleep(2e-4)
