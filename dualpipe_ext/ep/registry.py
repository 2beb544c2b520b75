"""Which transports exist, which of them a machine can use, and which one ``auto`` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dualpipe_ext import env
from dualpipe_ext.ep import validate
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
    where set, decides what ``auto`` means. Called on all ranks.

    Raises:
        ValueError: on every rank, if a name or a number is wrong on any of them, if they do not ask
            for the same, or if the transport cannot be used on this machine.
    """
    request = _agreed(name, config)
    # Or the last, for what is wrong with it.
    *earlier, chosen = request.names
    for one in earlier:
        kind = _named(one)
        if kind is None or kind.unavailable(config) is None:
            chosen = one
            break
    kind = _named(chosen)
    if kind is None:
        return _best(config)
    reason = kind.unavailable(config)
    if reason is not None:
        asked_by = ENVIRONMENT_VARIABLE if chosen == request.from_environment else "transport"
        raise ValueError(
            f"expected {asked_by} to be one that can be used here, got {chosen!r}: {reason}"
        )
    return kind(config)


@dataclass(frozen=True, slots=True)
class _Request:
    """What one rank asks for; the same on all ranks.

    Compared before anything else is asked: to see whether a transport is available is collective,
    and whether a rank takes part follows from this.
    """

    names: tuple[str, ...]
    """The first that is available counts; with what the environment says for ``auto``."""
    no_sms: bool
    """``num_sms=0``."""
    sizes: tuple[object, ...]
    """What the layout of the communication memory follows from."""
    from_environment: str | None = field(default=None, compare=False)
    """The one of ``names`` that the environment says."""
    mistake: str | None = field(default=None, compare=False)
    """What is wrong with the sizes or the names; then there are no names."""

    def __str__(self) -> str:
        by = f" (by {ENVIRONMENT_VARIABLE})" if self.from_environment else ""
        sms = " with num_sms=0" if self.no_sms else ""
        return " or ".join(map(repr, self.names)) + by + sms


def _agreed(name: str | Sequence[str], config: TransportConfig) -> _Request:
    """What all ranks ask for."""
    own = _request(name, config)
    everyone = config.gather(own)
    if own.mistake is not None:
        raise ValueError(own.mistake)
    for rank, other in enumerate(everyone):
        if other.mistake is not None:
            raise ValueError(f"rank {rank}: {other.mistake}")
    first = everyone[0]
    for rank, other in enumerate(everyone):
        if other.sizes != first.sizes:
            raise ValueError(
                "expected the same hidden, num_experts, top_k, max_tokens, dtype and num_slabs on "
                f"all ranks, got {first.sizes} at rank 0, {other.sizes} at rank {rank}"
            )
        if other != first:
            raise ValueError(
                "expected the same transport on all ranks, and num_sms=0 on all or on none, got "
                f"{first} at rank 0, {other} at rank {rank}"
            )
    return own


def _request(name: str | Sequence[str], config: TransportConfig) -> _Request:
    c = config
    sizes = (c.hidden, c.num_experts, c.top_k, c.max_tokens, str(c.dtype), c.num_slabs)
    try:
        validate.check_config(config)
        names, from_environment = _resolved(name)
    except (ValueError, TypeError) as error:  # for all ranks to hear
        return _Request((), c.num_sms == 0, sizes, mistake=str(error))
    return _Request(names, c.num_sms == 0, sizes, from_environment)


def _resolved(name: str | Sequence[str]) -> tuple[tuple[str, ...], str | None]:
    """The names that ``name`` stands for, and the one that the environment says, if it does."""
    names = (name,) if isinstance(name, str) else name
    if not isinstance(names, (list, tuple)) or not names:
        raise ValueError(f"expected transport to be a name or a list of names, got {name!r}")
    for one in names:
        _named(one)
    if "auto" not in names:
        return tuple(names), None
    said = env.read(ENVIRONMENT_VARIABLE)
    if _named(said, ENVIRONMENT_VARIABLE) is None:
        return tuple(names), None
    return tuple(said if one == "auto" else one for one in names), said


def _named(name: str, asked_by: str = "transport") -> type[Transport] | None:
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
