"""``dualpipe bench ep`` on one rank: check, then time, every case with every variant.

Two passes over the variants: times first, with a Buffer at a time; then, with Buffers made again,
SM time from the profiler, so that it cannot disturb a time. Within a variant the rounds of all its
cases are interleaved. Whatever a variant raises becomes a row, and the run goes on.

Shapes: R ranks, T tokens of a rank, H hidden, E experts, K top-k.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from dualpipe_ext.bench import ep_check, timing
from dualpipe_ext.bench.beside_gemm import GemmBeside
from dualpipe_ext.bench.ep_baseline import AllToAllRunner, peer_copy
from dualpipe_ext.bench.ep_cases import (
    Case,
    EpOptions,
    make_inputs,
    push_case,
    push_cases,
    row_bytes,
)
from dualpipe_ext.bench.ep_check import Placement
from dualpipe_ext.bench.ep_push import PUSH, PushRunner, with_pushes
from dualpipe_ext.bench.ep_result import (
    ERROR,
    FAILED,
    OK,
    PEER_COPY,
    UNAVAILABLE,
    EpRow,
    set_fractions,
)
from dualpipe_ext.bench.ep_variants import (
    BASELINES,
    BufferRunner,
    Prepared,
    Runner,
    Variant,
    variants,
)
from dualpipe_ext.bench.progress import say
from dualpipe_ext.bench.ranks import ProblemError, Ranks
from dualpipe_ext.bench.record import percentiles
from dualpipe_ext.bench.sm_time import sm_times


def run(ranks: Ranks, options: EpOptions) -> list[EpRow]:
    """Measure everything that the options ask for; called by all ranks, equal on all of them."""
    with torch.no_grad():
        return _Run(ranks, options).all()


@dataclass(slots=True, eq=False)
class _Measured:
    """A case that is right, ready to be timed."""

    case: Case
    row: EpRow
    prepared: Prepared
    graph: timing.Call | None = field(default=None)


class _Run:
    def __init__(self, ranks: Ranks, options: EpOptions) -> None:
        self.ranks, self.options = ranks, options
        self.on_gpu = ranks.device.type == "cuda"
        self.inputs = make_inputs(options, ranks)
        self.num_local = options.experts // ranks.num_ranks
        self.cases = (*options.cases, *push_cases(options.cases))
        self.placements = {
            key: ep_check.placements(self.inputs, ranks, self.num_local, case)
            for key, case in {(c.layout, c.alignment): c for c in self.cases}.items()
        }
        self.rows: list[EpRow] = []
        alone = ranks.local is not None or ranks.num_ranks == 1
        self.gemm = GemmBeside(ranks) if options.gemm and self.on_gpu and not alone else None

    def all(self) -> list[EpRow]:
        everything = with_pushes(variants(self.options))
        for variant in everything:
            self._with_runner(variant, self._measure)
        if self.on_gpu and "copy_engine" in self.options.transports:
            self._peer_copy()
        if self.on_gpu:
            for variant in everything:
                if self._rows_of(variant):
                    self._with_runner(variant, self._sm_time)
        set_fractions(self.rows, {case.name: push_case(case).name for case in self.options.cases})
        say(self.ranks, "")
        return self.rows

    def _with_runner(self, variant: Variant, body: Callable[[Variant, Runner], None]) -> None:
        """Make the variant's runner, use it, and free its memory."""
        say(self.ranks, variant.label)
        try:
            runner = self.ranks.together(lambda: self._runner(variant))
        except ProblemError as problem:
            rows = self._rows_of(variant)
            for row in rows:
                row.reason = f"no SM time: {problem}"
            if not rows:
                self.rows.append(self._row("", variant, UNAVAILABLE, str(problem)))
            return
        body(variant, runner)
        del runner
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _runner(self, variant: Variant) -> Runner:
        kind: Callable[..., Runner] = BufferRunner
        if variant.transport == PUSH:
            kind = PushRunner
        elif variant.transport.partition("-")[0] in BASELINES:
            kind = AllToAllRunner
        return kind(variant, self.options, self.inputs, self.ranks)

    def _rows_of(self, variant: Variant) -> list[EpRow]:
        """The rows of the variant whose case is right."""
        name = (variant.transport, variant.num_sms)
        good = [row for row in self.rows if row.status == OK]
        return [row for row in good if (row.transport, row.num_sms) == name]

    def _row(self, case: str, variant: Variant, status: str, reason: str = "") -> EpRow:
        options = self.options
        return EpRow(
            device=self.ranks.device.type,
            ranks=self.ranks.num_ranks,
            virtual=self.ranks.local is not None,
            tokens=options.tokens,
            hidden=options.hidden,
            experts=options.experts,
            top_k=options.top_k,
            rounds=options.rounds,
            calls=options.calls,
            case=case,
            transport=variant.transport,
            num_sms=variant.num_sms,
            status=status,
            reason=reason,
        )

    def _measure(self, variant: Variant, runner: Runner) -> None:
        """First pass: check, time and overlap every case of one variant."""
        measured = []
        for case in self.cases:
            if runner.supports(case):
                say(self.ranks, variant.label, f"checking {case.name}")
                row = self._row(case.name, variant, OK)
                self.rows.append(row)
                prepared = self._checked(case, row, runner)
                if prepared is not None:
                    measured.append(_Measured(case, row, prepared))
        if not measured:
            return
        say(self.ranks, variant.label, "timing")
        try:
            self.ranks.together(lambda: self._time(measured, runner))
            self._traffic(measured, runner, variant)
        except ProblemError as problem:
            for one in measured:
                one.row.status, one.row.reason = ERROR, str(problem)
            return
        self._graphs(variant, measured, runner)
        self._beside_gemm(variant, measured, runner)

    def _checked(self, case: Case, row: EpRow, runner: Runner) -> Prepared | None:
        """The case, ready and right; else its row says what is wrong."""
        try:
            prepared = self.ranks.together(lambda: runner.prepare(case, self._num_rows(case)))
            calls = {"uncached": prepared.uncached, "cached": prepared.cached}
            for name, call in calls.items():
                wrong = None if call is None else self._wrong(case, call, prepared, runner)
                if wrong is not None:
                    row.status, row.reason = FAILED, f"{name}: {wrong}"
                    return None
        except ProblemError as problem:
            row.status, row.reason = ERROR, str(problem)
            return None
        row.reason = prepared.note
        return prepared

    def _at(self, case: Case) -> list[Placement]:
        return self.placements[case.layout, case.alignment]

    def _num_rows(self, case: Case) -> int:
        """The most rows that arrive at any rank, a multiple of the alignment."""
        return max(at.num_rows for at in self._at(case))

    def _wrong(
        self, case: Case, call: timing.Call, prepared: Prepared, runner: Runner
    ) -> str | None:
        """What is wrong with the result of a call at any rank; the same on all of them."""

        def result() -> object:
            value = call()
            runner.finish()
            return value

        got, at, rank = self.ranks.together(result), self._at(case), self.ranks.rank
        if case.op == "combine":
            rows = self.ranks.gather(prepared.rows)
            wrong = self.ranks.together(
                lambda: ep_check.wrong_combine(got, rows, at, rank, self.options.top_k)
            )
        elif case.op == "push":
            wrong = self.ranks.together(
                lambda: ep_check.wrong_push(got, case, self.inputs, at[rank], rank)
            )
        else:
            wrong = self.ranks.together(
                lambda: ep_check.wrong_dispatch(got, case, self.inputs, at[rank])
            )
        return self.ranks.problem(wrong)

    def _time(self, measured: list[_Measured], runner: Runner) -> None:
        calls = {}
        for one in measured:
            calls[one.case.name, "us"] = one.prepared.cached
            if one.prepared.uncached is not None:
                calls[one.case.name, "uncached_us"] = one.prepared.uncached
        found = self._interleaved(calls)
        runner.finish()
        for one in measured:
            for name in ("us", "uncached_us"):
                if (one.case.name, name) in found:
                    one.row.set_times(name, percentiles(found[one.case.name, name]))
            if one.row.uncached_us_p50 is not None:
                one.row.routing_us = round(one.row.uncached_us_p50 - one.row.us_p50, 2)

    def _interleaved(self, calls: dict) -> dict:
        return timing.interleaved(
            calls, self.ranks, rounds=self.options.rounds, num_calls=self.options.calls
        )

    def _traffic(self, measured: list[_Measured], runner: Runner, variant: Variant) -> None:
        needed, received = self._rows_received(per_expert=False)
        crossing = self._rows_received(per_expert=True)[0] if runner.row_per_expert else needed
        for one in measured:
            size = row_bytes(self.options.hidden, one.case.fp8)
            # A push leaves out the rows that stay.
            arriving = needed if one.case.op == "push" else received
            one.row.set_traffic(crossing * size, needed * size, arriving * size)
            if variant.nominal_sms is not None:
                one.row.nominal_sm_us = round(variant.nominal_sms * one.row.us_p50, 1)

    def _rows_received(self, *, per_expert: bool) -> tuple[int, int]:
        """Rows that a rank receives from the others, and from all; the most of any rank."""
        idx, num_ranks = self.inputs.all_idx, self.ranks.num_ranks
        to_rank = idx.div(self.num_local, rounding_mode="floor")
        counts = torch.stack([(to_rank == r).sum(1) for r in range(num_ranks)])
        if not per_expert:
            counts = counts.clamp_max(1)
        table = counts.view(num_ranks, num_ranks, -1).sum(2)  # [to, from]
        return int((table.sum(1) - table.diagonal()).max()), int(table.sum(1).max())

    def _graphs(self, variant: Variant, measured: list[_Measured], runner: Runner) -> None:
        """The cached calls once more, replayed from CUDA graphs."""
        if not self.on_gpu or not runner.capturable:
            for one in measured:
                one.row.graph_reason = "not tried"
            return
        say(self.ranks, variant.label, "CUDA graphs")
        for one in measured:
            self._capture(one)
        calls = {one.case.name: one.graph for one in measured if one.graph is not None}
        if not calls:
            return
        try:
            found = self.ranks.together(lambda: self._interleaved(calls))
            self.ranks.together(runner.finish)
        except ProblemError as problem:
            for one in measured:
                one.row.graph_reason = one.row.graph_reason or str(problem)
            return
        finally:
            for one in measured:
                one.graph = None
        for one in measured:
            if one.case.name in found:
                one.row.set_times("graph_us", percentiles(found[one.case.name]))

    def _capture(self, one: _Measured) -> None:
        try:
            one.graph = self.ranks.together(lambda: timing.captured(one.prepared.cached))
        except ProblemError as problem:
            one.row.graph_reason = str(problem)

    def _beside_gemm(self, variant: Variant, measured: list[_Measured], runner: Runner) -> None:
        chosen = {one.case.name: one for one in measured if one.case.beside_gemm}
        if self.gemm is None or not chosen:
            return
        say(self.ranks, variant.label, "beside a GEMM")
        calls = {name: one.prepared.cached for name, one in chosen.items()}
        try:
            found = self.ranks.together(
                lambda: self.gemm.measure(calls, rounds=self.options.rounds)
            )
            self.ranks.together(runner.finish)
        except ProblemError as problem:
            for one in chosen.values():
                one.row.status, one.row.reason = ERROR, f"beside a GEMM: {problem}"
            return
        for name, one in chosen.items():
            beside = found[name]
            one.row.gemm_us = round(beside.gemm_us, 2)
            one.row.gemm_slow_down = round(beside.slow_down, 4)
            one.row.overlap_speed_up = round(beside.speed_up, 4)
            one.row.overlap_us = round(beside.call_us, 2)

    def _sm_time(self, variant: Variant, runner: Runner) -> None:
        """Second pass: SM time of the cases that are right."""
        good = {row.case: row for row in self._rows_of(variant)}
        say(self.ranks, variant.label, "SM time")
        try:
            calls = {
                case.name: self.ranks.together(
                    lambda case=case: runner.prepare(case, self._num_rows(case)).cached
                )
                for case in self.cases
                if case.name in good
            }
            found = self.ranks.together(lambda: sm_times(calls, self.ranks))
            self.ranks.together(runner.finish)
        except ProblemError as problem:
            for row in good.values():
                row.reason = f"no SM time: {problem}"
            return
        for name, seen in found.items():
            row = good[name]
            row.sm_us, row.most_sms = round(seen.sm_us, 1), seen.most_sms
            if seen.copy_gb_s:
                row.copy_gb_s = float(f"{seen.copy_gb_s:.4g}")
                row.pack_us = round(seen.pack_us, 1)

    def _peer_copy(self) -> None:
        variant = Variant("copy_")
        if self.ranks.local is not None or self.ranks.num_ranks == 1:
            return
        say(self.ranks, "a plain copy between GPUs")
        row = self._row(PEER_COPY, variant, OK)
        self.rows.append(row)
        try:
            times, size = self.ranks.together(lambda: peer_copy(self.ranks, self.options))
        except ProblemError as problem:
            row.status, row.reason = UNAVAILABLE, str(problem)
            return
        row.set_times("us", percentiles(times))
        row.set_traffic(size, size, size)
