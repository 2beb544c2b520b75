"""Runs of ``dualpipe bench pipeline`` at a size for tests, also with pairs that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import torch

from dualpipe_ext.bench import pipeline_pair, pipeline_run, pipeline_steps, timing
from dualpipe_ext.bench.pipeline_cases import PipelineOptions, PipelineRow
from dualpipe_ext.bench.pipeline_pair import (
    DETERMINISTIC_ENVIRONMENT,
    PairBench,
    WrongResultError,
)
from dualpipe_ext.bench.ranks import Ranks
from dualpipe_ext.bench.stage import middle_stage
from dualpipe_ext.ep import Buffer
from dualpipe_ext.models import ModelConfig
from dualpipe_ext.sms import SMPartition
from tests.ep.test_switching import played
from tests.pipeline.leaving import all_pairs_leave

# How ranks start that compare bits on GPUs.
PROCESSES = {"virtual": False, "device_type": "cuda", "environment": DETERMINISTIC_ENVIRONMENT}
MODEL = ModelConfig(
    hidden=64,
    num_layers=2,
    num_heads=1,
    num_experts=4,
    top_k=2,
    num_groups=1,
    top_groups=1,
    expert_hidden=32,
    shared_hidden=32,
)
OPTIONS = PipelineOptions(
    parts=("pair", "steps"),
    model=MODEL,
    tokens=16,
    seq_len=8,
    dtype=torch.float32,
    transports=("collective",),
    sms=(8,),
    throttle=False,
    schedules=("1f1b", "zb1p", "dualpipe", "dualpipev"),
    ep=1,
    step_experts=4,
    step_layers=2,
    step_transport="collective",
    num_chunks=4,
    rounds=2,
    calls=1,
)


def make_pair(
    ranks: Ranks,
    options: PipelineOptions = OPTIONS,
    on_launch: Callable[[str], object] | None = None,
) -> PairBench:
    buffer = Buffer(
        hidden=options.model.hidden,
        num_experts=options.model.num_experts,
        top_k=options.model.top_k,
        max_tokens=options.tokens,
        dtype=options.dtype,
        transport=options.transports[0],
    )
    layers = range(options.model.num_layers)
    kind = {"dtype": options.dtype, "device": ranks.device}
    stage = middle_stage(options.model, layers, buffer=buffer, **kind)
    return PairBench(ranks, options, stage, buffer, on_launch)


def without_weight_gradients(forward, backward):
    """A pair that forgets what it deferred."""
    forward.forward()
    backward.backward(defer=True)
    backward._store.clear()


def with_the_forwards_gradient(forward, backward):
    """A pair that gives a backward the gradient twice."""
    forward.forward()
    for slot in backward._output_slots:
        slot.add(slot.grad)
    backward.backward(defer=False)


def told_of(ranks: Ranks, options: PipelineOptions, wrong_pair) -> str:
    with patch.object(pipeline_pair, "run_pair", wrong_pair):
        bench = make_pair(ranks, options)
    try:
        bench.check()
    except WrongResultError as error:
        return str(error)
    return ""


def check_pairs(ranks: Ranks, options: PipelineOptions = OPTIONS) -> list[str]:
    """What the check says of the real pair, and of two wrong ones."""
    pairs = (pipeline_pair.run_pair, without_weight_gradients, with_the_forwards_gradient)
    return [told_of(ranks, options, pair) for pair in pairs]


def check_while_some_are_left(ranks: Ranks) -> list[int]:
    """Checks a bench whose last pair has left weight gradients. Of how many chunks some are left:
    before the check, after it, after another pair, and when the bench is closed."""
    bench, found = make_pair(ranks), []
    acts = (bench.calls()["pair"], bench.check, lambda: bench.calls()["pair"](), bench.close)
    with all_pairs_leave():
        for act in acts:
            act()
            found.append(len(bench._pair._store))
    return found


def weights_measured(ranks: Ranks) -> dict[str, list[int]]:
    """Launches of weight gradients in what is measured of each form, round by round, where every
    pair leaves some."""
    names: list[str] = []
    bench = make_pair(ranks, replace(OPTIONS, calls=2), names.append)
    found: dict[str, list[int]] = {}

    def measure(series: timing.Series, num_calls: int, ranks: Ranks) -> float:
        series.lead()
        names.clear()
        series.body()
        form = next(form for form, row in rows.items() if row is series)
        found.setdefault(form, []).append(sum(name.endswith("(W)") for name in names))
        return 1.0

    rows: dict[str, timing.Series] = {}
    interleaved = timing.interleaved

    def noted(calls, ranks, **how):
        rows.update(calls)
        return interleaved(calls, ranks, **how)

    with (
        all_pairs_leave(),
        patch.object(timing, "measure", measure),
        patch.object(timing, "interleaved", noted),
    ):
        bench.measure()
    return found


COMPUTE_US = 30.0
# Communication as it is, and what each repetition adds: all of it, less, and much more, as copies
# to the host; and nothing to repeat it for.
LINKS = ((12.0, 12.0), (12.0, 4.0), (12.0, 80.0), (25.0, 200.0), (20.0, 60.0), (30.0, 30.0))


def throttled(ranks: Ranks) -> tuple[list[tuple[bool, float]], list[str]]:
    """What the throttle makes of each of ``LINKS`` beside compute of ``COMPUTE_US``: whether it did
    something, and what communication takes then; and the forms that a throttled bench measures."""
    bench = make_pair(ranks)
    found = []
    for once, each in LINKS:

        def comm_us(once: float = once, each: float = each) -> float:
            return once + each * (bench.link.repeats - 1)

        with patch.object(bench, "_medians", side_effect=lambda: [COMPUTE_US, comm_us()]):
            found.append((bench.throttle(), comm_us()))
    bench.link.repeats = 2.5
    bench.check()
    return found, list(bench.measure())


def all_kinds(ranks: Ranks, options: PipelineOptions) -> list[list[PipelineRow]]:
    """Everything; a pair that is wrong; a schedule whose gradients are; a transport not here."""
    found = [pipeline_run.run(ranks, options)]
    pairs = replace(options, parts=("pair",))
    with patch.object(pipeline_pair, "run_pair", without_weight_gradients):
        found.append(pipeline_run.run(ranks, pairs))
    steps = replace(options, parts=("steps",), schedules=("1f1b", "dualpipe"))
    with patch.object(pipeline_steps, "Pipeline", _NoMirroring):
        found.append(pipeline_run.run(ranks, steps))
    found.append(pipeline_run.run(ranks, replace(pairs, transports=("nvlink", "collective"))))
    return found


def told_by_all_means(ranks: Ranks, options: PipelineOptions) -> list[PipelineRow]:
    """Pairs over transports that are played, compute told by each means; one is not there."""
    options = replace(
        options,
        parts=("pair",),
        transports=("nvlink", "copy_engine"),
        sm_means=("none", "persistent", "green_context"),
        pack_sms=(64,),
    )
    real = pipeline_run.SMPartition

    def partition(comm_sms: int, *, means: str, device: torch.device) -> SMPartition:
        if means == "green_context":
            raise ValueError("no green contexts")
        return real(comm_sms, means=means, device=device)

    with played(), patch.object(pipeline_run, "SMPartition", partition):
        return pipeline_run.run(ranks, options)


class _NoMirroring(pipeline_steps.Pipeline):
    """Copies of a stage keep their own gradients."""

    def __init__(self, *args, **options):
        super().__init__(*args, sync_mirrored_grads=False, **options)
