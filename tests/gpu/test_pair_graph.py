"""Overlapped pairs as CUDA graphs: with bounded routing, a replay does what an eager pair does."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from dualpipe_ext.bench.pipeline_pair import deterministic
from dualpipe_ext.bench.ranks import Ranks, start
from dualpipe_ext.bench.stage import middle_stage, stage_buffer
from dualpipe_ext.models import LanguageModelStage
from dualpipe_ext.pipeline.overlap import ChunkGraph, Launcher, run_pair
from dualpipe_ext.pipeline.weight_grad import WeightGradStore
from tests.bench.pipeline_runs import PROCESSES
from tests.gpu.test_bench_pipeline import WIDE
from tests.pipeline.leaving import all_pairs_leave


class Chunks:
    """Two micro-batches: the forward of one, a pair, the backward of the other."""

    def __init__(self, stage: LanguageModelStage, shape: tuple[int, ...], device: torch.device):
        self.stage, self.launcher, self.store = stage, Launcher(device), WeightGradStore()
        self.inputs = [torch.zeros(shape, device=device, dtype=torch.bfloat16) for _ in "ab"]
        self.grad = torch.zeros_like(self.inputs[0])
        self.graphs: list[ChunkGraph] = []
        self.results: list[Tensor] = []

    def parts(self):
        return self.first, self.pair, self.last

    def first(self) -> None:
        self.graphs = [self._graph(0)]
        self.graphs[0].forward()
        self.results = [self.graphs[0].take_outputs()[0][0]]

    def pair(self) -> None:
        backward, forward = self.graphs[0], self._graph(1)
        self.graphs.append(forward)
        backward.start_backward([self.grad])
        run_pair(forward, backward)
        self.results += [forward.take_outputs()[0][0], backward.take_input_grads()[0]]

    def last(self) -> None:
        self.graphs[1].start_backward([self.grad])
        self.graphs[1].backward(defer=False)
        self.results.append(self.graphs[1].take_input_grads()[0])
        self.launcher.settle()

    def _graph(self, number: int) -> ChunkGraph:
        return ChunkGraph(
            self.stage.phases(),
            [self.inputs[number]],
            [True],
            launcher=self.launcher,
            store=self.store,
            key=number,
        )

    def draw(self, seed: int) -> None:
        generator = torch.Generator(self.grad.device).manual_seed(seed)
        for tensor in (*self.inputs, self.grad):
            tensor.normal_(generator=generator)
        for parameter in self.stage.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()

    def found(self) -> list[Tensor]:
        torch.cuda.synchronize()
        grads = [parameter.grad for parameter in self.stage.parameters()]
        return [tensor.clone() for tensor in (*self.results, *grads)]


def replays_that_leave_equal_eager(ranks: Ranks, transport: str) -> int:
    """The pair leaves weight gradients, and the part behind it computes them."""
    with all_pairs_leave():
        return replays_equal_eager(ranks, transport)


def replays_equal_eager(ranks: Ranks, transport: str) -> int:
    model, device = WIDE.model, ranks.device
    buffer = stage_buffer(model, tokens=WIDE.tokens, dtype=torch.bfloat16, transport=transport)
    layers = range(model.num_layers)
    stage = middle_stage(model, layers, buffer=buffer, dtype=torch.bfloat16, device=device)
    for layer in stage.layers.values():
        layer.max_recv_tokens = WIDE.tokens * model.top_k
    shape = (WIDE.tokens // WIDE.seq_len, WIDE.seq_len, model.hidden)
    chunks, stream, want = Chunks(stage, shape, device), torch.cuda.Stream(), []
    # On the stream that captures: autograd adds gradients up where it first met a parameter.
    with torch.cuda.stream(stream), deterministic():
        for seed in (0, 1, 2):
            chunks.draw(seed)
            for part in chunks.parts():
                part()
            want.append(chunks.found())
        pool, graphs = torch.cuda.graph_pool_handle(), []
        for part in chunks.parts():
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], pool=pool, stream=stream):
                part()
        for seed in (1, 2, 0):
            chunks.draw(seed)
            for graph in graphs:
                graph.replay()
            for number, (a, b) in enumerate(zip(chunks.found(), want[seed], strict=True)):
                assert torch.equal(a, b), (transport, seed, number)
                assert a.any(), (transport, seed, number)
    buffer.check()
    return len(want)


@pytest.mark.parametrize("transport", ["nvlink", "copy_engine"])
def test_replayed_pairs_have_the_bits_of_eager_ones(transport: str) -> None:
    run = partial(start, **PROCESSES)
    for act in (replays_equal_eager, replays_that_leave_equal_eager):
        assert run(act, 1, transport) == 3
