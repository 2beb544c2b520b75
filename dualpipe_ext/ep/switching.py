"""From one number of communication SMs to another, and with it from one transport to another.

What belongs here: which transport a number means, and whether all ranks can make it. 0 SMs are the
copy engines, any other number is that of the kernels over NVLink: those for few tokens, if the
Buffer was made with them. Transports share no memory, so a handle stays with the one that made it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dualpipe_ext.ep.copy_engine import CopyEngineTransport
from dualpipe_ext.ep.nvlink import NVLinkTransport
from dualpipe_ext.ep.peer import PeerTransport
from dualpipe_ext.ep.transport import Transport, TransportConfig

# Of a GPU's memory, left free beside a second transport: what a step needs may still grow.
_SPARE = 0.05


def kernels_of(transport: Transport) -> type[NVLinkTransport]:
    """The kernels that a Buffer made with this transport has whenever it takes SMs."""
    return type(transport) if isinstance(transport, NVLinkTransport) else NVLinkTransport


def transport_for(num_sms: int, kernels: type[NVLinkTransport]) -> type[PeerTransport]:
    """The transport that takes so many SMs."""
    return kernels if num_sms else CopyEngineTransport


def config_for(num_sms: int, config: TransportConfig) -> TransportConfig:
    """What that transport is made with."""
    # The copy engines' own kernels, which pack and unpack, have a number of their own.
    return replace(config, num_sms=num_sms or None)


def obstacle(kind: type[PeerTransport], num_sms: int, config: TransportConfig) -> str | None:
    """Why the ranks cannot make that transport now, in one line; None if they can.

    Called on all ranks, which get the same answer.
    """
    config = config_for(num_sms, config)
    reason = kind.unavailable(config)
    if reason is not None:
        return reason
    return _first(_short_of_memory(kind.memory_needed(config)), config)


def _short_of_memory(num_bytes: int) -> str | None:
    free, total = torch.cuda.mem_get_info()
    if free < num_bytes + _SPARE * total:
        torch.cuda.empty_cache()  # what torch keeps for itself would serve as well
        free, total = torch.cuda.mem_get_info()
    if free < num_bytes + _SPARE * total:
        return f"{num_bytes >> 20} MiB for it are too much beside {free >> 20} MiB that are free"
    return None


def _first(reason: str | None, config: TransportConfig) -> str | None:
    """The reason of the first rank that has one, on every rank."""
    everyone = config.gather(reason)
    return next((f"rank {rank}: {one}" for rank, one in enumerate(everyone) if one), None)
