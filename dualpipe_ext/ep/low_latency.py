"""The transport for few tokens over NVLink: one kernel a call, in which nothing waits for a flag.

For decoding, where a rank has some hundred tokens at most and a call takes as long as its waits.
The protocol is in csrc/ep/low_latency_dispatch.cu. Results have the bits of the other transports,
but for a NaN whose bits are all set, which comes out as NaN of the other sign.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from dualpipe_ext.ep import memory
from dualpipe_ext.ep.nvlink import NVLinkTransport
from dualpipe_ext.ep.peer import ROW_DTYPES
from dualpipe_ext.ep.transport import Capabilities, TransportConfig

_EMPTY = 0xFF  # every byte of an inbox that nothing has come to


class LowLatencyTransport(NVLinkTransport):
    """See the module."""

    name = "low_latency"
    capabilities: ClassVar[Capabilities] = Capabilities(
        dtypes=ROW_DTYPES, syncs_host=False, zero_copy=False
    )
    # Weights go alone.
    least_row_bytes = 0
    # The two inboxes.
    transit_slabs = 2
    # Nothing else runs while a decoder waits. With half as many a combine takes a tenth longer,
    # from expert rows a third.
    default_num_sms = 128

    def __init__(self, config: TransportConfig) -> None:
        super().__init__(config)
        self._empty_inboxes()
        # A peer may send as soon as it is here.
        memory.meet(config)

    def _clear_memory(self) -> None:
        super()._clear_memory()
        self._empty_inboxes()

    def _empty_inboxes(self) -> None:
        self._memory.own[self._layout.slab_offset(0) :].fill_(_EMPTY)
        torch.cuda.synchronize()

    def _launch_dispatch(self, calls: tuple[Any, ...], plan: Any, stream: int) -> None:
        self.core.low_latency_dispatch(self.comm, calls, plan, stream)

    def _launch_combine(self, calls: tuple[Any, ...], plan: Any, stream: int) -> None:
        self.core.low_latency_combine(self.comm, calls, plan, stream)
