"""``Buffer`` for training and prefill, and ``Config``; see the package for what differs.

Shapes: T tokens of this rank, H hidden, E experts, R ranks, K top-k, N rows that arrive.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext import ep
from dualpipe_ext.agreement import group_size_and_rank
from dualpipe_ext.ep import Handle
from dualpipe_ext.ep.collective import destinations
from dualpipe_ext.integrations.deep_ep.low_latency import LowLatencyCalls
from dualpipe_ext.integrations.deep_ep.utils import (
    EventHandle,
    EventOverlap,
    check_dims,
    overlap_of,
)
from dualpipe_ext.integrations.shared_buffers import SharedBuffers

Rows = Tensor | tuple[Tensor, Tensor]
"""[T, H], or FP8 values with their scales [T, H/128]."""

topk_idx_t = torch.int64


class Config:
    """Settings of DeepEP's kernels. Ours need none of them."""

    def __init__(self, num_sms: int = 20, *chunk_sizes: int, **chunk_sizes_by_name: int) -> None:
        self.num_sms = num_sms

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0: the caller need not make room."""
        return 0

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0 as well."""
        return 0


class Buffer(LowLatencyCalls):
    """Dispatch and combine between the ranks of a group.

    Args:
        group: the ranks.
        num_nvl_bytes: kept for callers that look at it, as are the other numbers.
        num_rdma_bytes: likewise.
        low_latency_mode: kept likewise: low-latency calls can be made either way.
        ignored_too: further settings of DeepEP's, without meaning here.
        ignored: likewise.

    Raises:
        ValueError: :attr:`max_tokens` below 1; a group that this rank is not in.
    """

    num_sms: ClassVar[int] = 24
    """SMs of buffers made from now on."""
    max_tokens: ClassVar[int | None] = None
    """Most tokens of a rank in a call, for buffers made from now on; None: the most of any rank in
    the first dispatch of its kind that has some. More are an error (:class:`dualpipe_ext.Buffer`);
    DeepEP has no such bound."""
    transport: ClassVar[str] = "auto"
    """See :class:`dualpipe_ext.Buffer`; of buffers made from now on."""
    timeout_s: ClassVar[float] = 100.0
    """Longest wait of such buffers for another rank, in seconds; the default is DeepEP's."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        *ignored_too: Any,
        **ignored: Any,
    ) -> None:
        super().__init__()
        self.group = group
        self.group_size, self.rank = group_size_and_rank(group)
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        # SMs that only pack for copy engines are another number.
        num_sms = None if self.transport == "copy_engine" else self.num_sms
        options = {"transport": self.transport, "num_sms": num_sms, "timeout_s": self.timeout_s}
        self._buffers = SharedBuffers(
            "set deep_ep.Buffer.max_tokens to the most there will be",
            max_tokens=self.max_tokens,
            options=options,
        )
        self._of_transport: dict[object, ep.Buffer] = {}

    # --- what DeepEP asks of its class ---------------------------------------------------------

    @classmethod
    def set_num_sms(cls, num_sms: int) -> None:
        """SMs of the kernels of buffers made from now on; 0 takes the copy engines."""
        cls.num_sms = num_sms

    @classmethod
    def get_dispatch_config(cls, num_ranks: int) -> Config:
        """Settings that need no tuning."""
        return Config(cls.num_sms)

    @classmethod
    def get_combine_config(cls, num_ranks: int) -> Config:
        """Settings that need no tuning."""
        return Config(cls.num_sms)

    @staticmethod
    def capture() -> EventOverlap:
        """A point in the current stream."""
        return EventOverlap(EventHandle())

    def destroy(self) -> None:
        """Give up the communication memory, but for that of handles that are alive."""
        self._buffers.clear()
        self._low_latency.clear()
        self._of_transport.clear()

    # --- calls ---------------------------------------------------------------------------------

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, None, Tensor, Tensor, EventOverlap]:
        """Where this rank's tokens go.

        Args:
            topk_idx: int64 [T, K], expert ids, -1 for none.
            num_experts: E.
            previous_event: to be waited for.
            async_finish: has no effect: this runs on the current stream.
            allocate_on_comm_stream: has none either.

        Returns:
            Tokens for each rank, int32 [R]; None; choices of each expert, int32 [E]; whether a
            token goes to a rank, bool [T, R]; an event.

        Raises:
            ValueError: ``topk_idx`` of another shape.
        """
        check_dims("topk_idx", topk_idx, ("T", "K"))
        _wait(previous_event)
        # Ids out of range are told by dispatch, on every rank.
        valid = (topk_idx >= 0) & (topk_idx < num_experts)
        goes = destinations(topk_idx, valid, self.group_size, num_experts // self.group_size)
        chosen = torch.where(valid, topk_idx, num_experts).flatten()
        per_expert = torch.zeros(num_experts + 1, dtype=torch.int32, device=topk_idx.device)
        per_expert.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=torch.int32))
        per_rank = goes.sum(0, dtype=torch.int32)
        return per_rank, None, per_expert[:num_experts], goes.contiguous(), self.capture()

    def dispatch(
        self,
        x: Rows,
        handle: Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Rows, Tensor | None, Tensor | None, list[int], Handle, EventOverlap]:
        """Send every token once to each rank that has one of its experts.

        Args:
            x: bfloat16 (or what else :class:`dualpipe_ext.Buffer` takes) [T, H], or a pair of FP8
                values and scales.
            handle: repeat an earlier dispatch; no routing is given then.
            num_tokens_per_rank: not looked at: dispatch counts by itself.
            num_tokens_per_rdma_rank: likewise.
            is_token_in_rank: likewise.
            num_tokens_per_expert: int [E]; its length says how many experts there are.
            topk_idx: int64 [T, K].
            topk_weights: float32 [T, K].
            expert_alignment: to which the counts that are returned are rounded up.
            num_worst_tokens: rows of the outputs, those beyond N without experts; the host then
                waits for nothing, and gets no counts. 0: exactly N.
            config: not used.
            previous_event: to be waited for, besides the current stream.
            async_finish: run on a side stream; outputs are usable after the event.
            allocate_on_comm_stream: has no effect.

        Returns:
            Rows [N, H] by source rank, in its order (a pair for FP8); their local expert ids int64
            [N, K], -1 for those elsewhere, and weights float32 [N, K], 0 there; rows of each local
            expert as numbers; the handle; an event. With a handle only rows, it, and the event.

        Raises:
            ValueError: wrong arguments, on the ranks or on all, as :class:`dualpipe_ext.Buffer`.
            CommTimeoutError: a rank did not take part.
        """
        _wait(previous_event)
        values = x[0] if isinstance(x, tuple) else x
        how = {"fp8": isinstance(x, tuple), "async_op": async_finish}
        with torch.no_grad():
            if handle is not None:
                recv, _ = self._buffer_of(handle, "dispatch").dispatch(x, handle=handle, **how)
                event = overlap_of(recv.event, async_finish)
                return _rows(recv), None, None, [], handle, event
            if topk_idx is None or num_tokens_per_expert is None:
                raise ValueError("expected topk_idx and num_tokens_per_expert, or a handle")
            check_dims("x[0]" if isinstance(x, tuple) else "x", values, ("T", "H"))
            check_dims("topk_idx", topk_idx, ("T", "K"))
            check_dims("num_tokens_per_expert", num_tokens_per_expert, ("E",))
            buffer = self._buffers.get(
                self.group,
                tokens=values.shape[0],
                hidden=values.shape[1],
                num_experts=num_tokens_per_expert.shape[0],
                top_k=topk_idx.shape[1],
                # Gradients of quantised rows come back unquantised.
                dtype=torch.bfloat16 if isinstance(x, tuple) else x.dtype,
                device=values.device,
            )
            bound = num_worst_tokens or None
            recv, handle = buffer.dispatch(x, topk_idx, topk_weights, max_recv_tokens=bound, **how)
        self._of_transport[handle.owner] = buffer
        counts = [-(-n // expert_alignment) * expert_alignment for n in recv.host_counts or []]
        event = overlap_of(recv.event, async_finish)
        return _rows(recv), recv.topk_idx, recv.topk_weights, counts, handle, event

    def combine(
        self,
        x: Tensor,
        handle: Handle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Bring rows back to their tokens and sum them.

        Args:
            x: [N, H], one row for each that the dispatch gave.
            handle: of the dispatch.
            topk_weights: float32 [N, K], numbers that go back to the choices that they belong to.
            bias: [T, H] to be added, or two, of which the sum is rounded first.
            config: not used.
            previous_event: to be waited for, besides the current stream.
            async_finish: run on a side stream; outputs are usable after the event.
            allocate_on_comm_stream: has no effect.

        Returns:
            Sums [T, H]; the numbers [T, K], if there were any; an event.

        Raises:
            ValueError: wrong arguments, such as both ``bias`` and ``topk_weights``.
            CommTimeoutError: a rank did not take part.
        """
        _wait(previous_event)
        buffer = self._buffer_of(handle, "dispatch")
        numbers = None
        with torch.no_grad():
            if topk_weights is not None:
                if bias is not None:
                    raise ValueError("expected bias or topk_weights, got both")
                y, numbers, event = buffer.combine_with_weights(
                    x, topk_weights, handle, async_op=async_finish
                )
            else:
                if isinstance(bias, tuple):
                    bias = bias[0] + bias[1]
                y, event = buffer.combine(x, handle, bias=bias, async_op=async_finish)
        return y, numbers, overlap_of(event, async_finish)

    def check(self) -> None:
        """Raise what kernels have reported since the last call, of calls of both kinds; does not
        wait for them. Replays of graphs raise nothing else (:meth:`dualpipe_ext.Buffer.check`)."""
        for buffer in self._made():
            buffer.check()

    def reset(self) -> None:
        """Make this usable again after a ``CommTimeoutError``, on all ranks
        (:meth:`dualpipe_ext.Buffer.reset`)."""
        for buffer in self._made():
            buffer.reset()

    def _made(self) -> list[ep.Buffer]:
        kinds = (self._buffers, *self._low_latency.values())
        return [buffer for buffers in kinds for buffer in buffers.made()]

    def _buffer_of(self, handle: Handle, call: str) -> ep.Buffer:
        buffer = self._of_transport.get(getattr(handle, "owner", None))
        if buffer is None:
            raise ValueError("expected a handle that this Buffer's dispatch returned")
        made_by = "dispatch" if handle.rows_per_expert is None else "low_latency_dispatch"
        if made_by != call:
            raise ValueError(f"expected a handle of {call}, got one of {made_by}")
        return buffer


def _wait(event: EventOverlap | None) -> None:
    if event is not None:
        event.current_stream_wait()


def _rows(recv: ep.TokenMajor) -> Rows:
    return recv.tokens if recv.scales is None else (recv.tokens, recv.scales)
