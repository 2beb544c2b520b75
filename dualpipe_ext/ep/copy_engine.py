"""The transport of the copy engines: no SM moves a row across the link.

Kernels pack rows into a staging slab in the layout of their destinations, copies carry segments,
part by part, kernels unpack or sum what has come. csrc/ep/copy_engine.cpp describes the protocol
and launches it all in one call.

Shapes: T tokens of this rank, H hidden, R ranks, K top-k, N rows in token layout, M expert rows.
"""

from __future__ import annotations

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


class CopyEngineTransport(PeerTransport):
    """See the module."""

    name = "copy_engine"
    capabilities: ClassVar[Capabilities] = Capabilities(
        dtypes=ROW_DTYPES, syncs_host=False, zero_copy=False
    )
    transit_slabs = 2
    moves_parts = True
    # In token layout; kernels of the expert layout, which write several times as much, get twice
    # as many, and so do those of ranks with several peers, to whom a row goes several times. SMs
    # move some 45 GB/s each, so more of them take less time, not more SM time.
    default_num_sms = 16

    @property
    def comm_sms(self) -> int:
        return 0

    def __init__(self, config: TransportConfig) -> None:
        super().__init__(config)
        several = config.num_ranks > 2
        self._expert_sms = self.num_sms
        if not config.num_sms:
            default = self.default_num_sms * (2 if several else 1)
            self.num_sms, self._expert_sms = map(self.within_gpu, (default, 2 * default))
        self._lanes = self.core.CopyLanes(config.num_ranks)
        self._shapes: dict[tuple[object, ...], tuple[Any, Any]] = {}
        self._detour: Tensor | None = None
        self.part_ends: tuple[int, ...] | None = None
        """Hook of tests and benchmarks: parts in which segments travel, whatever their size."""
        self.in_turn = several
        """Whether rows go to one peer after the other, on one stream. Copies to all peers at once
        meet at one receiver: on four GPUs a combine takes 863 us with them, 555 in turn."""
        self.begin_together = several
        """Whether no rank copies before all have packed their first part: turns that begin apart
        meet, too."""

    @property
    def link_repeats(self) -> float:
        """Hook of benchmarks: how often rows cross the link, at least 1. As if it were slower, with
        the same kernels at both ends."""
        return self._lanes.repeats

    @link_repeats.setter
    def link_repeats(self, repeats: float) -> None:
        self._lanes.repeats = repeats

    @property
    def link_detour(self) -> Tensor | None:
        """Hook of benchmarks: pinned host memory, uint8, that takes the copies of ``link_repeats``
        after the first, none of which anybody reads; ``None``: they cross the link again.

        A network adapter reads rows over PCIe as well. Copies over NVLink in their place would
        take eight times as much of the memory's rate for as long a time."""
        return self._detour

    @link_detour.setter
    def link_detour(self, memory: Tensor | None) -> None:
        if memory is not None and not (
            memory.dtype == torch.uint8
            and memory.is_pinned()
            and memory.is_contiguous()
            and memory.numel()
        ):
            raise ValueError(
                f"expected pinned memory of uint8 in one piece, got {memory.dtype} "
                f"{list(memory.shape)} on {memory.device}"
            )
        if self._detour is not None:  # which copies that are on their way write to
            torch.cuda.synchronize(self._device)
        address, size = (0, 0) if memory is None else (memory.data_ptr(), memory.numel())
        self._lanes.set_detour(address=address, bytes=size)
        self._detour = memory  # kept alive

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

        def act(items: list[tuple[Any, Any]]) -> None:
            calls, copies = zip(*items, strict=True)
            how = self._dispatch_shape(source, handle)
            self.core.carry_dispatch(self.comm, calls, self._lanes, copies, *how, current_stream())

        call = kernel_calls.dispatch_call(self, source, handle, output)
        sends, receives = self._rows_known(handle)
        copies = self.core.CopyCall(sends=sends, receives=receives)
        self.together(
            (call, copies), act, lambda: (handle.layout, kernel_calls.dispatch_sizes(source))
        )
        return output.as_rows()

    def combine(
        self,
        rows: Tensor,
        handle: Handle,
        *,
        weights: Tensor | None = None,
        bias: Tensor | None = None,
        row_weights: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        assert isinstance(handle, PeerHandle)
        source = self.combine_input(rows, weights, bias, row_weights)
        output = kernel_calls.combine_output(self, source, handle, out)
        direct = self._can_copy_rows(source, handle)

        def act(items: list[tuple[Any, Any, bool]]) -> None:
            calls, copies, weighted = zip(*items, strict=True)
            how = self._combine_shape(source, handle, direct, any(weighted))
            self.core.carry_combine(
                self.comm, calls, self._lanes, copies, *how, direct, current_stream()
            )

        call = kernel_calls.combine_call(self, source, handle, output)
        # Rows go back to where they came from.
        receives, sends = self._rows_known(handle)
        copies = self.core.CopyCall(sends=sends, receives=receives)
        self.together(
            (call, copies, weights is not None),
            act,
            lambda: (direct, kernel_calls.combine_sizes(source, handle)),
        )
        return output.y, output.token_weights

    def _rows_known(self, handle: PeerHandle) -> tuple[list[int], list[int]]:
        """Rows of a dispatch to each rank, and from each; full segments if the host knows none."""
        if handle.sent is None:
            full = [self.config.max_tokens] * self.config.num_ranks
            return full, full
        rank = self.config.rank
        return handle.sent[rank], [sent[rank] for sent in handle.sent]

    def _can_copy_rows(self, source: kernel_calls.CombineInput, handle: PeerHandle) -> bool:
        """Rows of one source rank are consecutive in token layout: nothing needs packing."""
        numbers = source.row_weights
        dense = (
            numbers is None
            or numbers.shape[1:].numel() * numbers.element_size() == self._layout.weight_pitch
        )
        return handle.layout == "token" and handle.sent is not None and dense

    def forget_plans(self) -> None:
        """For those who try out other parts, after calls with the ones before."""
        self._shapes.clear()

    # --- what calls of a kind have in common, made once: parts, and the plan of what packs ------

    def _dispatch_shape(
        self, source: kernel_calls.DispatchInput, handle: PeerHandle
    ) -> tuple[Any, Any]:
        numbers = None if source.weights is None else source.weights.dtype
        key = (source.payload, source.rows.dtype, source.in_bytes, numbers, handle.layout)
        if key not in self._shapes:
            ctas = self._sms(handle)
            pack = tuning.for_pack(source, ctas, self.config)
            take = tuning.for_unpack(source, self.config)
            plan = self.core.DispatchPlan(
                **kernel_calls.dispatch_sizes(source), tuning=pack.as_core(self.core), ctas=ctas
            )
            self._shapes[key] = (self._shape(source.out_bytes, pack, ctas, take, ctas), plan)
        return self._shapes[key]

    def _combine_shape(
        self, source: kernel_calls.CombineInput, handle: PeerHandle, direct: bool, weighted: bool
    ) -> tuple[Any, Any]:
        numbers = None if source.row_weights is None else source.row_weights.dtype
        key = (source.rows.dtype, numbers, handle.layout, direct, weighted)
        if key not in self._shapes:
            ctas = self._sms(handle)
            pack, pack_ctas = tuning.PERMITS_ONLY, 1
            if not direct:
                pack, pack_ctas = tuning.for_combine_pack(source, handle, ctas, self.config), ctas
            plan = self.core.CombinePlan(
                **kernel_calls.combine_sizes(source, handle),
                weighted=weighted,
                tuning=pack.as_core(self.core),
                ctas=pack_ctas,
            )
            take = tuning.for_reduce(handle)
            shape = self._shape(source.row_bytes, pack, pack_ctas, take, ctas)
            self._shapes[key] = (shape, plan)
        return self._shapes[key]

    def _sms(self, handle: PeerHandle) -> int:
        return self._expert_sms if handle.layout == "expert" else self.num_sms

    def _shape(
        self,
        row_bytes: int,
        pack: tuning.Tuning,
        pack_ctas: int,
        take: tuning.Tuning,
        take_ctas: int,
    ) -> Any:
        return self.core.CopyShape(
            ends=tuning.segment_parts(row_bytes, self.config, self.part_ends, in_turn=self.in_turn),
            in_turn=self.in_turn,
            together=self.begin_together,
            staging_slab=_STAGING,
            pack=pack.as_core(self.core),
            pack_ctas=pack_ctas,
            take=take.as_core(self.core),
            take_ctas=take_ctas,
        )
