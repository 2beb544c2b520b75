"""The transport of the copy engines: no SM moves a row across the link.

Kernels pack rows into a staging slab in the layout of their destinations, copies carry whole
segments, kernels unpack or sum what has come. csrc/ep/copy_engine.cu describes the protocol.

Shapes: T tokens of this rank, H hidden, R ranks, K top-k, N rows in token layout, M expert rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dualpipe_ext.ep import kernel_calls, tuning
from dualpipe_ext.ep.device_arrays import current_stream
from dualpipe_ext.ep.fp8 import Quantized
from dualpipe_ext.ep.handle import Handle
from dualpipe_ext.ep.peer import ROW_DTYPES, PeerTransport
from dualpipe_ext.ep.peer_handle import PeerHandle
from dualpipe_ext.ep.transport import Capabilities, Rows, TransportConfig

_ARRIVALS, _STAGING = 0, 1  # slabs


@dataclass(frozen=True, slots=True)
class _Copy:
    """``rows`` runs of ``num_bytes`` from one pitch to another."""

    peer: int
    to: int
    to_pitch: int
    source: int
    source_pitch: int
    num_bytes: int
    rows: int


class CopyEngineTransport(PeerTransport):
    """See the module."""

    name = "copy_engine"
    capabilities: ClassVar[Capabilities] = Capabilities(
        dtypes=ROW_DTYPES, syncs_host=False, zero_copy=False
    )
    transit_slabs = 2
    # What packs 59 MB in about 40 us; more brings little.
    default_num_sms = 16

    @property
    def comm_sms(self) -> int:
        return 0

    def __init__(self, config: TransportConfig) -> None:
        super().__init__(config)
        self._copy_streams: dict[int, torch.cuda.Stream] = {}

    def dispatch(
        self,
        x: Tensor | Quantized,
        topk_weights: Tensor | None,
        handle: Handle,
        *,
        fp8: bool = False,
        pow2_scales: bool = False,
    ) -> Rows:
        assert isinstance(handle, PeerHandle)
        source = self.dispatch_input(x, topk_weights, fp8, pow2_scales)
        output = kernel_calls.dispatch_output(self, source, handle)
        sizes = kernel_calls.dispatch_sizes(source)

        def act(items: list[tuple[Any, Any, list[_Copy]]]) -> None:
            calls = [call for call, _, _ in items]

            def launch(part: str, shape: tuning.Tuning) -> None:
                self.core.dispatch(
                    self.comm,
                    calls,
                    part=part,
                    **sizes,
                    tuning=shape.as_core(self.core),
                    staging_slab=_STAGING,
                    ctas=self.num_sms,
                    stream=current_stream(),
                )

            launch("pack", tuning.for_pack(source, self.num_sms, self.config))
            self._copy(items)
            launch("own", tuning.for_own_rows(source, self.config))
            self._await([call for _, call, _ in items], combine=False)
            launch("unpack", tuning.for_unpack(source, self.config))

        call = kernel_calls.dispatch_call(self, source, handle, output)
        copies = self._copies(source, handle)
        self.together((call, self._arrivals_call(), copies), act, (handle.layout, sizes))
        return output.as_rows()

    def combine(
        self,
        rows: Tensor,
        handle: Handle,
        *,
        weights: Tensor | None = None,
        bias: Tensor | None = None,
        row_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        assert isinstance(handle, PeerHandle)
        source = self.combine_input(rows, weights, bias, row_weights)
        output = kernel_calls.combine_output(self, source, handle)
        sizes = kernel_calls.combine_sizes(source, handle)
        direct = self._can_copy_rows(source, handle)

        def act(items: list[tuple[Any, Any, list[_Copy], bool]]) -> None:
            calls = [call for call, *_ in items]

            def launch(part: str, shape: tuning.Tuning, ctas: int) -> None:
                self.core.combine(
                    self.comm,
                    calls,
                    part=part,
                    **sizes,
                    weighted=any(weighted for *_, weighted in items),
                    tuning=shape.as_core(self.core),
                    staging_slab=_STAGING,
                    ctas=ctas,
                    stream=current_stream(),
                )

            if direct:
                launch("pack", tuning.PERMITS_ONLY, 1)
            else:
                launch(
                    "pack",
                    tuning.for_combine_pack(source, handle, self.num_sms, self.config),
                    self.num_sms,
                )
            self._copy([item[:3] for item in items])
            self._await([item[1] for item in items], combine=True)
            launch("reduce", tuning.REDUCE, self.num_sms)

        call = kernel_calls.combine_call(self, source, handle, output)
        copies = self._return_copies(source, handle, direct)
        item = (call, self._arrivals_call(), copies, weights is not None)
        self.together(item, act, (direct, sizes))
        return output.y, output.token_weights

    # --- copies --------------------------------------------------------------------------------

    def _copy(self, items: Sequence[tuple[Any, Any, list[_Copy]]]) -> None:
        """Start the copies of all ranks after what is on the current stream."""
        packed = torch.cuda.current_stream().record_event()
        for peer in {one.peer for _, _, copies in items for one in copies}:
            self._copy_stream(peer).wait_event(packed)
        for _, _, copies in items:
            for one in copies:
                self.core.copy(
                    to=one.to,
                    to_pitch=one.to_pitch,
                    source=one.source,
                    source_pitch=one.source_pitch,
                    bytes=one.num_bytes,
                    rows=one.rows,
                    stream=self._copy_stream(one.peer).cuda_stream,
                )

    def _await(self, calls: list[Any], *, combine: bool) -> None:
        """Order the current stream after these copies and after those of the other ranks."""
        here = torch.cuda.current_stream()
        for stream in self._copy_streams.values():
            here.wait_stream(stream)
        self.core.arrivals(self.comm, calls, combine=combine, stream=here.cuda_stream)

    def _copy_stream(self, peer: int) -> torch.cuda.Stream:
        if peer not in self._copy_streams:
            self._copy_streams[peer] = torch.cuda.Stream()
        return self._copy_streams[peer]

    def _arrivals_call(self) -> Any:
        return self.core.ArrivalsCall(rank=self.config.rank)

    def _copies(self, source: kernel_calls.DispatchInput, handle: PeerHandle) -> list[_Copy]:
        """Staging segments to the peers' slabs, then a flag to each peer."""
        rank = self.config.rank
        copies = []
        for peer in self._peers():
            count = self.config.max_tokens if handle.sent is None else handle.sent[rank][peer]
            arrays = [("rows", -(-source.out_bytes // 128) * 128)]
            if source.num_scales:
                arrays.append(("scales", self._layout.scale_pitch))
            if source.weights is not None:
                arrays.append(("weights", self._layout.weight_pitch))
            copies += [self._segment(peer, *array, count) for array in arrays]
            copies.append(self._flag(peer))
        return copies

    def _return_copies(
        self, source: kernel_calls.CombineInput, handle: PeerHandle, direct: bool
    ) -> list[_Copy]:
        """The same for a combine; or straight from the rows, where the host knows their places."""
        rank, sent = self.config.rank, handle.sent
        copies = []
        for peer in self._peers():
            count = self.config.max_tokens if sent is None else sent[peer][rank]
            arrays = [("rows", -(-source.row_bytes // 128) * 128, source.rows, source.row_bytes)]
            if source.row_weights is not None:
                pitch, numbers = self._layout.weight_pitch, source.row_weights
                arrays.append(("weights", pitch, numbers, pitch))
            for region, pitch, tensor, row_bytes in arrays:
                one = self._segment(peer, region, pitch, count)
                if direct:
                    assert sent is not None
                    first = sum(sent[s][rank] for s in range(peer))
                    address = tensor.data_ptr() + first * row_bytes
                    one = _Copy(peer, one.to, pitch, address, row_bytes, row_bytes, count)
                copies.append(one)
            copies.append(self._flag(peer))
        return copies

    def _can_copy_rows(self, source: kernel_calls.CombineInput, handle: PeerHandle) -> bool:
        """Rows of one source rank are consecutive in token layout: nothing needs packing."""
        numbers = source.row_weights
        dense = (
            numbers is None
            or numbers.shape[1:].numel() * numbers.element_size() == self._layout.weight_pitch
        )
        return handle.layout == "token" and handle.sent is not None and dense

    def _peers(self) -> list[int]:
        rank, num_ranks = self.config.rank, self.config.num_ranks
        return [(rank + i) % num_ranks for i in range(1, num_ranks)]

    def _segment(self, peer: int, region: str, pitch: int, rows: int) -> _Copy:
        """The staging segment of a peer to this rank's segment at the peer."""
        offset, _ = self._regions[region]
        tokens = max(self.config.max_tokens, 1)
        to = self.addresses[peer] + offset + self.config.rank * tokens * pitch
        source = self.addresses[self.config.rank] + offset + peer * tokens * pitch
        source += _STAGING * self._layout.slab_bytes
        return _Copy(peer, to, pitch, source, pitch, pitch, rows)

    def _flag(self, peer: int) -> _Copy:
        offset, _ = self._regions["run_flags"]
        to = self.addresses[peer] + offset + self.config.rank * self._layout.max_runs * 4
        state, _ = self._regions["state"]
        source = self.addresses[self.config.rank] + state + self.core.COPY_EPOCH_OFFSET
        return _Copy(peer, to, 4, source, 4, 4, 1)
