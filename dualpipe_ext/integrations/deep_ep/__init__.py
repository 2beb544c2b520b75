"""The names and the behaviour of deepseek-ai/DeepEP's ``Buffer``: change the import, keep the code.

>>> from dualpipe_ext.integrations import deep_ep
>>> deep_ep.install()  # for code that you do not change: its ``import deep_ep`` finds this

What belongs here: ``Buffer``, ``Config``, ``EventOverlap`` and ``EventHandle`` as code for DeepEP 1
uses them: for training and prefill ("normal" kernels) in ``buffer.py``, for decoding ("low-latency"
kernels) in ``low_latency.py``. As there, nothing is differentiable: callers make the backward of a
dispatch with ``combine`` and the reverse. Unlike there, CPUs (gloo) work, sums have the same bits
on every run, and a rank that stays away raises ``CommTimeoutError``.

What differs besides: hints of buffer sizes are 0, since communication memory is made at the first
dispatch, and ``Config``'s chunks are not used. ``set_num_sms`` is for buffers to come. With
``async_finish`` a call follows the current stream, not ``previous_event`` alone, and a routing is
found on the current stream, where the host waits for it: what is to overlap a new dispatch is
launched after it. A handle is no tuple, and of the ``Buffer`` that made it. A dispatch needs expert
ids or a handle, a combine takes ``bias`` or ``topk_weights``, FP8 scales are float32, one row's
beside each other.

The interface was read from https://github.com/deepseek-ai/DeepEP (version 1.2); the implementation
is ``dualpipe_ext.ep``.
"""

from __future__ import annotations

import sys

from dualpipe_ext.integrations.deep_ep import buffer, utils
from dualpipe_ext.integrations.deep_ep.buffer import Buffer, Config, topk_idx_t
from dualpipe_ext.integrations.deep_ep.utils import EventHandle, EventOverlap

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "install", "topk_idx_t", "uninstall"]

_MODULES = {"deep_ep": sys.modules[__name__], "deep_ep.buffer": buffer, "deep_ep.utils": utils}


def install() -> None:
    """Let ``import deep_ep`` and its ``buffer`` and ``utils`` find these, in this process.

    Before the code that imports them. Frameworks that look for DeepEP, Megatron-Core among them,
    then use these kernels (:mod:`dualpipe_ext.integrations.megatron` saves Megatron a permutation
    besides).

    Raises:
        RuntimeError: another ``deep_ep`` has been imported already.
    """
    this = _MODULES["deep_ep"]
    found = sys.modules.get("deep_ep", this)
    if found is not this:
        raise RuntimeError(
            "expected install() before anything imports deep_ep, got one from "
            f"{getattr(found, '__file__', 'elsewhere')}"
        )
    sys.modules.update(_MODULES)


def uninstall() -> None:
    """Undo :func:`install`, for imports to come."""
    if sys.modules.get("deep_ep") is _MODULES["deep_ep"]:
        for name in _MODULES:
            del sys.modules[name]
