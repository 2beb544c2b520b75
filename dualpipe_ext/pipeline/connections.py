"""A pipeline's connections: which channels a rank has, and by which transport.

What belongs here: choosing the transport together with the other ranks, opening the channels that
stages and stage copies need, and closing them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from dualpipe_ext.agreement import Meetings
from dualpipe_ext.pipeline import copy_engine, messages, mirror
from dualpipe_ext.pipeline.copy_channel import open_all
from dualpipe_ext.pipeline.exchange import AnyChannel
from dualpipe_ext.pipeline.mirror import MirrorLinks
from dualpipe_ext.pipeline.p2p import Channel, close_all
from dualpipe_ext.pipeline.plan import Plan
from dualpipe_ext.timeouts import check_timeout

TRANSPORTS = ("auto", "copy_engine", "collective")
DEFAULT_RING_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """How to connect; equal on all ranks. See ``Pipeline`` for what they mean."""

    transport: str
    ring_bytes: int
    timeout_s: float

    def __post_init__(self) -> None:
        check_timeout(self.timeout_s)
        if self.transport not in TRANSPORTS:
            raise ValueError(
                f"expected transport to be one of {', '.join(TRANSPORTS)}, got {self.transport!r}"
            )
        if not isinstance(self.ring_bytes, int) or self.ring_bytes < 1:
            raise ValueError(f"expected ring_bytes as a positive integer, got {self.ring_bytes!r}")


@dataclass(slots=True)
class Connections:
    """One rank's channels.

    Attributes:
        transport: of the stages' messages, "copy_engine" or "collective".
        outgoing: to the ranks that take what its stages produce.
        incoming: from the ranks that produce what its stages take.
        mirror: those to and from the rank with the copies of its stages, if gradients are summed:
            behind the stages' own messages, where they are neighbours.
    """

    transport: str
    outgoing: dict[int, AnyChannel] = field(default_factory=dict)
    incoming: dict[int, AnyChannel] = field(default_factory=dict)
    mirror: MirrorLinks | None = None

    def close(self, *, abort: bool) -> None:
        """Give all channels up, within a few seconds; with ``abort`` whatever is under way."""
        close_all([*self.outgoing.values(), *self.incoming.values()], abort=abort)


def connect(
    layout: Plan,
    group: dist.ProcessGroup,
    pipeline_ranks: Sequence[int],
    *,
    token: str,
    device: torch.device,
    options: ConnectionOptions,
    sync: bool,
) -> Connections:
    """Open this rank's channels; collective over ``group``.

    Args:
        layout: a plan with the stages of all plans to come.
        group: the pipeline's process group.
        pipeline_ranks: [R] the pipeline rank of every group rank.
        token: the pipeline's own name, equal on all ranks.
        device: where tensors are sent and received.
        options: see there.
        sync: gradients of stage copies will be summed.

    Raises:
        ValueError: the transport cannot be used here; on all ranks.
        CommTimeoutError: another rank did not take part in time.
    """
    links = messages.links(layout)
    if sync:
        links = sorted({*links, *mirror.links(layout)})
    found = Connections(_transport(options, group, device) if links else "collective")
    rank = pipeline_ranks[group.rank()]
    try:
        if found.transport == "copy_engine":
            channels = copy_engine.open_channels(
                group,
                pipeline_ranks,
                links,
                device=device,
                ring_bytes=options.ring_bytes,
                timeout_s=options.timeout_s,
            )
            _add(found, channels)
            open_all(channels)
        else:
            # All ranks walk the same sorted list: see Channel for why.
            for source, destination in links:
                if rank in (source, destination):
                    channel = Channel(
                        f"dualpipe/{token}/{source}-{destination}",
                        source,
                        destination,
                        rank=rank,
                        device=device,
                        timeout_s=options.timeout_s,
                    )
                    _add(found, [channel])
        if sync:
            other = mirror.mirror_rank(layout, rank)
            meetings = None
            if found.transport == "copy_engine":
                pair = sorted((group.rank(), pipeline_ranks.index(other)))
                what = "sum of gradients with its stage copies"
                meetings = Meetings(f"copies {token}", group, options.timeout_s, what, pair)
            found.mirror = MirrorLinks(found.outgoing[other], found.incoming[other], meetings)
    except BaseException:
        found.close(abort=True)
        raise
    return found


def _add(found: Connections, channels: Iterable[AnyChannel]) -> None:
    for channel in channels:
        (found.outgoing if channel.sends else found.incoming)[channel.peer] = channel


def _transport(options: ConnectionOptions, group: dist.ProcessGroup, device: torch.device) -> str:
    """What ``auto`` means here; the same on all ranks."""
    if options.transport == "collective":
        return "collective"
    reason = copy_engine.unavailable(group, device, options.timeout_s)
    if reason is None:
        return "copy_engine"
    if options.transport == "copy_engine":
        raise ValueError(
            f"expected transport to be one that can be used here, got 'copy_engine': {reason}"
        )
    return "collective"
