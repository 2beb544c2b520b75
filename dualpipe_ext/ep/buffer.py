"""``Buffer``: the one object through which a model sends tokens to experts and back.

It checks arguments, picks the transport, and hands over to autograd; it moves nothing itself.

Shapes: T tokens of this rank, H hidden, E experts, R ranks, K top-k, N received token rows,
M expert rows. Expert e lives on rank ``e // (E / R)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext.agreement import group_size_and_rank
from dualpipe_ext.ep import autograd, ops, switching, validate
from dualpipe_ext.ep.event import CommStream, Event
from dualpipe_ext.ep.handle import ExpertMajor, Handle, Layout, TokenMajor, received
from dualpipe_ext.ep.local_ranks import LocalRank
from dualpipe_ext.ep.registry import create_transport
from dualpipe_ext.ep.tickets import make_ticket
from dualpipe_ext.ep.transport import RouteOptions, Transport, TransportConfig


class Buffer:
    """Expert-parallel dispatch and combine over the ranks of a process group.

    Every rank of the group makes the same calls in the same order, with any number of tokens each
    (0 too). Results are deterministic: same inputs, same bits. One buffer serves all layers.

    ``torch.compile`` takes dispatch and combine into its graphs, as ops that it neither drops nor
    reorders. Compiled calls run on the current stream, whatever ``async_op`` says. Without
    ``max_recv_tokens`` or ``rows_per_expert`` the number of rows is known only when they come:
    Dynamo breaks the graph there, or with ``fullgraph=True`` makes it a symbol. A checkpoint inside
    compiled code must not recompute communication, see
    :func:`~dualpipe_ext.ep.ops.save_communication`.

    Args:
        group: process group of the expert-parallel ranks; None is the default group, or one rank if
            torch.distributed is not initialised.
        hidden: H. A row must be a multiple of 16 bytes.
        num_experts: E, over all ranks; a multiple of R.
        top_k: K, at most 32.
        max_tokens: largest T of any call. A rank that has more raises alone, and the others wait
            for it until ``timeout_s`` is over.
        dtype: widest dtype of rows; communication memory is sized for it (:attr:`memory_bytes`).
        transport: "auto" (the environment variable ``DUALPIPE_TRANSPORT`` if set, else the best
            available), a name, or several, of which the first that is available counts.
        num_sms: SMs that a communication kernel may take; 0 asks "auto" for the copy engines;
            ignored by transports that have no kernels. :meth:`use_sms` changes it.
        num_slabs: zero-copy outputs that can be alive at once (:meth:`dispatch`).
        timeout_s: longest wait for another rank, in seconds.
        local: place of this thread among virtual ranks of one process
            (:class:`~dualpipe_ext.ep.local_ranks.LocalRanks`) instead of ``group``.

    Raises:
        ValueError: an argument no transport can work with, a group that this rank is not in, or a
            transport not available here.

    Example, one rank with two experts (R=1, T=2, H=4, K=2):

    >>> buffer = Buffer(hidden=4, num_experts=2, top_k=2, max_tokens=8)
    >>> x = torch.tensor([[1.0] * 4, [2.0] * 4])
    >>> recv, handle = buffer.dispatch(x, torch.tensor([[1, -1], [0, 1]]), layout="expert")
    >>> recv.tokens[:, 0].tolist(), recv.offsets.tolist()
    ([2.0, 1.0, 2.0], [1, 3])
    >>> y, event = buffer.combine(recv.tokens * 10, handle)
    >>> y[:, 0].tolist()
    [10.0, 40.0]
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        hidden: int,
        num_experts: int,
        top_k: int,
        max_tokens: int,
        dtype: torch.dtype = torch.bfloat16,
        transport: str | Sequence[str] = "auto",
        num_sms: int | None = None,
        num_slabs: int = 1,
        timeout_s: float = 30.0,
        local: LocalRank | None = None,
    ) -> None:
        rank, num_ranks, group = _place(group, local)
        self.config = TransportConfig(
            group=group,
            local=local,
            rank=rank,
            num_ranks=num_ranks,
            dtype=dtype,
            num_slabs=num_slabs,
            hidden=hidden,
            num_experts=num_experts,
            top_k=top_k,
            max_tokens=max_tokens,
            num_sms=num_sms,
            timeout_s=timeout_s,
        )
        self._transport = create_transport(transport, self.config)
        self._kernels = switching.kernels_of(self._transport)
        self._ticket = make_ticket(self._transport)
        # Others that have been in use, by name.
        self._others: dict[str, Transport] = {}
        self._comm_stream = CommStream()

    @property
    def transport(self) -> str:
        """Name of the transport in use."""
        return self._transport.name

    @property
    def num_sms(self) -> int | None:
        """SMs that carry rows to other GPUs: 0 with the copy engines, None with "collective"."""
        return self._transport.comm_sms

    def cannot_use_sms(self, num_sms: int) -> str | None:
        """Why :meth:`use_sms` is not possible now, in one line; None if it is.

        Called on all ranks, which get the same answer.
        """
        if self.num_sms is None:
            return f"transport {self.transport!r} takes no SMs of its own"
        kind = switching.transport_for(num_sms, self._kernels)
        if kind.name == self.transport or kind.name in self._others:
            return None
        return switching.obstacle(kind, num_sms, self.config)

    def use_sms(self, num_sms: int) -> None:
        """Carry rows with so many SMs from now on, by the copy engines with 0.

        Called on all ranks, between two calls that are the same ones everywhere. From or to 0 this
        changes the transport: results have the same bits, but handles stay with the transport that
        made them. A backward uses the one of its forward; combines and cached dispatches of older
        handles are refused until the number is back. So change it where no handle is in use:
        between steps. The other transport keeps its memory until :meth:`forget_unused`.

        Raises:
            ValueError: this transport takes no SMs of its own, or the ranks cannot make the other;
                on a change of transport also what :meth:`check` tells.
        """
        validate.check_num_sms(num_sms)
        reason = self.cannot_use_sms(num_sms)
        if reason is not None:
            raise ValueError(f"expected num_sms that can be used here, got {num_sms}: {reason}")
        kind = switching.transport_for(num_sms, self._kernels)
        if kind.name != self.transport:
            # Nothing tells of this one's calls later.
            self._transport.settle()
            # Made first: if it cannot be, everything stays as it was.
            other = self._others.get(kind.name) or kind(switching.config_for(num_sms, self.config))
            self._others.pop(kind.name, None)
            self._others[self.transport] = self._transport
            self._transport = other
            self._ticket = make_ticket(self._transport)
        if isinstance(self._transport, switching.NVLinkTransport):
            self._transport.use_sms(num_sms)

    def forget_unused(self) -> None:
        """Give up the memory of transports that are not in use; live handles keep theirs.

        A CUDA graph holds addresses of that memory, and of the handle of a cached dispatch, and
        keeps neither alive: as long as it is replayed, keep the Buffer and the handles of the calls
        in it, across this and :meth:`use_sms` too.
        """
        self._others.clear()

    @property
    def memory_bytes(self) -> int:
        """Communication memory that this rank holds on its device."""
        return sum(transport.memory_bytes for transport in self._transports)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in this rank's communication memory, as zero-copy rows do."""
        return any(transport.holds(tensor) for transport in self._transports)

    @property
    def _transports(self) -> tuple[Transport, ...]:
        """The one in use, and the others."""
        return self._transport, *self._others.values()

    def check(self) -> None:
        """Raise what kernels have reported since the last call; does not wait for them.

        After ``torch.cuda.synchronize()`` it tells whether all calls so far went well. Every other
        call looks for time-outs; mistakes in the data of calls for which the host did not wait are
        told by a dispatch too, later, and the same one on every rank: one for which it waits, or
        one of fixed size 33 to 64 after the mistake (replays of graphs in between put it off).
        Without the wait ranks may be told here at different calls: who goes on then must not rely
        on the others.

        Raises:
            CommTimeoutError: a wait for another rank ended without it; see :meth:`reset`.
            ValueError: a dispatch with ``max_recv_tokens`` or ``rows_per_expert`` had ids out of
                range (those choices were dropped) or more rows than that (the rest was dropped), or
                ranks asked for different layouts. Also: a rank made another call, or sent other
                rows; see :meth:`reset` too.
        """
        for transport in self._transports:
            transport.check()

    def reset(self) -> None:
        """Make the buffer usable again after a ``CommTimeoutError``, or where an error says so;
        called on all ranks.

        Handles and outputs of calls since the last clean :meth:`check` may be incomplete: drop
        them.
        """
        for transport in self._transports:
            transport.reset()

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        layout: Layout | None = None,
        fp8: bool = False,
        pow2_scales: bool = False,
        alignment: int | None = None,
        async_op: bool = False,
        handle: Handle | None = None,
        max_recv_tokens: int | None = None,
        rows_per_expert: int | None = None,
        zero_copy: bool | None = None,
    ) -> tuple[TokenMajor | ExpertMajor, Handle]:
        """Send tokens to the ranks of their experts.

        Args:
            x: [T, H] bfloat16, float16, float32 or float64, any strides; with ``fp8`` also
                ``(values, scales)`` as :func:`~dualpipe_ext.ep.fp8.quantize` makes them.
            topk_idx: int64 [T, K], expert ids, -1 for a choice that is dropped.
            topk_weights: float32 [T, K], or float64 with a Buffer of ``dtype`` float64; on all
                ranks or on none.
            layout: "token" (default): one row per token that has an expert here,
                :class:`TokenMajor`; "expert": one row per (token, expert), :class:`ExpertMajor`.
            fp8: rows travel and arrive as float8_e4m3fn with 1x128 scales. The gradient passes the
                quantisation by, and travels unquantised (``recv.dequantize()``).
            pow2_scales: FP8 scales are powers of two.
            alignment: expert layout: rows of each expert are padded to a multiple of it, default 1.
            async_op: CUDA: run on a side stream; the output is usable after ``recv.event.wait()``.
            handle: repeat the routing of an earlier dispatch: ``topk_idx``, ``layout``,
                ``alignment``, ``max_recv_tokens``, ``rows_per_expert`` and ``zero_copy`` are its
                own.
            max_recv_tokens: give the output this fixed number of rows, in either layout, the unused
                ones zero. On the GPU transports the host then waits for nothing, and
                the call can be captured in a CUDA graph.
            rows_per_expert: expert layout: give every expert a group of so many rows, the unused
                ones **not written**, for GEMMs that are told the counts (:class:`ExpertMajor`).
                The host waits for nothing, as with ``max_recv_tokens``, of which, and of
                ``alignment``, it takes the place. R x ``max_tokens`` is enough unless tokens
                name an expert twice.
            zero_copy: token layout: leave the rows where they arrive. ``recv.tokens`` is then a
                view of one of the buffer's ``num_slabs`` slabs, which is taken until the last
                tensor that shares its storage is gone; while none is free, rows are copied into a
                tensor of their own. A transport without such memory ignores it.

        Returns:
            The received rows, and the handle that :meth:`combine` needs.

        Raises:
            ValueError: wrong arguments. Ids out of range and more rows than ``max_recv_tokens`` or
                ``rows_per_expert`` raise on every rank, naming the one concerned; where the host
                waits for nothing, from :meth:`check` or a later dispatch, and rows without room are
                left out.
            CommTimeoutError: a rank did not take part.
        """
        x, scales = _split_quantized(x)
        self._check_dispatch(x, scales, topk_idx, topk_weights, fp8, handle)
        if handle is None:
            options = self._options(layout, alignment, max_recv_tokens, rows_per_expert, zero_copy)
            handle = self._route(topk_idx, options)
        else:
            asked = {"layout": layout, "alignment": alignment, "zero_copy": zero_copy}
            asked["rows_per_expert"] = rows_per_expert
            validate.check_same_route(handle, topk_idx, max_recv_tokens, asked)
        if torch.compiler.is_compiling():
            outputs = ops.dispatch(
                x, topk_weights, handle, scales=scales, fp8=fp8, pow2_scales=pow2_scales
            )
            return received(handle, outputs, Event()), handle
        own = ops.resolved(handle)
        call = autograd.DispatchCall(self._transport, own, fp8, pow2_scales, scales)
        with self._comm_stream.run(async_op, x):
            outputs = autograd.dispatch(x, topk_weights, call)
        inputs = x, scales, topk_weights
        event = self._comm_stream.event(async_op, own, inputs=inputs, outputs=outputs)
        return received(handle, outputs, event), handle

    def combine(
        self,
        rows: Tensor,
        handle: Handle,
        *,
        weights: Tensor | None = None,
        bias: Tensor | None = None,
        out: Tensor | None = None,
        async_op: bool = False,
    ) -> tuple[Tensor, Event]:
        """Bring expert outputs back to their tokens and sum them.

        A token's rows are summed on each rank that has some (expert layout: in top-k order, each
        times its weight, in float32, rounded once for the wire), then over the ranks in rank order
        in float32, the bias last, rounded once. float64 rows are summed in float64.

        Args:
            rows: one row per row of ``recv.tokens``, [N, H] or [M, H]; any dtype that
                :meth:`dispatch` takes. Padding rows are ignored.
            handle: what the dispatch returned.
            weights: expert layout: float32 (or float64) [M], usually ``recv.weights``.
            bias: [T, H] of the dtype of ``rows``, added to the result.
            out: the same, contiguous, from an address that is a multiple of 16: where ``y`` shall
                be. Only without gradients; it must not overlap what is read.
            async_op: CUDA: run on a side stream; ``y`` is usable after ``event.wait()``.

        Returns:
            ``y`` [T, H] in the dtype of ``rows``, zero (or the bias) for tokens without experts;
            and the event. With ``rows_per_expert`` the gradient of ``rows`` is written where there
            were rows, and nowhere else.

        Raises:
            ValueError: wrong arguments.
            CommTimeoutError: a rank did not take part.
        """
        transport = self._transport
        validate.check_combine(rows, handle, transport)
        validate.check_combine_extras(rows, handle, weights, bias)
        if out is not None:
            validate.check_out(out, rows, handle)
        if torch.compiler.is_compiling():
            y = ops.combine(rows, weights, bias, handle)
            return y if out is None else out.copy_(y), Event()
        own = ops.resolved(handle)
        with self._comm_stream.run(async_op, rows):
            if out is None:
                y = autograd.combine(rows, weights, bias, transport, own)
            else:
                y, _ = transport.combine(rows, own, weights=weights, bias=bias, out=out)
        inputs = rows, weights, bias, out
        return y, self._comm_stream.event(async_op, own, inputs=inputs, outputs=(y,))

    def combine_with_weights(
        self, rows: Tensor, row_weights: Tensor, handle: Handle, *, async_op: bool = False
    ) -> tuple[Tensor, Tensor, Event]:
        """:meth:`combine`, and with it a number for every choice: what undoes a dispatch of both.

        The backward of a dispatch is this, with gradients, for those who write their own. It is not
        differentiable itself.

        Args:
            rows: as :meth:`combine` takes them.
            row_weights: float32, or float64 with a Buffer of ``dtype`` float64; [N, K] in token
                layout, [M] in expert layout, like the weights that a dispatch gives. Entries of
                choices that are not here, and of padding, are ignored.
            handle: what the dispatch returned.
            async_op: as in :meth:`combine`.

        Returns:
            ``y`` [T, H]; the numbers at the choices they belong to, [T, K], 0 for dropped ones; and
            the event.

        Raises:
            ValueError: wrong arguments.
            CommTimeoutError: a rank did not take part.
        """
        transport = self._transport
        validate.check_combine(rows, handle, transport)
        validate.check_row_weights(row_weights, rows, handle, transport.config)
        if torch.compiler.is_compiling():
            top_k = transport.config.top_k
            with torch.no_grad():
                return *ops.combine_with_weights(rows, row_weights, handle, top_k), Event()
        own = ops.resolved(handle)
        with torch.no_grad(), self._comm_stream.run(async_op, rows):
            y, numbers = transport.combine(rows, own, row_weights=row_weights)
        assert numbers is not None
        inputs, outputs = (rows, row_weights), (y, numbers)
        return y, numbers, self._comm_stream.event(async_op, own, inputs=inputs, outputs=outputs)

    def dispatch_weights(
        self, topk_weights: Tensor, handle: Handle, *, async_op: bool = False
    ) -> tuple[Tensor, Event]:
        """Send the numbers of choices to where their rows are, after the rows.

        What ``recv.weights`` or ``recv.topk_weights`` would have been, had :meth:`dispatch` been
        given them, which takes no extra call: for code that knows weights only when it combines.
        Not differentiable.

        Args:
            topk_weights: float32 [T, K], or float64 with a Buffer of ``dtype`` float64.
            handle: what the dispatch returned.
            async_op: as in :meth:`dispatch`.

        Returns:
            [M] in expert layout, [N, K] in token layout; and the event.

        Raises:
            ValueError: wrong arguments.
            CommTimeoutError: a rank did not take part.
        """
        transport = self._transport
        validate.check_handle(handle, transport)
        device = handle.counts.device
        validate.check_topk_weights(topk_weights, handle.num_tokens, device, self.config)
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return ops.dispatch_weights(topk_weights, handle, transport), Event()
        own = ops.resolved(handle)
        with torch.no_grad(), self._comm_stream.run(async_op, topk_weights):
            rows = transport.narrowest_rows(handle.num_tokens, device)
            weights = transport.dispatch(rows, topk_weights, own).weights
        assert weights is not None
        inputs, outputs = (rows, topk_weights), (weights,)
        return weights, self._comm_stream.event(async_op, own, inputs=inputs, outputs=outputs)

    def _options(
        self,
        layout: Layout | None,
        alignment: int | None,
        max_recv_tokens: int | None,
        rows_per_expert: int | None,
        zero_copy: bool | None,
    ) -> RouteOptions:
        options = RouteOptions(
            layout="token" if layout is None else layout,
            alignment=1 if alignment is None else alignment,
            max_recv_tokens=max_recv_tokens,
            zero_copy=bool(zero_copy),
        )
        validate.check_options(options)
        if rows_per_expert is None:
            return options
        validate.check_rows_per_expert(rows_per_expert, options, self.config)
        num_rows = self.config.num_local_experts * rows_per_expert
        return replace(options, max_recv_tokens=num_rows, rows_per_expert=rows_per_expert)

    def _route(self, topk_idx: Tensor, options: RouteOptions) -> Handle:
        if torch.compiler.is_compiling():
            return ops.route(self._transport, self._ticket, topk_idx, options)
        validate.check_capture(topk_idx, options.max_recv_tokens, self._transport)
        return self._transport.route(topk_idx, options)

    def _check_dispatch(
        self,
        x: Tensor,
        scales: Tensor | None,
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        fp8: bool,
        handle: Handle | None,
    ) -> None:
        validate.check_x(x, scales, fp8, self._transport)
        num_tokens = x.shape[0]
        if handle is not None:
            validate.check_handle(handle, self._transport)
            if num_tokens != handle.num_tokens:
                raise ValueError(
                    f"expected x of the handle's {handle.num_tokens} rows, got {num_tokens}"
                )
        elif topk_idx is None:
            raise ValueError("expected topk_idx or handle, got neither")
        else:
            validate.check_topk_idx(topk_idx, num_tokens, x.device, self.config)
        if topk_weights is not None:
            validate.check_topk_weights(topk_weights, num_tokens, x.device, self.config)


def _split_quantized(x: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    if not isinstance(x, tuple):
        return x, None
    if len(x) != 2 or not all(isinstance(part, Tensor) for part in x):
        raise ValueError(f"expected x as a tensor or as (values, scales), got a tuple of {len(x)}")
    return x


def _place(
    group: dist.ProcessGroup | None, local: LocalRank | None
) -> tuple[int, int, dist.ProcessGroup | None]:
    """Rank, number of ranks and group; without either argument the default group, or one rank."""
    if local is not None:
        if group is not None:
            raise ValueError("expected group or local, got both")
        return local.rank, local.num_ranks, None
    num_ranks, rank = group_size_and_rank(group)
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    return rank, num_ranks, group
