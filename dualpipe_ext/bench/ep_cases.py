"""What ``dualpipe bench ep`` measures: the cases, the options of a run, and its inputs.

Shapes: R ranks, T tokens of a rank, H hidden, E experts, K top-k, N token rows, M expert rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dualpipe_ext.bench.ranks import Ranks
from dualpipe_ext.ep import Quantized, quantize
from dualpipe_ext.ep.fp8 import BLOCK
from dualpipe_ext.ep.handle import Layout

ALIGNMENT = 128
"""Rows that expert groups are padded to in the aligned cases: a tile of grouped GEMMs."""


@dataclass(frozen=True, slots=True)
class Case:
    """One question: how long does this call take?"""

    name: str
    op: str
    """dispatch or combine; push for the rows of a dispatch alone."""
    layout: Layout
    fp8: bool = False
    quantised: bool = False
    """The input is FP8 already."""
    zero_copy: bool = False
    """Rows stay in the communication buffer."""
    alignment: int = 1
    beside_gemm: bool = False
    """Also measured beside a GEMM."""


CASES: tuple[Case, ...] = (
    Case("dispatch-bf16-buffer", "dispatch", "token", zero_copy=True, beside_gemm=True),
    Case("dispatch-bf16-token", "dispatch", "token", beside_gemm=True),
    Case("dispatch-bf16-expert", "dispatch", "expert"),
    Case("dispatch-bf16-expert128", "dispatch", "expert", alignment=ALIGNMENT),
    Case("dispatch-fp8-buffer", "dispatch", "token", fp8=True, zero_copy=True),
    Case("dispatch-fp8-token", "dispatch", "token", fp8=True),
    Case("dispatch-fp8-expert", "dispatch", "expert", fp8=True),
    Case("dispatch-fp8-expert128", "dispatch", "expert", fp8=True, alignment=ALIGNMENT),
    Case("dispatch-quantised-token", "dispatch", "token", fp8=True, quantised=True),
    Case("combine-token", "combine", "token", beside_gemm=True),
    Case("combine-expert", "combine", "expert"),
    Case("combine-expert128", "combine", "expert", alignment=ALIGNMENT),
)

PUSH_BF16 = Case("push-bf16", "push", "token")
PUSH_FP8 = Case("push-fp8", "push", "token", fp8=True, quantised=True)


def push_case(case: Case) -> Case:
    """The plain push that moves the rows of ``case`` and nothing else; of a combine, their way."""
    return PUSH_FP8 if case.fp8 else PUSH_BF16


def push_cases(cases: Sequence[Case]) -> tuple[Case, ...]:
    """The plain pushes that ``cases`` compare with.

    >>> [case.name for case in push_cases(CASES)]
    ['push-bf16', 'push-fp8']
    """
    return tuple(dict.fromkeys(map(push_case, cases)))


def select_cases(words: Sequence[str] | None) -> tuple[Case, ...]:
    """The cases whose names are, or begin with, one of the words; all of them for None.

    >>> [case.name for case in select_cases(["combine"])]
    ['combine-token', 'combine-expert', 'combine-expert128']
    """
    if words is None:
        return CASES
    chosen: set[str] = set()
    for word in words:
        found = {c.name for c in CASES if c.name == word or c.name.startswith(f"{word}-")}
        if not found:
            names = ", ".join(["dispatch", "combine", *(case.name for case in CASES)])
            raise ValueError(f"expected --what of {names}, got {word!r}")
        chosen |= found
    return tuple(case for case in CASES if case.name in chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpOptions:
    """A run of the benchmark; equal on all ranks, checked by :meth:`checked`."""

    tokens: int
    """T, the same on every rank."""
    hidden: int
    experts: int
    top_k: int
    transports: tuple[str, ...]
    """What to compare: names of Buffer's transports, and the baselines "nccl" or "gloo"."""
    sms: tuple[int, ...]
    """SM counts of the transports whose kernels move the rows."""
    rounds: int
    calls: int
    cases: tuple[Case, ...]
    gemm: bool
    """Measure beside a GEMM too."""
    seed: int = 0
    timeout_s: float = 20.0
    """Longest wait of a measured call for another rank."""

    def checked(self, num_ranks: int) -> EpOptions:
        """Itself, or ``ValueError`` naming the option of the command that cannot be."""
        for name in ("tokens", "hidden", "experts", "top_k", "rounds", "calls"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"expected --{name.replace('_', '-')} of at least 1, got {getattr(self, name)}"
                )
        if self.experts % num_ranks:
            raise ValueError(
                f"expected --experts to be a multiple of {num_ranks} ranks, got {self.experts}"
            )
        if self.top_k > self.experts:
            raise ValueError(f"expected --top-k of at most {self.experts}, got {self.top_k}")
        if any(case.fp8 for case in self.cases) and self.hidden % BLOCK:
            raise ValueError(
                f"expected --hidden to be a multiple of {BLOCK} for FP8, got {self.hidden}; "
                "--what dispatch-bf16,combine leaves FP8 out"
            )
        if self.hidden % 8:
            raise ValueError(f"expected --hidden to be a multiple of 8, got {self.hidden}")
        if any(count < 1 for count in self.sms):
            raise ValueError(f"expected --sms of at least 1, got {min(self.sms)}")
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What one rank dispatches, and every rank's share of it for the checks."""

    x: Tensor
    """bfloat16 [T, H]"""
    quantised: Quantized | None
    """``x`` as FP8; None if no case needs it."""
    topk_idx: Tensor
    """int64 [T, K]: K distinct experts for every token, all equally likely."""
    topk_weights: Tensor
    """float32 [T, K]"""
    all_x: Tensor
    """bfloat16 [R * T, H], by rank."""
    all_quantised: Quantized | None
    all_idx: Tensor
    """int64 [R * T, K]"""
    all_weights: Tensor


def make_inputs(options: EpOptions, ranks: Ranks) -> Inputs:
    """Draw this rank's inputs and gather those of all ranks."""
    generator = torch.Generator(ranks.device).manual_seed(1000 * options.seed + ranks.rank)
    drawn = {"generator": generator, "device": ranks.device}
    x = torch.randn(options.tokens, options.hidden, **drawn).to(torch.bfloat16)
    scores = torch.rand(options.tokens, options.experts, **drawn)
    topk_idx = scores.topk(options.top_k, dim=1).indices
    topk_weights = torch.rand(options.tokens, options.top_k, **drawn)
    quantised = all_quantised = None
    if any(case.fp8 for case in options.cases):
        quantised = quantize(x)
        values = torch.cat(ranks.gather(quantised.values.view(torch.uint8)))
        scales = torch.cat(ranks.gather(quantised.scales))
        all_quantised = Quantized(values.view(torch.float8_e4m3fn), scales)
    return Inputs(
        x=x,
        quantised=quantised,
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        all_x=torch.cat(ranks.gather(x)),
        all_quantised=all_quantised,
        all_idx=torch.cat(ranks.gather(topk_idx)),
        all_weights=torch.cat(ranks.gather(topk_weights)),
    )


def row_bytes(hidden: int, fp8: bool) -> int:
    """Bytes of a row that moves: BF16 values, or FP8 values with their float32 scales."""
    return hidden + 4 * (hidden // BLOCK) if fp8 else 2 * hidden


def wire_rows(rows: Tensor | Quantized) -> Tensor:
    """What crosses the link of each row: its values, and behind FP8 values their scales.

    Returns:
        uint8 [N, B]; whole 16 bytes, the unit of bulk copies, with zeros behind them.
    """
    if isinstance(rows, Quantized):
        parts = [rows.values.view(torch.uint8), rows.scales.contiguous().view(torch.uint8)]
    else:
        parts = [rows.view(torch.uint8)]
    size = sum(part.shape[1] for part in parts)
    return torch.cat([*parts, parts[0].new_zeros(len(parts[0]), -size % 16)], dim=1)
