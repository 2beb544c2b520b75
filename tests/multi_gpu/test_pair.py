"""Overlapped against serial, bit for bit: every transport at every memory level."""

from __future__ import annotations

from dataclasses import replace

import torch

from dualpipe_ext.bench.pipeline_pair import PairBench, deterministic
from dualpipe_ext.bench.ranks import Ranks, start
from dualpipe_ext.bench.stage import middle_stage, stage_buffer
from dualpipe_ext.sms import SMPartition
from tests.bench.pipeline_runs import PROCESSES
from tests.gpu.test_bench_pipeline import WIDE
from tests.multi_gpu import RANKS
from tests.pipeline.leaving import all_pairs_leave

TRANSPORTS = ("nvlink", "copy_engine", "collective")


def sums(stage: torch.nn.Module) -> list[float]:
    return [parameter.grad.double().sum().item() for parameter in stage.parameters()]


def every_pair(ranks: Ranks) -> dict[str, list[list[float]]]:
    """For each transport and level the gradients of two runs, as a sum for each parameter."""
    found = {}
    for transport in TRANSPORTS:
        for level in range(4):
            options = replace(WIDE, model=WIDE.model.with_overrides(memory_level=level))
            model = options.model
            buffer = stage_buffer(
                model, tokens=options.tokens, dtype=options.dtype, transport=transport
            )
            stage = middle_stage(
                model,
                range(model.num_layers),
                buffer=buffer,
                dtype=options.dtype,
                device=ranks.device,
            )
            # Short CTAs, which also add weight gradients to those of earlier chunks.
            partition = SMPartition(0, means="yielding", device=ranks.device)
            bench = PairBench(ranks, options, stage, buffer, partition=partition)
            bench.settle()
            bench.check()
            runs = []
            for _ in range(2):
                bench._pair.stop()
                stage.zero_grad()
                with deterministic():
                    bench._pair.start()
                    bench._pair()
                    bench._pair.stop()
                runs.append(sums(stage))
            found[f"{transport} {level}"] = runs
            with all_pairs_leave():
                bench.check()
            buffer.check()
    return found


def test_pairs_have_the_bits_of_serial_runs_and_of_each_other() -> None:
    found = start(every_pair, RANKS, **PROCESSES)
    assert len(found) == len(TRANSPORTS) * 4
    for name, (first, second) in found.items():
        assert first == second, name
        assert any(first), name
    # Tokens arrive with the same bits however they travel.
    for level in range(4):
        a, b, c = (found[f"{transport} {level}"][0] for transport in TRANSPORTS)
        assert a == b == c
