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
        self._plans: dict[tuple[object, ...], Any] = {}

    @property
    def comm_sms(self) -> int:
        return self.num_sms

    def use_sms(self, num_sms: int) -> None:
        """Launch on so many SMs from now on, or on as many as there are; the same on all ranks.

        Nothing on the device depends on the number of a launch before, nor does a handle.
        """
        self.num_sms = self.within_gpu(num_sms)
        self.forget_plans()

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

        def act(items: list[tuple[Any, bool]]) -> None:
            calls, stay = zip(*items, strict=True)
            plan = self._dispatch_plan(source, handle, all(stay))
            self._launch_dispatch(calls, plan, current_stream())

        call = kernel_calls.dispatch_call(self, source, handle, output)
        self.together(
            (call, output.in_slab),
            act,
            lambda: (handle.layout, kernel_calls.dispatch_sizes(source)),
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

        def act(items: list[tuple[Any, bool]]) -> None:
            calls, weighted = zip(*items, strict=True)
            plan = self._combine_plan(source, handle, any(weighted))
            self._launch_combine(calls, plan, current_stream())

        call = kernel_calls.combine_call(self, source, handle, output)
        self.together(
            (call, weights is not None), act, lambda: kernel_calls.combine_sizes(source, handle)
        )
        return output.y, output.token_weights

    def _launch_dispatch(self, calls: tuple[Any, ...], plan: Any, stream: int) -> None:
        self.core.dispatch(self.comm, calls, plan, stream)

    def _launch_combine(self, calls: tuple[Any, ...], plan: Any, stream: int) -> None:
        self.core.combine(self.comm, calls, plan, stream)

    # --- what calls of a kind have in common, made once -------------------------------------------

    def forget_plans(self) -> None:
        """For those who try out other tunings."""
        self._plans.clear()

    def _dispatch_plan(
        self, source: kernel_calls.DispatchInput, handle: PeerHandle, in_slab: bool
    ) -> Any:
        numbers = None if source.weights is None else source.weights.dtype
        key = (source.payload, source.rows.dtype, source.in_bytes, numbers, handle.layout, in_slab)
        plan = self._plans.get(key)
        if plan is None:
            tuned = tuning.for_dispatch(source, handle, in_slab, self.num_sms, self.config)
            plan = self._plans[key] = self.core.DispatchPlan(
                **kernel_calls.dispatch_sizes(source),
                tuning=tuned.as_core(self.core),
                ctas=self.num_sms,
            )
        return plan

    def _combine_plan(
        self, source: kernel_calls.CombineInput, handle: PeerHandle, weighted: bool
    ) -> Any:
        numbers = None if source.row_weights is None else source.row_weights.dtype
        key = (source.rows.dtype, numbers, handle.layout, weighted)
        plan = self._plans.get(key)
        if plan is None:
            tuned = tuning.for_combine(source, handle, self.num_sms, self.config)
            plan = self._plans[key] = self.core.CombinePlan(
                **kernel_calls.combine_sizes(source, handle),
                weighted=weighted,
                tuning=tuned.as_core(self.core),
                ctas=self.num_sms,
            )
        return plan
