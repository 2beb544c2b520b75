"""The forward of one micro-batch beside the backward of another, and the two without each other.

What belongs here: the work of a pair in its four forms, the check that serial and overlapped give
the same gradients, the link throttled until communication takes as long as compute, and the times.

- compute: forward and backward with communication taken out (``link.py``), on one stream.
- comm: the calls that the pair makes of the transport, in its order, and nothing else.
- serial: the forward, then the backward, on one stream.
- pair: ``run_pair`` on two streams, weight gradients deferred to where they hide most: in the
  launch order that the times of the first pairs asked for. Compute is told of the SMs that
  communication takes by the means that are measured.

Every call runs one forward and one backward, that of the chunk whose forward the call before ran.
Gradients add up in ``.grad``, as over the micro-batches of a step. With ``options.graphs`` the
forms are measured as CUDA graphs (``pipeline_graph.py``), with routing that has a bound.

Bit for bit: the serial form runs with a gradient, the overlapped one with its negative. Rounding is
symmetric, so every gradient comes out negated and the sums of both are exactly zero; a second set
of gradients, for which large stages leave no room, is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from dualpipe_ext.bench import pipeline_graph, timing
from dualpipe_ext.bench.link import Link, Recording
from dualpipe_ext.bench.pipeline_cases import PipelineOptions
from dualpipe_ext.bench.ranks import Ranks
from dualpipe_ext.ep import Buffer
from dualpipe_ext.models import LanguageModelStage
from dualpipe_ext.pipeline.overlap import ChunkGraph, Launcher, Phase, run_pair
from dualpipe_ext.pipeline.pair_orders import NUM_SAMPLES, WARM_UP
from dualpipe_ext.pipeline.weight_grad import WeightGradStore
from dualpipe_ext.sms import SMPartition, set_partition

# A setting of cuBLAS that torch accepts as deterministic. On Hopper torch gives cuBLAS as large a
# workspace, 32 MiB, when nothing is set, so figures measured with it are those without.
DETERMINISTIC_ENVIRONMENT: Mapping[str, str] = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
FORMS = ("compute", "comm", "serial", "pair")
# How often the throttle is corrected, and how far from equal the two may stay.
_CORRECTIONS, _CLOSE = 6, 0.02
# Chunks with inputs of their own, so that a mix-up of two is a wrong gradient.
_INPUTS = 2


class WrongResultError(Exception):
    """What is wrong with the overlapped pair, in one line."""


def draw(ranks: Ranks, options: PipelineOptions, seed: int) -> Tensor:
    """Activations or gradients of a micro-batch: random, [T/L, L, H], others on every rank."""
    generator = torch.Generator(ranks.device).manual_seed(seed * ranks.num_ranks + ranks.rank)
    shape = (options.tokens // options.seq_len, options.seq_len, options.model.hidden)
    values = torch.empty(shape, device=ranks.device, dtype=options.dtype)
    return values.normal_(generator=generator)


class _Chunks:
    """Chunks that follow each other: each call runs a forward, and the backward of the last one."""

    def __init__(
        self,
        phases: Sequence[Phase],
        inputs: Sequence[Tensor],
        grad: Tensor,
        run: Callable[[ChunkGraph, ChunkGraph], None],
        launcher: Launcher,
    ) -> None:
        self._phases, self._inputs, self._run, self._launcher = phases, inputs, run, launcher
        self._store = WeightGradStore()
        self._waiting: ChunkGraph | None = None
        self._number = 0
        self.grad = grad

    @property
    def next_input(self) -> int:
        """Which of the inputs the next forward takes."""
        return self._number % len(self._inputs)

    @property
    def started(self) -> bool:
        """Whether there is a chunk that can run its backward."""
        return self._waiting is not None

    def start(self) -> None:
        """The forward of a first chunk, alone."""
        graph = self._begin()
        graph.forward()
        graph.take_outputs()
        self._waiting = graph

    def stop(self) -> None:
        """Forget the chunk that waits for its backward, and begin again at the first input."""
        self._launcher.catch_up()
        self._waiting, self._number = None, 0

    def forget(self) -> None:
        """As :meth:`stop`, and leave out what is left to compute: it may have no values."""
        self._store.clear()
        self._waiting, self._number = None, 0

    def __call__(self) -> tuple[Tensor, Tensor]:
        """The output of the forward, and the gradient of the input of the backward."""
        forward, backward = self._begin(), self._waiting
        backward.start_backward([self.grad])
        self._run(forward, backward)
        self._waiting = forward
        return forward.take_outputs()[0][0], backward.take_input_grads()[0]

    def _begin(self) -> ChunkGraph:
        x = self._inputs[self.next_input]
        self._number += 1
        return ChunkGraph(
            self._phases,
            [x],
            [True],
            launcher=self._launcher,
            store=self._store,
            key=self._number,
        )


class _Form(NamedTuple):
    """What is called over and over."""

    chunks: _Chunks | None
    start: timing.Call
    """Before the first call, if no chunk waits for its backward."""
    call: timing.Call


def _one_after_the_other(forward: ChunkGraph, backward: ChunkGraph) -> None:
    forward.forward()
    backward.backward(defer=False)


class PairBench:
    """A stage and the buffer its tokens travel through; made and used by all ranks together.

    Args:
        ranks: a process each.
        options: sizes and rounds.
        stage: its layers use ``buffer`` from now on.
        buffer: for this alone: its transport is tampered with.
        on_launch: called with the name of every phase before it is launched.
        partition: tells the pair's compute how many SMs communicate; nobody if not given.
    """

    def __init__(
        self,
        ranks: Ranks,
        options: PipelineOptions,
        stage: LanguageModelStage,
        buffer: Buffer,
        on_launch: Callable[[str], None] | None = None,
        partition: SMPartition | None = None,
    ) -> None:
        self._partition = partition or SMPartition(0, means="none", device=ranks.device)
        set_partition(stage, partition)
        self._ranks, self._options, self._stage = ranks, options, stage
        self.link = Link(buffer, slow_link=options.slow_link)
        self._buffer = buffer
        for layer in stage.layers.values():
            layer.buffer = buffer
            layer.max_recv_tokens = None
        inputs = [draw(ranks, options, seed) for seed in range(_INPUTS)]
        grad = draw(ranks, options, _INPUTS)
        self._launcher = launcher = Launcher(ranks.device, on_launch, partition, self._largest)
        two_streams = stage.phases()
        one_stream = [replace(phase, stream="compute") for phase in two_streams]
        self._serial = _Chunks(one_stream, inputs, grad, _one_after_the_other, launcher)
        self._compute = _Chunks(one_stream, inputs, grad, _one_after_the_other, launcher)
        self._pair = _Chunks(two_streams, inputs, grad, run_pair, launcher)
        self._handles = [self._handles_of(x) for x in inputs]
        if options.graphs:
            self._bound_rows()
            self._handles = [self._handles_of(x) for x in inputs]
        self._moved: Recording | None = None
        self._graphs: dict[str, timing.Series] = {}
        self._forget_graphs()

    def _largest(self, values: Sequence[float]) -> list[float]:
        return list(map(max, zip(*self._ranks.gather_object(list(values)), strict=True)))

    def _handles_of(self, x: Tensor) -> list:
        """The handles of all layers for one input, by layer."""
        with torch.no_grad(), self.link.recording() as found:
            self._stage(x)
        return found.handles

    def _bound_rows(self) -> None:
        """Let layers take as many rows as come here at most, and some more."""
        (most,) = self._largest([max(h.num_rows for handles in self._handles for h in handles)])
        for layer in self._stage.layers.values():
            layer.max_recv_tokens = math.ceil(most * pipeline_graph.ROOM)

    def _forget_graphs(self) -> None:
        """What they were captured with is there no longer, or has changed."""
        self._graphs = {}
        if self._options.graphs:
            self._memory = torch.cuda.graph_pool_handle()  # they never run beside each other

    def calls(self, names: Sequence[str] = FORMS) -> dict[str, timing.Call]:
        """The forms, ready to be called over and over."""
        get = self._graph if self._options.graphs else self._eager
        return {name: get(name) for name in names}

    def _eager(self, name: str) -> timing.Call:
        form = self._form(name)
        if form.chunks is not None and not form.chunks.started:
            form.start()
        return form.call

    def _graph(self, name: str) -> timing.Series:
        if name not in self._graphs:
            chunks, start, call = self._form(name)
            stop = (lambda: None) if chunks is None else chunks.stop
            stop()
            self._graphs[name] = pipeline_graph.captured(start, call, stop, self._memory)
        return self._graphs[name]

    def _form(self, name: str) -> _Form:
        if name == "compute":
            chunks = self._compute
            return _Form(
                chunks,
                lambda: self._without_link(chunks.start),
                lambda: self._without_link(chunks),
            )
        if name == "comm":
            if self._moved is None:
                pair = self._eager("pair")
                with self.link.recording() as self._moved:
                    pair()
            return _Form(None, lambda: None, self._moved.replay)
        if name == "serial":
            return _Form(self._serial, self._serial.start, self._serial)
        return _Form(
            self._pair, lambda: self._in_step(self._pair.start), lambda: self._in_step(self._pair)
        )

    def _in_step(self, work: Callable[[], object]) -> None:
        with self._partition.step():
            work()

    def _without_link(self, work: Callable[[], object]) -> None:
        with self.link.taken_out(self._handles[self._compute.next_input]):
            work()

    def settle(self) -> None:
        """Let the pair find its launch order for the link as it is now."""
        pair = self._eager("pair")
        self._forget_graphs()
        self._launcher.orders.forget()
        for _ in range(WARM_UP + NUM_SAMPLES):
            pair()
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize()  # times are looked at once the device has them
        pair()

    def check(self) -> None:
        """Compare serial and overlapped, bit for bit; with graphs, that of the overlapped pair.

        Raises:
            WrongResultError: an output, or a gradient, differs.
        """
        self._launcher.catch_up()
        self._stage.zero_grad()
        # Both told alike: some means make libraries take other kernels, which round differently.
        with deterministic(), self._partition.step(), self._partition.beside():
            results = []
            for form, sign in ((self._serial, 1), (self._pair, -1)):
                output, input_grad = self._once(form, sign)
                results.append((output, input_grad * sign))
                if sign > 0:
                    self._expect_gradients()
        self._forget_graphs()  # they would add to the gradients that are gone
        for what, serial, pair in zip(("output", "input gradient"), *results, strict=True):
            if not torch.equal(serial, pair):
                raise WrongResultError(f"the {what} of the pair is not that of the serial run")
        for name, parameter in self._stage.named_parameters():
            if parameter.grad.any():  # also if it is not a number
                raise WrongResultError(f"the gradient of {name} is not that of the serial run")

    def _once(self, chunks: _Chunks, sign: int) -> Sequence[Tensor]:
        """What a call returns, after one more that adds zeros to the weight gradients, but for
        those that the first has left to it."""
        grad = chunks.grad
        chunks.stop()

        def call() -> tuple[Tensor, Tensor]:
            chunks.grad = sign * grad
            return chunks()

        def last() -> tuple[()]:
            chunks.grad = torch.zeros_like(grad)
            chunks()
            chunks.stop()
            return ()

        try:
            if chunks is self._pair and self._options.graphs:
                return pipeline_graph.once(chunks.start, call, last, self._memory)
            chunks.start()
            return (*call(), *last())
        except BaseException:
            self.close()
            raise
        finally:
            chunks.grad = grad

    def _expect_gradients(self) -> None:
        for name, parameter in self._stage.named_parameters():
            if parameter.grad is None or not parameter.grad.any():
                raise WrongResultError(f"the serial run left no gradient of {name}")

    def throttle(self) -> bool:
        """Repeat communication until it takes as long as compute.

        False if it does already, or if there is none.
        """
        self.link.repeats = 1.0
        if not self.link.can_be_slower():
            return False
        compute_us, comm_us = self._medians()
        if comm_us >= compute_us:
            return False
        # Several times, by what the last change did: not everything is repeated, and one more copy
        # may take many times as long as the first.
        before, self.link.repeats = (1.0, comm_us), compute_us / comm_us
        for _ in range(_CORRECTIONS):
            compute_us, comm_us = self._medians()
            if abs(compute_us / comm_us - 1) < _CLOSE:
                break
            here = self.link.repeats
            each = (comm_us - before[1]) / (here - before[0])
            before = (here, comm_us)
            if each <= 0:  # lost in noise
                each = comm_us / here
            self.link.repeats = max(1.0, here + (compute_us - comm_us) / each)
            if self.link.repeats == here:
                break
        self.settle()
        return True

    def _medians(self) -> list[float]:
        """Of compute and communication with the link as it is now."""
        self._graphs.pop("comm", None)
        rounds = 1 if self._options.graphs else self._options.rounds  # of a row of calls each
        # The largest of all ranks: the ranks must agree on what follows from it.
        found = self._interleaved(self.calls(("compute", "comm")), rounds)
        return [median(values) for values in found.values()]

    def measure(self) -> dict[str, list[float]]:
        """Milliseconds of every form, a number per round."""
        found = self._interleaved(self.calls(), self._options.rounds)
        self._buffer.check()  # what kernels have reported, such as a wait that ended without a rank
        return {name: [1e-3 * us for us in values] for name, values in found.items()}

    def _interleaved(self, calls: dict[str, timing.Call], rounds: int) -> dict[str, list[float]]:
        num_calls = self._options.calls
        # Pairs leave work to the next call of any form: one that is not measured.
        rows = {name: timing.Series.of(call, num_calls, num_lead=1) for name, call in calls.items()}
        return timing.interleaved(rows, self._ranks, rounds=rounds, num_calls=num_calls)

    def close(self) -> None:
        """Forget what has been left to another call, and what it is computed from."""
        self._forget_graphs()
        self._launcher.forget_left()
        for chunks in (self._serial, self._compute, self._pair):
            chunks.forget()


@contextmanager
def deterministic() -> Iterator[None]:
    """Attention without atomic additions: its backward has them unless this is asked strictly.

    On a GPU the process must have :data:`DETERMINISTIC_ENVIRONMENT` from its start on: threads of
    NCCL may read the environment at any time, so a rank must not write it (``launch._worker``).

    Raises:
        RuntimeError: in the body, of an operation that has no deterministic form; of any matrix
            product without that environment.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills
