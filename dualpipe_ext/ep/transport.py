"""The contract between ``Buffer`` and what moves the rows.

A transport moves tensors and knows nothing of autograd, streams or user mistakes that ``Buffer``
can see without looking at data. Semantics are those of ``dualpipe_ext.ep.reference``, bit for bit;
one test file (``tests/ep/test_transports.py``) holds every transport to it.

Shapes: T tokens of this rank, H hidden, E experts, R ranks, E/R experts per rank, K top-k,
N rows in token layout, M rows in expert layout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext.ep.fp8 import Quantized
from dualpipe_ext.ep.handle import Handle, Layout
from dualpipe_ext.ep.local_ranks import LocalRank
from dualpipe_ext.errors import DualPipeError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The ranks that share something; equal on all of them but for ``rank``."""

    group: dist.ProcessGroup | None
    """None: one rank, no process group needed; or virtual ranks, see ``local``."""
    rank: int
    num_ranks: int
    timeout_s: float
    local: LocalRank | None = None
    """This rank's place among virtual ranks of one process; None for a process per rank."""

    def gather(self, item: T) -> list[T]:
        """What every rank brought, by rank; the host waits for them."""
        if self.local is not None:
            return self.local.gather(item)
        if self.group is None or self.num_ranks == 1:
            return [item]
        everyone = [item] * self.num_ranks
        dist.all_gather_object(everyone, item, group=self.group)
        return everyone


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportConfig(Ranks):
    """What a ``Buffer`` was constructed with; equal on all ranks but for ``rank``."""

    hidden: int
    num_experts: int
    top_k: int
    max_tokens: int
    num_sms: int | None
    dtype: torch.dtype = torch.bfloat16
    """The widest row dtype: communication memory is sized for it."""
    num_slabs: int = 1
    """Zero-copy outputs that can be alive at once."""

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.num_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteOptions:
    """How the rows of a dispatch shall lie at this rank."""

    layout: Layout
    alignment: int
    max_recv_tokens: int | None
    """Rows of the output, fixed; None for as many as arrive."""
    zero_copy: bool = False
    """Token layout: leave the rows in the communication buffer if a slab of it is free."""
    rows_per_expert: int | None = None
    """Expert layout: groups of so many rows each, which are ``max_recv_tokens`` together."""

    @property
    def setting(self) -> tuple[str, int]:
        """What must be the same on all ranks, as ranks tell each other: one of ``ROW_LAYOUTS``, and
        what it rounds groups to."""
        if self.rows_per_expert is not None:
            return "groups", self.rows_per_expert
        return self.layout, self.alignment

    @property
    def limit(self) -> int | None:
        """Most rows, of this rank or of each of its groups."""
        return self.max_recv_tokens if self.rows_per_expert is None else self.rows_per_expert


ROW_LAYOUTS = ("token", "expert", "groups")
"""What rows can lie like; csrc/ep/row_layout.h says what each means."""


def describe_setting(row_layout: str, unit: int) -> str:
    """A :attr:`RouteOptions.setting` in words."""
    if row_layout == "groups":
        return f"'expert' and {unit} rows per expert"
    return f"{row_layout!r} and {unit}"


def describe_output(zero_copy: bool, fixed: bool) -> str:
    """The rest of what must be the same, to follow a setting in words."""
    rows = "a fixed number of rows" if fixed else "any number of rows"
    return f", {rows}" + (" with zero_copy" if zero_copy else "")


def settings_differ(rank: int, own: str, other: int, theirs: str) -> ValueError:
    """For two ranks that made different calls, whose settings are given in words."""
    return ValueError(
        f"expected the same layout and alignment on all ranks, got {own} at rank {rank}, {theirs} "
        f"at rank {other}"
    )


def too_many_rows(row_layout: str, limit: int, rank: int, count: int) -> ValueError:
    """For more rows than :attr:`RouteOptions.limit` of some rank."""
    if row_layout == "groups":
        return ValueError(
            f"expected at most rows_per_expert={limit} rows of each expert at rank {rank}, "
            f"got {count}"
        )
    return ValueError(f"expected at most max_recv_tokens={limit} rows at rank {rank}, got {count}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What callers must know before they call."""

    dtypes: frozenset[torch.dtype]
    """Row dtypes that dispatch and combine take."""
    syncs_host: bool
    """Whether ``route`` always waits for the device, so that it cannot be captured in a CUDA graph.
    If not, it does so only where ``max_recv_tokens`` is None, and with it mistakes that only the
    data shows are raised by :meth:`Transport.check` or by a later ``route``, the same one on every
    rank."""
    zero_copy: bool = False
    """Whether rows can be left in the communication buffer."""


class Rows(NamedTuple):
    """Rows as they lie at the receiver, in the handle's layout."""

    tokens: Tensor
    """[N or M, H]"""
    scales: Tensor | None
    """float32 [N or M, H/128] for FP8 tokens."""
    weights: Tensor | None
    """[N, K] in token layout, [M] in expert layout."""


class Transport(ABC):
    """Moves rows between the ranks of one group.

    Every method is called on all ranks, in the same order. A transport may produce the expert
    layout itself while rows arrive, or use the helpers in ``expand.py`` afterwards. Kernels wait
    ``config.timeout_s`` at most, which ends in ``CommTimeoutError``; waits over
    ``torch.distributed`` are bounded by the group's own time-out.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    least_row_bytes: ClassVar[int] = 16
    """Of the narrowest row that it moves."""

    def __init__(self, config: TransportConfig) -> None:
        self.config = config

    @classmethod
    @abstractmethod
    def unavailable(cls, config: TransportConfig) -> str | None:
        """Why this machine or group cannot use the transport, in one line; None if it can."""

    def narrowest_rows(self, num_tokens: int, device: torch.device) -> Tensor:
        """[T, ...] to go with weights that are dispatched for themselves."""
        dtype = self.config.dtype
        shape = (num_tokens, self.least_row_bytes // dtype.itemsize)
        return torch.zeros(shape, dtype=dtype, device=device)

    @property
    def memory_bytes(self) -> int:
        """Communication memory that this rank holds on its device."""
        return 0

    @property
    def comm_sms(self) -> int | None:
        """SMs that carry rows to other GPUs, 0 for copy engines; None where nobody can say."""
        return None

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in this rank's communication memory."""
        return False

    def check(self) -> None:  # noqa: B027 - most transports raise at once and have nothing kept
        """Raise what the device has reported since the last check; does not wait for it."""

    def settle(self) -> None:
        """The same of all calls so far; waits for them."""
        self.check()

    def reset(self) -> None:
        """Make the transport usable again after a time-out; called on all ranks.

        Raises:
            CommTimeoutError: not all ranks came.
            DualPipeError: this transport cannot; make a new group and buffer.
        """
        raise DualPipeError(f"transport {self.name!r} cannot be reset: make a new group and buffer")

    @abstractmethod
    def route(self, topk_idx: Tensor, options: RouteOptions) -> Handle:
        """Exchange counts and decide the place of every row; moves no token.

        Args:
            topk_idx: int64 [T, K], expert ids or -1, not yet checked against E.

        Raises:
            ValueError: on **every** rank, if any rank has an id out of range, routes to more rows
                than a rank's ``max_recv_tokens`` or ``rows_per_expert``, or was given another
                layout or alignment.
        """

    @abstractmethod
    def dispatch(
        self,
        x: Tensor | Quantized,
        topk_weights: Tensor | None,
        handle: Handle,
        *,
        fp8: bool = False,
        pow2_scales: bool = False,
    ) -> Rows:
        """Send each token's row to every rank that has one of its experts, once.

        Args:
            x: [T, H], any strides; or rows already quantised, which are sent as they are; or
                :meth:`narrowest_rows`.
            topk_weights: [T, K]; given on all ranks or on none.
            handle: from :meth:`route`, used for the first time or again.
            fp8: quantise the rows on the way (``x`` is a tensor).
        """

    @abstractmethod
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
        """Bring rows back and sum them per token, in a fixed order.

        Args:
            rows: [N, H] or [M, H], as the handle's layout says.
            weights: expert layout only, [M]: multiplies each row.
            bias: [T, H], added before the result is rounded.
            row_weights: numbers that belong to single choices, [N, K] or [M], to be returned to
                them (the gradients of the weights that were dispatched); entries of choices that
                are not here, and of padding, are ignored.
            out: [T, H] in the dtype of ``rows``, contiguous on 16 bytes: where the sums shall be.

        Returns:
            [T, H] in the dtype of ``rows``, ``out`` if given; and ``row_weights`` as [T, K], 0 for
            dropped choices.
        """
