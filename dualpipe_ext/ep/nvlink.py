"""The transport over NVLink: kernels on a share of the SMs write straight into peers' memory.

Shapes: T tokens of this rank, H hidden, R ranks, K top-k, N rows in token layout, M expert rows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dualpipe_ext.ep import kernel_calls, tuning
from dualpipe_ext.ep.device_arrays import current_stream
from dualpipe_ext.ep.fp8 import Quantized
from dualpipe_ext.ep.handle import Handle
from dualpipe_ext.ep.peer import PeerTransport
from dualpipe_ext.ep.peer_handle import PeerHandle
from dualpipe_ext.ep.transport import Rows, TransportConfig


class NVLinkTransport(PeerTransport):
    """See the module; the protocols are in csrc/ep/dispatch.cu and combine.cu."""

    name = "nvlink"

    @classmethod
    def unavailable(cls, config: TransportConfig) -> str | None:
        if config.num_sms == 0:
            return "num_sms=0 leaves it no SM"
        return super().unavailable(config)

    def __init__(self, config: TransportConfig) -> None:
        super().__init__(config)
        self._tunings: dict[tuple[object, ...], Any] = {}

    @property
    def comm_sms(self) -> int:
        return self.num_sms

    def use_sms(self, num_sms: int) -> None:
        """Launch on so many SMs from now on, or on as many as there are; the same on all ranks.

        Nothing on the device depends on the number of a launch before, nor does a handle.
        """
        self.num_sms = self.resident_sms(num_sms)
        self.forget_tunings()

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

        def act(items: list[tuple[object, bool]]) -> None:
            calls = [call for call, _ in items]
            in_slab = all(stays for _, stays in items)
            self.core.dispatch(
                self.comm,
                calls,
                part="all",
                **sizes,
                tuning=self._dispatch_tuning(source, handle, in_slab),
                staging_slab=0,
                ctas=self.num_sms,
                stream=current_stream(),
            )

        call = kernel_calls.dispatch_call(self, source, handle, output)
        self.together((call, output.in_slab), act, (handle.layout, sizes))
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

        def act(items: list[tuple[object, bool]]) -> None:
            self.core.combine(
                self.comm,
                [call for call, _ in items],
                part="all",
                **sizes,
                weighted=any(weighted for _, weighted in items),
                tuning=self._combine_tuning(source, handle),
                staging_slab=0,
                ctas=self.num_sms,
                stream=current_stream(),
            )

        call = kernel_calls.combine_call(self, source, handle, output)
        self.together((call, weights is not None), act, sizes)
        return output.y, output.token_weights

    def forget_tunings(self) -> None:
        """For those who try out others."""
        self._tunings.clear()

    def _dispatch_tuning(
        self, source: kernel_calls.DispatchInput, handle: PeerHandle, in_slab: bool
    ) -> Any:
        key = (source.payload, source.in_bytes, source.out_bytes, handle.layout, in_slab)
        if key not in self._tunings:
            tuned = tuning.for_dispatch(source, handle, in_slab, self.num_sms, self.config)
            self._tunings[key] = tuned.as_core(self.core)
        return self._tunings[key]

    def _combine_tuning(self, source: kernel_calls.CombineInput, handle: PeerHandle) -> Any:
        key = (source.row_bytes, handle.layout)
        if key not in self._tunings:
            tuned = tuning.for_combine(source, handle, self.num_sms, self.config)
            self._tunings[key] = tuned.as_core(self.core)
        return self._tunings[key]
