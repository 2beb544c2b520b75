"""Which transports exist, which of them a machine can use, and which one ``auto`` takes."""

from __future__ import annotations

from collections.abc import Sequence

from dualpipe_ext import env
from dualpipe_ext.ep.collective import CollectiveTransport
from dualpipe_ext.ep.copy_engine import CopyEngineTransport
from dualpipe_ext.ep.low_latency import LowLatencyTransport
from dualpipe_ext.ep.nvlink import NVLinkTransport
from dualpipe_ext.ep.transport import Transport, TransportConfig

# Best first: "auto" takes the first that is available. So never the one for few tokens, which is
# there only where one before it is.
_TRANSPORTS: tuple[type[Transport], ...] = (
    NVLinkTransport,
    CopyEngineTransport,
    LowLatencyTransport,
    CollectiveTransport,
)

ENVIRONMENT_VARIABLE = "DUALPIPE_TRANSPORT"


def transport_names() -> tuple[str, ...]:
    """What ``transport=`` can be, on some machine or other."""
    return ("auto", *(kind.name for kind in _TRANSPORTS))


def transport_status(config: TransportConfig) -> dict[str, str | None]:
    """For every transport, best first: None if it can be used here, else the reason why not."""
    return {kind.name: kind.unavailable(config) for kind in _TRANSPORTS}


def create_transport(name: str | Sequence[str], config: TransportConfig) -> Transport:
    """Make the transport of that name; ``auto`` is the best available one.

    Of several names the first that is available counts. ``DUALPIPE_TRANSPORT`` in the environment,
    where set, decides what ``auto`` means.

    Raises:
        ValueError: a name is unknown here, or the transport cannot be used on this machine.
    """
    asked_by = "transport"
    if not isinstance(name, str):
        name = _first_available(name, config)
    if name == "auto":
        name = env.read(ENVIRONMENT_VARIABLE)
        asked_by = ENVIRONMENT_VARIABLE
    kind = _named(name, asked_by)
    if kind is None:
        return _best(config)
    reason = kind.unavailable(config)
    if reason is not None:
        raise ValueError(
            f"expected {asked_by} to be one that can be used here, got {name!r}: {reason}"
        )
    return kind(config)


def _first_available(names: Sequence[str], config: TransportConfig) -> str:
    """Or the last, for what is wrong with it."""
    if not isinstance(names, (list, tuple)) or not names:
        raise ValueError(f"expected transport to be a name or a list of names, got {names!r}")
    kinds = [_named(name, "transport") for name in names]
    for name, kind in zip(names, kinds, strict=True):
        if kind is None or kind.unavailable(config) is None:
            return name
    return names[-1]


def _named(name: str, asked_by: str) -> type[Transport] | None:
    """None for ``auto``."""
    if name == "auto":
        return None
    for kind in _TRANSPORTS:
        if kind.name == name:
            return kind
    names = ", ".join(transport_names())
    raise ValueError(f"expected {asked_by} to be one of {names}, got {name!r}")


def _best(config: TransportConfig) -> Transport:
    status = transport_status(config)
    for kind in _TRANSPORTS:
        if status[kind.name] is None:
            return kind(config)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in status.items())
    raise ValueError(f"expected a machine that some transport can use, got none ({reasons})")
