"""Runs of ``dualpipe bench ep`` with transports that are wrong, raise, or need no process group.

They are module-level functions, because ranks are processes: each puts its transport in the place
of the collective one, in the process it runs in, and measures.
"""

from __future__ import annotations

from unittest.mock import patch

import torch

from dualpipe_ext.bench import ep_run
from dualpipe_ext.bench.ep_cases import EpOptions, select_cases, wire_rows
from dualpipe_ext.bench.ep_push import slots
from dualpipe_ext.bench.ep_result import EpRow
from dualpipe_ext.bench.ep_variants import Prepared, Runner
from dualpipe_ext.bench.ranks import Ranks
from dualpipe_ext.ep import reference, registry
from dualpipe_ext.ep.collective import CollectiveTransport
from dualpipe_ext.ep.handle import Handle
from dualpipe_ext.ep.transport import Capabilities, Rows, Transport

SMALL = {
    "tokens": 6,
    "hidden": 128,
    "experts": 4,
    "top_k": 2,
    "transports": ("collective", "gloo"),
    "sms": (8,),
    "rounds": 2,
    "calls": 2,
    "gemm": True,
}


def small(what: str | None = None, **changes: object) -> EpOptions:
    cases = select_cases(None if what is None else what.split(","))
    return EpOptions(**{**SMALL, "cases": cases, **changes})


class FlippedBit(CollectiveTransport):
    """The last rank receives one bit of an expert-major token wrong, and combines one too much."""

    def dispatch(self, x, topk_weights, handle, **options):
        rows = super().dispatch(x, topk_weights, handle, **options)
        if self.config.rank == self.config.num_ranks - 1 and handle.layout == "expert":
            rows.tokens.view(torch.uint8)[1, 3] ^= 1
        return rows

    def combine(self, rows, handle, **options):
        y, weights = super().combine(rows, handle, **options)
        if handle.layout == "expert" and self.config.rank == 0:
            y[2, 5] += y[2].abs().max()
        return y, weights


class NamedNVLink(CollectiveTransport):
    """Takes SMs, as far as anybody asks."""

    name = "nvlink"


class InMemoryPush(Runner):
    """In the place of ``PushRunner``: what a plain push would leave, without one.

    With one SM too many, a bit of the last rank's FP8 rows is wrong.
    """

    def __init__(self, variant, options, inputs, ranks):
        self.variant, self.options, self.inputs, self.ranks = variant, options, inputs, ranks

    def supports(self, case):
        return case.op == "push"

    def prepare(self, case, num_rows):
        source = wire_rows(self.inputs.all_quantised if case.fp8 else self.inputs.all_x)
        places = slots(
            self.inputs.all_idx,
            self.ranks.num_ranks,
            self.options.experts // self.ranks.num_ranks,
        )[:, self.ranks.rank]
        places.view(self.ranks.num_ranks, -1)[self.ranks.rank] = -1
        rows = torch.zeros_like(source)
        rows[places[places >= 0].long()] = source[places >= 0]
        last = self.ranks.rank == self.ranks.num_ranks - 1
        if case.fp8 and last and self.variant.num_sms == 9:
            rows[0, 0] ^= 1
        return Prepared(lambda: rows, note="as asked")


class Raises(CollectiveTransport):
    """Cached dispatches of BF16 raise on rank 1."""

    def dispatch(self, x, topk_weights, handle, *, fp8=False, pow2_scales=False):
        rows = super().dispatch(x, topk_weights, handle, fp8=fp8, pow2_scales=pow2_scales)
        if not fp8 and self.config.rank == 1:
            raise RuntimeError("no more\n rows")
        return rows


class InMemory(Transport):
    """Virtual ranks on the CPU: the reference, on what all threads bring."""

    name = "in_memory"
    capabilities = Capabilities(dtypes=CollectiveTransport.capabilities.dtypes, syncs_host=True)

    @classmethod
    def unavailable(cls, config):
        return None

    def route(self, topk_idx, options):
        every_idx = self.config.local.gather(topk_idx)
        how = {
            "num_experts": self.config.num_experts,
            "layout": options.layout,
            "alignment": options.alignment,
        }
        bound = options.max_recv_tokens
        xs = [torch.zeros(len(idx), 1) for idx in every_idx]
        mine = reference.dispatch(xs, every_idx, max_recv_tokens=bound, **how)[self.config.rank]
        handle = Handle(
            owner=self,
            layout=options.layout,
            alignment=options.alignment,
            num_tokens=len(topk_idx),
            num_rows=len(mine.tokens),
            topk_idx=getattr(mine, "topk_idx", None),
            offsets=getattr(mine, "offsets", None),
            counts=mine.counts,
        )
        self.known = getattr(self, "known", {}) | {id(handle): (every_idx, how, bound)}
        return handle

    def dispatch(self, x, topk_weights, handle, *, fp8=False, pow2_scales=False):
        every_idx, how, bound = self.known[id(handle)]
        x = x if torch.is_tensor(x) else x.values.float() * x.scales.repeat_interleave(128, 1)
        xs, weights = zip(*self.config.local.gather((x, topk_weights)), strict=True)
        every = reference.dispatch(
            xs,
            every_idx,
            None if topk_weights is None else weights,
            max_recv_tokens=bound,
            fp8=fp8,
            pow2_scales=pow2_scales,
            **how,
        )
        mine = every[self.config.rank]
        weights = getattr(mine, "weights", getattr(mine, "topk_weights", None))
        return Rows(mine.tokens, mine.scales, weights)

    def combine(self, rows, handle, *, weights=None, bias=None, row_weights=None):
        every_idx, how, _ = self.known[id(handle)]
        every_rows = self.config.local.gather(rows)
        return reference.combine(every_rows, every_idx, **how)[self.config.rank], None


def run_with_flipped_bit(ranks: Ranks, options: EpOptions) -> list[EpRow]:
    with patch.object(registry, "_TRANSPORTS", (FlippedBit,)):
        return ep_run.run(ranks, options)


def run_with_push(ranks: Ranks, options: EpOptions) -> list[EpRow]:
    with (
        patch.object(registry, "_TRANSPORTS", (NamedNVLink,)),
        patch.object(ep_run, "PushRunner", InMemoryPush),
    ):
        return ep_run.run(ranks, options)


def run_that_raises(ranks: Ranks, options: EpOptions) -> list[EpRow]:
    with patch.object(registry, "_TRANSPORTS", (Raises,)):
        return ep_run.run(ranks, options)


def run_everything(
    ranks: Ranks, options: EpOptions, with_push: EpOptions
) -> tuple[list[list[EpRow]], list[str]]:
    """Good, wrong and raising transports, one after the other: starting ranks is most of the time.

    Returns the rows of the three and of a run beside plain pushes, and what every rank's rows of
    the first look like.
    """
    good = ep_run.run(ranks, options)
    told = ranks.gather_object(repr(good))
    flipped, raising = run_with_flipped_bit(ranks, options), run_that_raises(ranks, options)
    return [good, flipped, raising, run_with_push(ranks, with_push)], told
