"""``dualpipe bench pipeline`` on one rank: every pair, then every schedule, each checked first.

What a transport or a schedule raises becomes a row, and the run goes on.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from dualpipe_ext.bench import pipeline_profile, pipeline_steps
from dualpipe_ext.bench.ep_variants import Variant, variants
from dualpipe_ext.bench.pipeline_cases import (
    ERROR,
    FAILED,
    UNAVAILABLE,
    PipelineOptions,
    PipelineRow,
    new_row,
)
from dualpipe_ext.bench.pipeline_pair import PairBench, WrongResultError
from dualpipe_ext.bench.pipeline_profile import PhaseNotes
from dualpipe_ext.bench.progress import say
from dualpipe_ext.bench.ranks import ProblemError, Ranks
from dualpipe_ext.bench.record import percentiles
from dualpipe_ext.bench.stage import middle_stage, stage_buffer
from dualpipe_ext.ep import Buffer
from dualpipe_ext.models import LanguageModelStage
from dualpipe_ext.profiling.picture import draw_overlap
from dualpipe_ext.profiling.report import analyze
from dualpipe_ext.sms import SMPartition
from dualpipe_ext.sms.means import depends_on_number

Record = Callable[[PipelineRow], object]


def run(ranks: Ranks, options: PipelineOptions, record: Record | None = None) -> list[PipelineRow]:
    """Measure everything that the options ask for; called by all ranks, equal on all of them.

    Args:
        ranks: the ranks.
        options: what to measure.
        record: given each row by rank 0 as soon as it is there: a run that is cut off loses none.
    """
    rows: list[PipelineRow] = []

    def add(row: PipelineRow) -> None:
        rows.append(row)
        if record is not None and ranks.rank == 0:
            record(row)

    if "pair" in options.parts:
        # Captures need a stream of their own; and autograd adds gradients up on the one where it
        # first met a parameter.
        stream = torch.cuda.Stream(ranks.device) if options.graphs else None
        with torch.cuda.stream(stream):
            _Pairs(ranks, options, add).all()
        _free(ranks)
    if "steps" in options.parts:
        _steps(ranks, options, add)
    say(ranks, "")
    return rows


class _Pairs:
    """The pair with every transport, on one stage."""

    def __init__(self, ranks: Ranks, options: PipelineOptions, add: Record) -> None:
        self._ranks, self._options, self._add = ranks, options, add
        self._stage: LanguageModelStage | None = None

    def all(self) -> None:
        # With SMs and transports as the options of ``bench ep`` have them.
        for variant in self._variants():
            told = self._options.sm_means
            if not variant.nominal_sms:  # where none communicates there is no number to tell
                told = [m for m in told if not depends_on_number(m)] or ["none"]
            for means in told:
                self._told(variant, means)
                _free(self._ranks)

    def _variants(self) -> list[Variant]:
        found: list[Variant] = []
        for variant in variants(self._options):
            packs = variant.transport == "copy_engine"
            numbers = self._options.pack_sms if packs else ()
            found += [replace(variant, num_sms=n) for n in numbers] or [variant]
        return found

    def _told(self, variant: Variant, means: str) -> None:
        """The rows of one transport and one way to tell compute of it."""
        say(self._ranks, variant.label, means)
        try:
            buffer = self._ranks.together(lambda: self._buffer(variant))
            partition = self._ranks.together(lambda: self._partition(variant, means))
        except ProblemError as problem:
            row = self._row(variant, sm_means=means, status=UNAVAILABLE, reason=str(problem))
            self._add(row)
            return
        self._variant(variant, buffer, partition)

    def _partition(self, variant: Variant, means: str) -> SMPartition:
        return SMPartition(variant.nominal_sms or 0, means=means, device=self._ranks.device)

    def _buffer(self, variant: Variant) -> Buffer:
        options = self._options
        buffer = stage_buffer(
            options.model,
            tokens=options.tokens,
            dtype=options.dtype,
            transport=variant.transport,
            num_sms=variant.num_sms,
        )
        if options.graphs and buffer._transport.capabilities.syncs_host:
            raise ValueError(
                f"expected a transport that a CUDA graph can hold for --graphs: transport "
                f"{variant.transport} waits for counts on the host"
            )
        return buffer

    def _variant(self, variant: Variant, buffer: Buffer, partition: SMPartition) -> None:
        """The link as it is, and throttled."""
        notes, told = PhaseNotes(), {"sm_means": partition.means}
        if partition.means != "none":
            told["compute_sms"] = partition.compute_sms
        bench: PairBench | None = None
        try:
            bench = self._ranks.together(lambda: self._bench(buffer, notes, partition))
            for throttled in (False, True) if self._options.throttle else (False,):
                say(self._ranks, variant.label, "throttled" if throttled else "as it is")
                if throttled and not self._ranks.together(bench.throttle):
                    return
                if not throttled:
                    self._ranks.together(bench.settle)
                self._ranks.together(bench.check)
                row = self._row(variant, **told)
                self._measure(bench, row, notes)
                self._add(row)
        except ProblemError as problem:
            wrong = WrongResultError.__name__ in str(problem)
            status = FAILED if wrong else ERROR
            self._add(self._row(variant, **told, status=status, reason=str(problem)))
        finally:
            if bench is not None:
                bench.close()

    def _bench(self, buffer: Buffer, notes: PhaseNotes, partition: SMPartition) -> PairBench:
        options = self._options
        if self._stage is None:
            self._stage = middle_stage(
                options.model,
                range(options.model.num_layers),
                buffer=buffer,
                dtype=options.dtype,
                device=self._ranks.device,
            )
        return PairBench(self._ranks, options, self._stage, buffer, notes, partition)

    def _measure(self, bench: PairBench, row: PipelineRow, notes: PhaseNotes) -> None:
        times = self._ranks.together(bench.measure)
        row.repeats = round(bench.link.repeats, 4)
        row.slow_link = bench.link.slow_link if row.repeats > 1 else None
        row.compute_ms, row.comm_ms = (
            round(median(times[form]), 4) for form in ("compute", "comm")
        )
        row.set_times("serial_ms", percentiles(times["serial"]))
        row.set_times("pair_ms", percentiles(times["pair"]))
        row.speed_up = round(row.serial_ms_p50 / row.pair_ms_p50, 4)
        row.pair_over_longer = round(row.pair_ms_p50 / max(row.compute_ms, row.comm_ms), 4)
        if self._ranks.device.type != "cuda":
            return
        try:
            self._ranks.together(lambda: self._profile(bench, row, notes))
        except ProblemError as problem:
            row.reason = f"no profile: {problem}"  # its times are right all the same

    def _profile(self, bench: PairBench, row: PipelineRow, notes: PhaseNotes) -> None:
        calls = bench.calls()
        alone = analyze(pipeline_profile.trace_of(calls["compute"], self._ranks))
        comm = bench.link.comm_patterns
        trace = pipeline_profile.trace_of(calls["pair"], self._ranks, notes, comm)
        report = analyze(trace)
        slower = pipeline_profile.slow_down(report, alone)
        worst = self._ranks.maxima([-report.hidden, slower, report.waiting_us, -report.speed_up])
        row.hidden_share, row.compute_slow_down = round(-worst[0], 4), round(worst[1], 4)
        row.waiting_ms = round(1e-3 * worst[2] / pipeline_profile.NUM_CALLS, 4)
        row.busy_over_span = round(-worst[3], 4)
        row.comm_ctas = report.comm_ctas
        picture = self._options.picture
        if picture is not None and self._ranks.rank == 0:
            means = None if row.sm_means == "none" else row.sm_means
            label = "-".join(str(part) for part in (row.transport, row.num_sms, means) if part)
            slow = "" if row.slow_link is None else f"-slow-{row.slow_link}"
            draw_overlap(trace, report, picture.with_stem(f"{picture.stem}-{label}{slow}"))

    def _row(self, variant: Variant, **values: Any) -> PipelineRow:
        options = self._options
        return new_row(
            options,
            options.model,
            part="pair",
            device=self._ranks.device.type,
            pp=1,
            ep=self._ranks.num_ranks,
            layers=options.model.num_layers,
            graphs=options.graphs,
            transport=variant.transport,
            num_sms=variant.num_sms,
            **values,
        )


def _steps(ranks: Ranks, options: PipelineOptions, add: Record) -> None:
    """A row per schedule."""
    mesh = pipeline_steps.Mesh(ranks, options.ep)
    expected: tuple[float, float] | None = None
    try:
        buffer = ranks.together(lambda: pipeline_steps.step_buffer(options, mesh))
        send_s = ranks.together(lambda: pipeline_steps.send_seconds(ranks, options, mesh))
    except ProblemError as problem:
        reason = str(problem)
        for kind in options.schedules:
            add(_step_row(ranks, options, mesh, kind, UNAVAILABLE, reason))
        return
    for kind in options.schedules:
        say(ranks, f"steps under {kind}")
        bench = None
        try:
            bench = ranks.together(
                lambda kind=kind: pipeline_steps.StepBench(ranks, options, mesh, buffer, kind)
            )
            found = ranks.together(bench.fingerprint)
            wrong = expected and pipeline_steps.wrong_fingerprint(found, expected)
            if wrong:
                add(_step_row(ranks, options, mesh, kind, FAILED, wrong))
                continue
            expected = expected or found
            add(ranks.together(lambda bench=bench: bench.measure(send_s)))
        except ProblemError as problem:
            add(_step_row(ranks, options, mesh, kind, ERROR, str(problem)))
        finally:
            if bench is not None:
                bench.close()
            del bench
            _free(ranks)


def _step_row(
    ranks: Ranks,
    options: PipelineOptions,
    mesh: pipeline_steps.Mesh,
    kind: str,
    status: str,
    reason: str,
) -> PipelineRow:
    return new_row(
        options,
        options.step_model,
        part="step",
        device=ranks.device.type,
        pp=mesh.pp,
        ep=mesh.ep,
        layers=options.step_layers,
        transport=options.step_transport,
        schedule=kind,
        num_chunks=options.num_chunks,
        stage_transport=None if mesh.pp == 1 else options.stage_transport,
        status=status,
        reason=reason,
    )


def _free(ranks: Ranks) -> None:
    """Give memory back to the device: what follows needs nearly all of it."""
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
