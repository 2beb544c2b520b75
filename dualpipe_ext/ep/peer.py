"""What the transports that write into peers' memory share: workspace, routing, reports, slabs.

The kernels are in csrc/ep; docs/internals.md explains their protocols.

Shapes: T tokens of this rank, H hidden, E experts, R ranks, G = E/R experts per rank, K top-k,
N rows in token layout, M rows in expert layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from dualpipe_ext import core
from dualpipe_ext.ep import kernel_calls, memory
from dualpipe_ext.ep.device_arrays import address, current_device, current_stream, rows_on_16_bytes
from dualpipe_ext.ep.fp8 import BLOCK, Quantized
from dualpipe_ext.ep.peer_handle import PeerHandle
from dualpipe_ext.ep.route_faults import CAPTURED, UNWATCHED, WATCHED, RouteFaults
from dualpipe_ext.ep.slabs import FreeSlabs, SlabPool, SlabRows
from dualpipe_ext.ep.transport import (
    Capabilities,
    RouteOptions,
    Transport,
    TransportConfig,
)
from dualpipe_ext.errors import CommTimeoutError

T = TypeVar("T")

ROW_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})

# Slab 0 takes what is copied or summed within the call.
_TRANSIT_SLABS = 1

# How much later than a kernel that gives up the host does: the GPU may have been busy before.
_HOST_MARGIN_S = 10


class PeerTransport(Transport):
    """Base of the transports over peer memory."""

    capabilities = Capabilities(dtypes=ROW_DTYPES, syncs_host=False, zero_copy=True)
    # Slabs beyond those of zero-copy outputs.
    transit_slabs = _TRANSIT_SLABS
    # Whether rows travel in parts of a segment (csrc/layout/segment.h).
    moves_parts = False
    # SMs of a kernel if the user names none.
    default_num_sms = 24

    def __init__(self, config: TransportConfig) -> None:
        super().__init__(config)
        c = core.module()
        self.core = c
        self._kept_slabs = self._num_kept_slabs(config)
        self._layout = self._layout_for(config)
        self._memory = memory.allocate(self._layout.bytes, config)
        self.addresses = self._memory.addresses
        self._table = c.PeerTable(self.addresses, bytes=self._layout.bytes)
        # One launch acts for all virtual ranks and takes the first one's channel.
        count = config.num_ranks if config.local is not None else 1
        channel = c.ErrorChannel(count)
        self._channel = channel if config.local is None else config.local.gather(channel)[0]
        self._record = config.rank if config.local is not None else 0
        self.comm = c.Comm(
            self._table, self._layout, self._channel, timeout_ns=int(config.timeout_s * 1e9)
        )
        self._faults = RouteFaults(c, config)
        self._regions = self._layout.regions()
        kept = range(self.transit_slabs, self.transit_slabs + self._kept_slabs)
        free = FreeSlabs(kept, lambda: c.capture_id(current_stream()))
        self._slabs = SlabPool(c, self._memory.own, self._layout, free)
        self._device = self._memory.own.device
        self.num_sms = self.within_gpu(config.num_sms or self.default_num_sms)
        self._last_stream: torch.cuda.Stream | None = None
        # What the host waited for in vain, and the device may not know of.
        self._gave_up: str | None = None
        self.delays_ns = (0, 0)
        """Test hook: how long the next launches hold back their sending and receiving roles."""

    @classmethod
    def unavailable(cls, config: TransportConfig) -> str | None:
        reason = memory.unavailable(config)
        if reason is not None:
            return reason
        most = core.module().MAX_LOCAL_EXPERTS
        return f"more than {most} experts on a rank" if config.num_local_experts > most else None

    @classmethod
    def _num_kept_slabs(cls, config: TransportConfig) -> int:
        return config.num_slabs if cls.capabilities.zero_copy else 0

    @classmethod
    def _layout_for(cls, config: TransportConfig) -> Any:
        return core.module().WorkspaceLayout(
            num_ranks=config.num_ranks,
            num_experts=config.num_experts,
            top_k=config.top_k,
            max_tokens=max(config.max_tokens, 1),
            row_bytes=-(-config.hidden * config.dtype.itemsize // 16) * 16,
            scale_bytes=config.hidden // BLOCK * 4 if config.hidden % BLOCK == 0 else 0,
            weight_bytes=8 if config.dtype == torch.float64 else 4,
            num_slabs=cls.transit_slabs + cls._num_kept_slabs(config),
        )

    @classmethod
    def memory_needed(cls, config: TransportConfig) -> int:
        """Bytes of the :attr:`memory_bytes` that one made with ``config`` would have."""
        return cls._layout_for(config).bytes

    @property
    def memory_bytes(self) -> int:
        return self._layout.bytes

    def within_gpu(self, num_sms: int) -> int:
        """That many SMs, or as many as every rank of a launch can have.

        CTAs wait for each other across ranks: all must run at once, those of virtual ranks too.
        """
        sms = torch.cuda.get_device_properties(self._device).multi_processor_count
        launches_for = self.config.num_ranks if self.config.local is not None else 1
        return min(num_sms, sms // launches_for)

    def holds(self, tensor: Tensor) -> bool:
        first = self._memory.own.data_ptr()
        return first <= tensor.data_ptr() < first + self._layout.bytes

    # --- reports of the device ---------------------------------------------------------------

    def check(self) -> None:
        self.check_failure()
        self._faults.check()

    def settle(self) -> None:
        torch.cuda.synchronize()
        self.check()

    def check_failure(self) -> None:
        """Raise if a wait has failed. What is wrong with a route is left for :meth:`check`, or for
        another route, the same one on every rank."""
        if self._gave_up is not None:
            raise CommTimeoutError(self._gave_up)
        record = self._channel.read(self._record)
        if record is not None:
            self._faults.raise_mismatch()
            core.raise_on_failure(record, timeout_s=self.config.timeout_s)

    def reset(self) -> None:
        # Nobody's kernels may still write when the flags are cleared, and nobody may start before
        # all have been: who cannot know whether they have been makes no call.
        self._gave_up = f"rank {self.config.rank}: a reset has not ended on all ranks, make another"
        torch.cuda.synchronize()
        memory.meet(self.config)
        self._clear_memory()
        torch.cuda.synchronize()
        if self._record == 0:
            self._channel.clear()
        self._faults.forget()
        memory.meet(self.config)
        self._gave_up = None

    def _clear_memory(self) -> None:
        """What a new call may find in this rank's memory."""
        self._memory.own[: self._layout.control_bytes].zero_()

    # --- launching ---------------------------------------------------------------------------

    def together(
        self,
        item: T,
        act: Callable[[list[T]], None],
        settings: Callable[[], object] = lambda: None,
    ) -> None:
        """Launch for all virtual ranks at once; for a rank of its own, for it alone.

        Args:
            item: what the launch needs of this rank.
            act: launches on the current stream, given the items by rank.
            settings: tells what one launch has only once, so that virtual ranks must agree on it.
        """
        self._order_streams()
        local = self.config.local
        if local is None:
            act([item])
            return

        def act_for_all(brought: list[tuple[T, torch.cuda.Stream, object]]) -> None:
            for rank, (_, _, others_settings) in enumerate(brought):
                if others_settings != brought[0][2]:
                    raise ValueError(
                        "expected the same dtype, fp8 and layout on all virtual ranks, got "
                        f"{brought[0][2]} at rank 0, {others_settings} at rank {rank}"
                    )
            # With async_op every rank has a side stream of its own.
            first = brought[0][1]
            others = {other for _, other, _ in brought} - {first}
            with torch.cuda.stream(first):
                for other in others:
                    first.wait_stream(other)
                act([one for one, _, _ in brought])
                for other in others:
                    other.wait_stream(first)

        local.together((item, torch.cuda.current_stream(), settings()), act_for_all)

    def _order_streams(self) -> None:
        """Order the current stream after everything that this transport has put on another one.

        Calls follow each other on the device in the order in which they are made: the flags of one
        could be taken for those of another. Replays of a graph are not seen here: who replays on
        one stream and calls on another orders the two.
        """
        last = self._last_stream
        if last is not None and last.cuda_stream == current_stream():
            return
        current = self._last_stream = torch.cuda.current_stream()
        # Both eager, or both in one capture: neither can wait for the other kind.
        if last is not None and _captures(last) == _captures(current):
            current.wait_stream(last)

    def check_device(self, name: str, tensor: Tensor) -> None:
        """Kernels read tensors where they are: on this rank's GPU."""
        device = self._device
        if tensor.device != device:
            raise ValueError(f"expected {name} on {device}, got {tensor.device}")
        if current_device() != device.index:
            raise ValueError(
                f"expected {device} as the current device, got cuda:{current_device()}"
            )

    def check_row_bytes(self, dtype: torch.dtype) -> None:
        """Refuse rows that are wider than the communication memory was sized for."""
        if dtype.itemsize > self.config.dtype.itemsize:
            raise ValueError(
                f"expected rows of at most {self.config.dtype.itemsize} bytes a value, as the "
                f"Buffer's dtype {self.config.dtype} has, got {dtype}"
            )

    def dispatch_input(
        self, x: Tensor | Quantized, weights: Tensor | None, fp8: bool, pow2_scales: bool
    ) -> kernel_calls.DispatchInput:
        """Check what a dispatch is given, and bring it into a form that kernels can read."""
        self.check_failure()
        self.check_device("x", x.values if isinstance(x, Quantized) else x)
        source = kernel_calls.dispatch_input(x, weights, fp8, pow2_scales)
        self.check_row_bytes(source.out_dtype)
        return source

    def combine_input(
        self,
        rows: Tensor,
        weights: Tensor | None,
        bias: Tensor | None,
        row_weights: Tensor | None,
    ) -> kernel_calls.CombineInput:
        """The same for a combine."""
        self.check_failure()
        self.check_device("rows", rows)
        self.check_row_bytes(rows.dtype)
        return kernel_calls.combine_input(rows, weights, bias, row_weights)

    # --- routing -----------------------------------------------------------------------------

    def route(self, topk_idx: Tensor, options: RouteOptions) -> PeerHandle:
        self.check_failure()
        self.check_device("topk_idx", topk_idx)
        if options.layout == "expert":
            self._check_alignment(options)
        topk_idx = rows_on_16_bytes(topk_idx)
        num_rows, sent, host_counts = options.max_recv_tokens, None, None
        found = self._handle_arrays(topk_idx, options)
        # A graph's route runs again and again, or never.
        captured = num_rows is not None and torch.cuda.is_current_stream_capturing()
        if not captured:
            self._tell_of_earlier_routes()
        kind = CAPTURED if captured else WATCHED if num_rows is None else UNWATCHED
        self._launch_route(topk_idx, options, found, kind)
        if not captured:
            self._faults.after_route()
        if num_rows is None:
            self._wait_for_report()
            self._faults.after_wait(options, topk_idx)
            reports = self._faults.reports
            num_rows = reports.num_rows(WATCHED)
            sent = reports.matrix(WATCHED, self.config.num_ranks)
            host_counts = reports.counts(WATCHED, self.config.num_local_experts)
            if options.layout == "token":
                found["topk_idx"] = found["topk_idx"][:num_rows]
        return PeerHandle(
            owner=self,
            layout=options.layout,
            alignment=options.alignment,
            rows_per_expert=options.rows_per_expert,
            zero_copy=options.zero_copy,
            num_tokens=topk_idx.shape[0],
            num_rows=num_rows,
            host_counts=host_counts,
            sent=sent,
            **found,
        )

    def _check_alignment(self, options: RouteOptions) -> None:
        """Offsets are int32, whatever the routing."""
        config = self.config
        most = config.num_ranks * config.max_tokens * config.top_k
        most += config.num_local_experts * (options.alignment - 1)
        if most > 2**31 - 1:
            raise ValueError(
                f"expected an alignment that gives at most 2^31 - 1 rows, got {options.alignment}, "
                f"which can give {most}"
            )

    def _handle_arrays(self, topk_idx: Tensor, options: RouteOptions) -> dict[str, Any]:
        """Fields of a handle: uninitialised memory for what the route kernel finds out.

        What users see is in tensors of its own, all that only kernels read is in one.
        """
        config, layout, num_tokens = self.config, self._layout, topk_idx.shape[0]
        row_layout, _ = options.setting
        kind = self.core.HandleArrays
        num_bytes = kind.bytes(layout, num_tokens, row_layout, self.moves_parts)
        memory = topk_idx.new_empty(num_bytes // 8)
        counts = topk_idx.new_empty(config.num_local_experts)
        topk_local = offsets = None
        if options.layout == "expert":
            offsets = topk_idx.new_empty(config.num_local_experts, dtype=torch.int32)
        else:
            most_rows = options.max_recv_tokens
            if most_rows is None:
                most_rows = config.num_ranks * config.max_tokens
            topk_local = topk_idx.new_empty((most_rows, config.top_k))
        arrays = kind(
            layout,
            config.rank,
            num_tokens,
            row_layout,
            self.moves_parts,
            memory.data_ptr(),
            address(topk_local),
            counts.data_ptr(),
            address(offsets),
        )
        return {
            "arrays": arrays,
            "memory": memory,
            "counts": counts,
            "topk_idx": topk_local,
            "offsets": offsets,
        }

    def _launch_route(
        self, topk_idx: Tensor, options: RouteOptions, found: dict[str, Any], kind: int
    ) -> None:
        bound, room = options.limit, options.max_recv_tokens
        if bound is None:
            bound = -1
            self._faults.reports.expect(kind)
            # How many rows the expert layout will have is not known yet; none is left out.
            room = 2**31 - 1 if found["topk_idx"] is None else found["topk_idx"].shape[0]
        _, unit = options.setting
        call = found["arrays"].route_call(
            unit,
            bound,
            options.zero_copy,
            self.delays_ns[0],
            topk_idx.data_ptr(),
            room,
            self._faults.reports,
            kind,
        )
        self.together(call, self._route_together)

    def _route_together(self, calls: list[Any]) -> None:
        self.core.route(self.comm, calls, self.num_sms, current_stream())

    @property
    def _host_limit_s(self) -> float:
        return 2 * self.config.timeout_s + _HOST_MARGIN_S

    def _wait_for_report(self) -> None:
        limit_s = self._host_limit_s
        reports = self._faults.reports
        if reports.wait(WATCHED, self._channel, self._record, int(limit_s * 1e9)):
            return
        self.check_failure()
        # The answer may still come, and would be taken for that of a later route.
        self._gave_up = (
            f"rank {self.config.rank}, dispatch (counts): expected the device to answer within "
            f"{limit_s:g} s"
        )
        raise CommTimeoutError(self._gave_up)

    def _tell_of_earlier_routes(self) -> None:
        try:
            self._faults.before_route(self._host_limit_s)
        except CommTimeoutError as error:  # others may have gone on
            self._gave_up = str(error)
            raise

    # --- rows that stay in the communication buffer --------------------------------------------

    def take_slab(self, num_rows: int, dtype: torch.dtype, num_scales: int) -> SlabRows | None:
        """Rows of a free slab, if there is one; it is free again when they are gone."""
        if num_rows > self.config.num_ranks * self.config.max_tokens:
            return None
        return self._slabs.take(num_rows, self.config.hidden, dtype, num_scales)


def _captures(stream: torch.cuda.Stream) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()
