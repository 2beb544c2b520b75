"""The compiled CUDA core: loading it, saying why it is missing, raising what its kernels report.

Everything in the package reaches ``dualpipe_ext._C`` through this file. The core has no torch in
it: addresses and streams cross as integers. It imports on machines without a driver, where
``devices()`` is empty.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from types import ModuleType

from dualpipe_ext.errors import CommTimeoutError, DualPipeError

_TIMEOUT, _MISMATCH = 1, 2  # ErrorCode of csrc/comm/error_record.h
# RowType of csrc/ep/combine.h
_ROW_TYPES = ("bfloat16", "float16", "float32", "float64")


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("dualpipe_ext._C"), ""
    except ModuleNotFoundError:
        return None, "it was not built when the package was installed"
    except ImportError as error:  # built for another Python or against another C++ library
        return None, f"it does not load: {error}"


def available() -> bool:
    """Whether the compiled core can be used in this process. Says nothing about GPUs."""
    return _load()[0] is not None


def why_unavailable() -> str:
    """One clause that says why :func:`available` is false; empty if it is true."""
    return _load()[1]


def module() -> ModuleType:
    """The compiled core.

    Raises:
        DualPipeError: it was not built or does not load; the message says what to do.
    """
    loaded, reason = _load()
    if loaded is None:
        raise DualPipeError(
            f"expected the compiled CUDA core, but {reason}; "
            "reinstall with a CUDA toolkit and DUALPIPE_CUDA=1 (see `dualpipe doctor`)"
        )
    return loaded


def raise_on_failure(record: Mapping[str, int | str] | None, *, timeout_s: float) -> None:
    """Raise what a kernel recorded, if it recorded anything.

    Args:
        record: what ``ErrorChannel.read`` returned: ``None``, or the fields of ``ErrorRecord`` in
            csrc/comm/error_record.h.
        timeout_s: the bound that the kernel was given, in seconds; only for the message.

    Raises:
        CommTimeoutError: a wait ended without its peer.
        ValueError: a peer sends other messages than this rank takes.
        DualPipeError: the record carries a code that this version does not know.
    """
    if record is None:
        return
    if record["code"] == _MISMATCH:
        raise ValueError(
            "expected the same call, dtype, fp8 and weights on all ranks, got "
            f"{_message(record['seen'])} at rank {record['peer']}, {_message(record['expected'])} "
            f"at rank {record['rank']} (call {record['epoch']}); reset() makes the buffer usable"
        )
    if record["code"] != _TIMEOUT:
        raise DualPipeError(f"expected a known error code from the CUDA core, got {record}")
    raise CommTimeoutError(
        "rank {rank} waited {timeout_s:g} s for rank {peer} in phase {phase}, chunk {chunk}: "
        "expected its flag to reach {expected}, saw {seen} (epoch {epoch})".format(
            timeout_s=timeout_s, **record
        )
    )


def _message(bits: int) -> str:
    """What ``hello`` in csrc/ep/hello.cuh tells of."""
    call = "a dispatch"
    if bits >> 19 & 1:
        call = f"a combine in {_ROW_TYPES[bits >> 20 & 3]}"
    numbers = ", scales" if bits >> 16 & 1 else ""
    if weight_words := bits >> 17 & 3:
        numbers += f", numbers of {4 * weight_words} bytes"
    return f"{call} with rows of {16 * (bits & 0xFFFF)} bytes{numbers}"
