"""The calls for decoding: few tokens, outputs of fixed size, nothing that the host waits for.

Every expert's rows come as a group of fixed size, of which the first ``recv_count`` are filled and
**the others are not written**: they are for masked grouped GEMMs, as DeepEP's are. They move over
the transport "low_latency" where NVLink joins the GPUs, else over what "auto" takes.

What differs from DeepEP: with ``return_recv_hook`` a call is made whole, on the current stream, and
its hook does nothing; what is to overlap a call takes ``async_finish``, which runs it on a side
stream, on SMs that it holds while it waits. Weights are sent to the experts when rows come back, in
a small call of its own: code that can should give them to ``dualpipe_ext.Buffer.dispatch``, which
sends them beside the rows. A combine sums the choices of its dispatch, whatever its ``topk_idx``.
FP8 scales are float32, one row's beside each other. Ids out of range are dropped, and told by a
later dispatch or by ``check``.

Shapes: T tokens of this rank, H hidden, E experts, R ranks, K top-k, G = E / R local experts,
n = R x ``num_max_dispatch_tokens_per_rank`` rows of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext import ep
from dualpipe_ext.ep import Handle
from dualpipe_ext.integrations.deep_ep.utils import EventOverlap, check_dims, overlap_of
from dualpipe_ext.integrations.shared_buffers import SharedBuffers

Hook = Callable[[], None]
GroupedRows = Tensor | tuple[Tensor, Tensor]
"""[G, n, H], or FP8 values with their scales [G, n, H/128]."""
_COUNTS = (torch.int32, torch.int64)


class LowLatencyCalls:
    """The part of :class:`~dualpipe_ext.integrations.deep_ep.Buffer` for decoding."""

    low_latency_transport: ClassVar[str | tuple[str, ...]] = ("low_latency", "auto")
    """See :class:`dualpipe_ext.Buffer`; of buffers made from now on."""
    low_latency_num_sms: ClassVar[int | None] = None
    """SMs of their kernels, to be set where other kernels wait for other ranks at the same time, as
    with ``async_finish``: all of them must have room at once. None: as many as the transport takes
    best, which may be all."""

    if TYPE_CHECKING:
        group: dist.ProcessGroup
        group_size: int
        timeout_s: ClassVar[float]
        _of_transport: dict[object, ep.Buffer]

        def _buffer_of(self, handle: Handle, call: str) -> ep.Buffer: ...

    def __init__(self) -> None:
        self._low_latency_options = {
            "transport": self.low_latency_transport,
            "num_sms": self.low_latency_num_sms,
            "timeout_s": self.timeout_s,
        }
        # By the most tokens of a rank.
        self._low_latency: dict[int, SharedBuffers] = {}

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """0: the caller need not make room."""
        return 0

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Nothing: no call leaves anything behind for the next."""

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[GroupedRows, Tensor, Handle, EventOverlap, Hook | None]:
        """Send every token to its experts.

        Args:
            x: bfloat16 [T, H].
            topk_idx: int64 [T, K], expert ids, -1 for none.
            num_max_dispatch_tokens_per_rank: most T of any rank, equal on all.
            num_experts: E.
            cumulative_local_expert_recv_stats: int [G], to which the counts are added.
            dispatch_wait_recv_cost_stats: must be None.
            use_fp8: rows travel and arrive as float8_e4m3fn with 1x128 scales.
            round_scale: scales are powers of two.
            use_ue8m0: must be false.
            async_finish: run on a side stream; ``x`` must stay as it is until the event, outputs
                are usable after it.
            return_recv_hook: return a hook, which is not needed.

        Returns:
            Rows by local expert, of which the first ``recv_count`` of each are filled: [G, n, H] (a
            pair for FP8); ``recv_count`` int32 [G]; the handle; an event; the hook, if asked for.

        Raises:
            ValueError: wrong arguments; ids out of range in an earlier dispatch.
            CommTimeoutError: a rank did not take part.
        """
        _refuse(dispatch_wait_recv_cost_stats=dispatch_wait_recv_cost_stats, use_ue8m0=use_ue8m0)
        _check_one(async_finish, return_recv_hook)
        _check_rows(x, ("T", "H"))
        check_dims("topk_idx", topk_idx, ("T", "K"))
        num_local = num_experts // self.group_size
        _check_stats(cumulative_local_expert_recv_stats, num_local)
        most = num_max_dispatch_tokens_per_rank
        buffer = self._low_latency_buffers(most).get(
            self.group,
            tokens=x.shape[0],
            hidden=x.shape[1],
            num_experts=num_experts,
            top_k=topk_idx.shape[1],
            dtype=torch.bfloat16,
            device=x.device,
        )
        rows = buffer.config.num_ranks * most
        with torch.no_grad():
            recv, handle = buffer.dispatch(
                x,
                topk_idx,
                layout="expert",
                rows_per_expert=rows,
                fp8=use_fp8,
                pow2_scales=round_scale,
                async_op=async_finish,
            )
        self._of_transport[handle.owner] = buffer
        counts = recv.counts.to(torch.int32)
        if cumulative_local_expert_recv_stats is not None:
            cumulative_local_expert_recv_stats.add_(counts)
        groups = recv.tokens.view(len(counts), rows, -1)
        if recv.scales is not None:
            groups = groups, recv.scales.view(len(counts), rows, -1)
        event = overlap_of(recv.event, async_finish)
        return groups, counts, handle, event, _no_hook if return_recv_hook else None

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Handle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Hook | None]:
        """Bring rows back to their tokens and sum them, each times its weight.

        Args:
            x: bfloat16 [G, n, H]; only filled rows are read.
            topk_idx: int64 [T, K], of the dispatch: the handle's choices count.
            topk_weights: float32 [T, K].
            handle: of the dispatch.
            use_logfmt: has no effect: rows travel as they are.
            zero_copy: has none either.
            async_finish: run on a side stream; what is given must stay as it is until the event,
                the result is usable after it.
            return_recv_hook: return a hook, which is not needed.
            out: bfloat16 [T, H], contiguous on 16 bytes, where the sums shall be.
            combine_wait_recv_cost_stats: must be None.

        Returns:
            Sums [T, H]; an event; the hook, if asked for.

        Raises:
            ValueError: wrong arguments.
            CommTimeoutError: a rank did not take part.
        """
        _refuse(combine_wait_recv_cost_stats=combine_wait_recv_cost_stats)
        _check_one(async_finish, return_recv_hook)
        buffer = self._buffer_of(handle, "low_latency_dispatch")
        _check_rows(x, _group_shape(handle, buffer))
        if topk_idx.shape != topk_weights.shape:
            raise ValueError(
                f"expected topk_idx and topk_weights of one shape, got {list(topk_idx.shape)} and "
                f"{list(topk_weights.shape)}"
            )
        with torch.no_grad():
            weights, first = buffer.dispatch_weights(topk_weights, handle, async_op=async_finish)
            y, last = buffer.combine(
                x.flatten(0, 1), handle, weights=weights, out=out, async_op=async_finish
            )
        # The first too: what its call reads is kept until somebody waits for it.
        event = overlap_of(_InOrder((first, last)), async_finish)
        return y, event, _no_hook if return_recv_hook else None

    def get_next_low_latency_combine_buffer(self, handle: Handle) -> Tensor:
        """bfloat16 [G, n, H] to write rows for a combine into."""
        shape = _group_shape(handle, self._buffer_of(handle, "low_latency_dispatch"))
        return torch.empty(shape, dtype=torch.bfloat16, device=handle.counts.device)

    def _low_latency_buffers(self, most: int) -> SharedBuffers:
        if not isinstance(most, int) or most < 1:
            raise ValueError(
                "expected num_max_dispatch_tokens_per_rank to be an integer of at least 1, got "
                f"{most!r}"
            )
        if most not in self._low_latency:
            self._low_latency[most] = SharedBuffers(
                "set num_max_dispatch_tokens_per_rank to the most there will be",
                max_tokens=most,
                options=self._low_latency_options,
            )
        return self._low_latency[most]


@dataclass(frozen=True)
class _InOrder:
    """Events of calls that follow each other."""

    events: tuple[ep.Event, ...]

    def wait(self) -> None:
        for event in self.events:
            event.wait()


def _no_hook() -> None:
    """The call has been made."""


def _group_shape(handle: Handle, buffer: ep.Buffer) -> tuple[int, int, int]:
    """Of rows in groups: [G, n, H]."""
    assert handle.rows_per_expert is not None
    return len(handle.counts), handle.rows_per_expert, buffer.config.hidden


def _check_rows(x: object, shape: tuple[int | str, ...]) -> None:
    """Check ``x``, of bfloat16; names in ``shape`` stand for any size."""
    fits = (
        isinstance(x, Tensor)
        and x.dtype == torch.bfloat16
        and x.dim() == len(shape)
        and all(isinstance(n, str) or n == m for n, m in zip(shape, x.shape, strict=True))
    )
    if not fits:
        got = type(x).__name__
        if isinstance(x, Tensor):
            got = f"{x.dtype} {list(x.shape)}"
        wanted = ", ".join(str(n) for n in shape)
        raise ValueError(f"expected x as torch.bfloat16 [{wanted}], got {got}")


def _check_stats(stats: Tensor | None, num_local: int) -> None:
    if stats is None or (stats.shape == (num_local,) and stats.dtype in _COUNTS):
        return
    raise ValueError(
        "expected cumulative_local_expert_recv_stats as torch.int32 or torch.int64 "
        f"[{num_local}], got {stats.dtype} {list(stats.shape)}"
    )


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        if value is not None and value is not False:
            raise ValueError(f"expected {name} to be left out: there is no such thing here")


def _check_one(async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise ValueError("expected async_finish or return_recv_hook, got both")
