"""Memory that all ranks can write: one allocation per rank, and everybody's address of it.

Providers: torch symmetric memory for a process per GPU, plain allocations for virtual ranks of one
process and for a rank alone. Kernels cannot tell them apart.

Shapes: R ranks.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext import core
from dualpipe_ext.agreement import meet_through_store
from dualpipe_ext.ep.transport import Ranks
from dualpipe_ext.errors import CommTimeoutError, DualPipeError


@dataclass(frozen=True, slots=True, eq=False)
class PeerMemory:
    """One rank's communication memory and its view of the others'."""

    own: Tensor
    """uint8 [bytes], zero at first."""
    addresses: list[int]
    """[R], where every rank's memory is in this process."""
    everyone: list[Tensor]
    """[R], the same as tensors: a copy into one of them is a copy between GPUs."""
    keep: object
    """What must live as long as the addresses are used."""


def allocate(num_bytes: int, config: Ranks) -> PeerMemory:
    """Allocate on the current device, on all ranks; zeroed everywhere before any rank returns.

    Args:
        num_bytes: equal on all ranks.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    if config.group is None or config.num_ranks == 1:
        own = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        torch.cuda.synchronize()
        if config.local is None:
            return PeerMemory(own, [own.data_ptr()], [own], None)
        everyone = config.local.gather(own)
        return PeerMemory(own, [memory.data_ptr() for memory in everyone], everyone, None)
    # Only here: it is a private module of torch.
    from torch.distributed import _symmetric_memory as symmetric_memory

    own = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
    handle = symmetric_memory.rendezvous(own, config.group)
    own.zero_()
    torch.cuda.synchronize()
    meet(config)
    everyone = [
        own if rank == config.rank else handle.get_buffer(rank, (num_bytes,), torch.uint8)
        for rank in range(config.num_ranks)
    ]
    return PeerMemory(own, list(handle.buffer_ptrs), everyone, handle)


def meet(config: Ranks) -> None:
    """Wait on the host until every rank is here.

    A meeting has one end for all ranks: where one has stopped waiting it has failed on every rank,
    also on those that come later. So all have held as many, and can try again.

    Raises:
        CommTimeoutError: not all came within the time-out of one of them.
        DualPipeError: the store is lost, with the process that holds it.
    """
    if config.local is not None:
        config.local.gather(None)
        return
    if config.num_ranks == 1:
        return
    what = "meeting of the ranks"
    try:
        failure = meet_through_store(config.group, timeout_s=config.timeout_s, what=what)
    except dist.DistNetworkError as error:
        raise DualPipeError(
            f"rank {config.rank}, {what}: lost the store through which they meet: {error}"
        ) from error
    if failure is not None:
        raise CommTimeoutError(failure)


@dataclass(frozen=True, slots=True)
class _Site:
    """Where a rank is, and why it could not use kernels there."""

    host: str
    device: int
    """As CUDA numbers it in that process; -1 without a GPU."""
    bus_id: str
    reason: str | None


def unavailable(config: Ranks) -> str | None:
    """Why the ranks cannot reach each other's memory, in one line; None if they can.

    All ranks ask, and come to the same answer: each learns the others' findings first.
    """
    site = _own_site()
    if config.local is not None:
        limit = core.module().MAX_LOCAL_RANKS if core.available() else config.num_ranks
        if config.num_ranks > limit:
            return f"at most {limit} virtual ranks"
        return site.reason
    if config.group is None or config.num_ranks == 1:
        return site.reason
    sites = config.gather(site)
    reasons = [
        f"rank {rank}: {other.reason}" for rank, other in enumerate(sites) if other.reason
    ] or _links(sites, config.rank)
    return next((reason for found in config.gather(reasons) for reason in found), None)


def _own_site() -> _Site:
    host = socket.gethostname()
    if not core.available():
        return _Site(host, -1, "", f"no compiled CUDA core ({core.why_unavailable()})")
    if not torch.cuda.is_available():
        return _Site(host, -1, "", "no GPU that torch can use")
    index = torch.cuda.current_device()
    device = core.module().devices()[index]
    if device.capability != (9, 0):
        return _Site(host, index, device.pci_bus_id, f"{device.name} is no Hopper GPU")
    return _Site(host, index, device.pci_bus_id, None)


def _links(sites: list[_Site], rank: int) -> list[str]:
    """What keeps one rank from its peers' memory."""
    own = sites[rank]
    for peer, other in enumerate(sites):
        if peer == rank:
            continue
        if other.host != own.host:
            return [f"ranks {rank} and {peer} are on different hosts"]
        if other.bus_id == own.bus_id:
            return [f"ranks {rank} and {peer} share a GPU (use LocalRanks for that)"]
        by_bus = {device.pci_bus_id: device.index for device in core.module().devices()}
        if other.bus_id not in by_bus:
            return [f"rank {rank} does not see the GPU of rank {peer}"]
        link = core.module().peer_link(own.device, by_bus[other.bus_id])
        if not link.access or not link.native_atomics:
            return [f"no NVLink between ranks {rank} and {peer}"]
    return []
