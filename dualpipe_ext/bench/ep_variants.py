"""The ways to move rows that are compared, each behind the same few methods.

What belongs here: the contract of a variant, and the variants that are a ``Buffer``. Baselines are
in ``ep_baseline.py`` and ``ep_push.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from dualpipe_ext.bench.ep_cases import Case, EpOptions, Inputs
from dualpipe_ext.bench.ranks import Ranks
from dualpipe_ext.bench.timing import Call
from dualpipe_ext.ep import Buffer

# Their kernels move the rows, with as many SMs as they are given.
_TAKES_SMS = ("nvlink", "low_latency")
_ZERO_COPY = ("nvlink",)
_NEEDS_PROCESSES = ("collective",)
# Their cached calls wait for nothing on the host.
_CAPTURABLE = ("nvlink", "copy_engine", "low_latency")
BASELINES = ("nccl", "gloo")
TRANSPORTS = ("nvlink", "copy_engine", "low_latency", "collective", *BASELINES)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to move rows."""

    transport: str
    """Name of a Buffer's transport, or a baseline: "nccl-per-expert", "nccl-per-rank", ..."""
    num_sms: int | None = None
    """SMs asked for; None where there is nothing to ask."""

    @property
    def label(self) -> str:
        return self.transport if self.num_sms is None else f"{self.transport} {self.num_sms} SMs"

    @property
    def nominal_sms(self) -> int | None:
        """SMs that rows in flight take: none for the copy engines; None if not known."""
        return 0 if self.transport == "copy_engine" else self.num_sms


def variants(options: EpOptions) -> list[Variant]:
    """Everything that the options ask to compare."""
    found: list[Variant] = []
    for name in options.transports:
        if name in _TAKES_SMS:
            found += [Variant(name, count) for count in options.sms]
        elif name in BASELINES:
            found += [Variant(f"{name}-per-expert"), Variant(f"{name}-per-rank")]
        else:
            found.append(Variant(name))
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """The calls of one case, ready to be made over and over. A dispatch returns what it received,
    a combine the tokens, a push the rows that came."""

    cached: Call
    """The routing is known: with a handle."""
    uncached: Call | None = None
    """Dispatch: routing included."""
    rows: Tensor | None = None
    """What a combine sums."""
    note: str = ""
    """What its row should tell."""


class Runner(ABC):
    """A variant at work. Made and used by all ranks together; dropped to free its memory."""

    capturable = False
    """Whether its cached calls can be tried in a CUDA graph."""
    row_per_expert = False
    """A token crosses once per expert, not once per rank."""

    @abstractmethod
    def supports(self, case: Case) -> bool:
        """Whether it has anything to measure for the case."""

    @abstractmethod
    def prepare(self, case: Case, num_rows: int) -> Prepared:
        """Get ready for one case.

        Args:
            case: what to do.
            num_rows: the most rows that arrive at any rank; bounds the output.
        """

    def finish(self) -> None:  # noqa: B027 - most have nothing to report
        """Wait for all calls made; raise what went wrong in them."""


class BufferRunner(Runner):
    """A ``Buffer`` as a model would use it, routing weights included."""

    def __init__(self, variant: Variant, options: EpOptions, inputs: Inputs, ranks: Ranks) -> None:
        if ranks.local is not None and variant.transport in _NEEDS_PROCESSES:
            raise ValueError(
                f"expected a process per rank for {variant.transport}, got virtual ranks"
            )
        self._inputs, self._ranks = inputs, ranks
        self._buffer = Buffer(
            local=ranks.local,
            hidden=options.hidden,
            num_experts=options.experts,
            top_k=options.top_k,
            max_tokens=options.tokens,
            transport=variant.transport,
            num_sms=variant.num_sms,
            # Every graph keeps the slab that its calls write into.
            num_slabs=1 + sum(case.zero_copy for case in options.cases),
            timeout_s=options.timeout_s,
        )
        # Virtual ranks share a stream: no thread could capture the others' calls.
        self.capturable = variant.transport in _CAPTURABLE and ranks.local is None

    def supports(self, case: Case) -> bool:
        if case.op == "push":
            return False
        return not case.zero_copy or self._buffer.transport in _ZERO_COPY

    def prepare(self, case: Case, num_rows: int) -> Prepared:
        buffer, inputs = self._buffer, self._inputs
        how = {"layout": case.layout, "alignment": case.alignment, "zero_copy": case.zero_copy}
        routing = {"topk_idx": inputs.topk_idx, "max_recv_tokens": num_rows, **how}
        if case.op == "combine":
            recv, handle = buffer.dispatch(inputs.x, **routing)
            rows = random_rows(len(recv.tokens), inputs.x, self._ranks.rank)
            return Prepared(lambda: buffer.combine(rows, handle)[0], rows=rows)
        x = tuple(inputs.quantised) if case.quantised else inputs.x
        weights = inputs.topk_weights

        def uncached() -> object:
            return buffer.dispatch(x, topk_weights=weights, fp8=case.fp8, **routing)[0]

        recv, handle = buffer.dispatch(x, topk_weights=weights, fp8=case.fp8, **routing)
        if buffer.holds(recv.tokens) != case.zero_copy:
            raise RuntimeError("expected rows in the communication buffer, and only if asked for")
        del recv
        return Prepared(
            lambda: buffer.dispatch(x, topk_weights=weights, fp8=case.fp8, handle=handle)[0],
            uncached,
        )

    def finish(self) -> None:
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize()
        self._buffer.check()


def random_rows(num_rows: int, like: Tensor, rank: int) -> Tensor:
    """Expert outputs [num_rows, H] that differ from rank to rank."""
    generator = torch.Generator(like.device).manual_seed(7919 + rank)
    rows = torch.empty(num_rows, like.shape[1], dtype=like.dtype, device=like.device)
    return rows.normal_(generator=generator)
