"""The overlap engine: a stage runs phase by phase, so that two chunks can take turns.

What belongs here: the :class:`Phase` that a stage is made of, :class:`ChunkGraph` (one chunk on one
stage, autograd cut between phases), the streams they are launched on (:class:`Launcher`), and
:func:`run_pair`, the forward of one chunk beside the backward of another, in an order that
``launch_order.py`` finds. Nothing here knows what the phases compute.

A stage offers phases with a method ``phases() -> Sequence[Phase]``; ``stage(*inputs)`` must equal
their composition. A phase's ``fn`` takes the state as positional arguments and returns the next
state, a tuple of tensors and arbitrary objects. Tensors that carry gradients must be items of the
state themselves, not hidden in such objects.

Memory on CUDA: what crosses between the two streams is kept alive until the stream that it was made
on has waited for its last use (``stream_memory.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from dualpipe_ext import hardware_queue
from dualpipe_ext.pipeline.cut import GradSlot, gradient_root, receive
from dualpipe_ext.pipeline.launch_order import LEFT, Launch
from dualpipe_ext.pipeline.pair_orders import Agree, PairOrders, Sample
from dualpipe_ext.pipeline.stream_memory import StreamMemory
from dualpipe_ext.pipeline.weight_grad import WeightGradStore
from dualpipe_ext.sms import SMPartition


@dataclass(frozen=True)
class Phase:
    """A step of a stage's forward.

    Attributes:
        name: for traces and tests, such as ``attention``.
        stream: ``compute``, or ``comm`` for a phase that mostly moves data.
        fn: takes the items of the state, returns the next state as a tuple. It may use activation
            checkpointing (``torch.utils.checkpoint`` with ``use_reentrant=False``).
    """

    name: str
    stream: Literal["compute", "comm"]
    fn: Callable[..., tuple[Any, ...]]

    def __post_init__(self) -> None:
        if self.stream not in ("compute", "comm"):
            raise ValueError(
                f"expected the stream of phase {self.name!r} to be 'compute' or 'comm', "
                f"got {self.stream!r}"
            )


class _Chain:
    """Launches that depend on each other: the forward, or the backward, of one chunk."""

    __slots__ = ("event", "number", "stream")

    def __init__(self) -> None:
        self.stream: Any = None
        self.event: Any = None
        self.number = 0  # of the event among those that the launcher has recorded


class Launcher:
    """Where phases run: the current stream, and beside it one of high priority for communication.

    Without CUDA there is one order of execution and nothing to synchronise.

    Args:
        device: of the stages.
        on_launch: called with ``name(F)``, ``name(B)`` or ``name(W)`` before every launch.
        partition: is told what compute runs beside communication: that of pairs.
        agree: between the ranks that run the same pairs at the same time and communicate within
            them, so that they launch them in the same order; see :class:`PairOrders`.

    Attributes:
        orders: of the pairs that run here, with the SMs divided as they are now.
    """

    def __init__(
        self,
        device: torch.device,
        on_launch: Callable[[str], None] | None = None,
        partition: SMPartition | None = None,
        agree: Agree = list,
    ) -> None:
        self._partition, self._agree = partition, agree
        self._device = device
        self._on_launch = on_launch
        # High priority: a communication kernel that starts late is a kernel nothing hides.
        self._comm = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._memory = StreamMemory()
        self._num_events = 0
        # Times that orders follow from are those of one number of communication SMs.
        self._orders: dict[int | None, PairOrders] = {}
        self._use_orders_of(None if partition is None else partition.comm_sms)
        if partition is not None:
            partition.follow(self._use_orders_of)
        self._timed: tuple[Launch, Sample] | None = None
        self._left: ChunkGraph | None = None  # whose weight gradients have not all been computed

    def _use_orders_of(self, comm_sms: int | None) -> None:
        # Copy engines wait before they unpack, and, in one queue, so does all that is behind them.
        one_queue = hardware_queue.is_shared() and comm_sms != 0
        orders = PairOrders(self._agree, one_queue=one_queue)
        self.orders = self._orders.setdefault(comm_sms, orders)

    def can_time(self) -> bool:
        """Whether launches go to two streams whose events tell the time."""
        if self._comm is None or (self._partition is not None and self._partition.trying):
            return False
        return not torch.cuda.is_current_stream_capturing()

    @contextmanager
    def timing(self, launch: Launch, sample: Sample | None) -> Iterator[None]:
        """Note in ``sample``, if there is one, when the launch in the body begins and ends."""
        self._timed = None if sample is None else (launch, sample)
        try:
            yield
        finally:
            self._timed = None

    def step(self) -> AbstractContextManager[Any]:
        """Around all launches of a step; what is current may be another stream in the body."""
        return nullcontext() if self._partition is None else self._partition.step()

    def paired(self) -> AbstractContextManager[Any]:
        """Around the launches of a pair."""
        return nullcontext() if self._partition is None else self._partition.beside()

    def start(self) -> _Chain:
        """A chain that begins with what the current stream has produced so far."""
        chain = _Chain()
        if self._comm is not None:
            self._record(chain, torch.cuda.current_stream(self._device))
        return chain

    @contextmanager
    def launch(
        self, phase: Phase, op: str, chain: _Chain, tensors: Sequence[Any]
    ) -> Iterator[None]:
        """Run the body as the chain's next launch, on the phase's stream; it reads ``tensors``."""
        if self._on_launch is not None:
            self._on_launch(f"{phase.name}({op})")
        if self._comm is None:
            yield
            return
        stream = self._stream(phase)
        self._follow(chain, stream, tensors)
        begin = self._mark(stream)
        with torch.cuda.stream(stream):
            yield
        if self._timed is not None:
            launch, sample = self._timed
            sample.add(launch, begin, self._mark(stream))
        self._record(chain, stream)

    def _mark(self, stream: Any) -> Any:
        if self._timed is None:
            return None
        return stream.record_event(torch.cuda.Event(enable_timing=True))

    def on_stream_of(self, phase: Phase) -> AbstractContextManager[Any]:
        """Make the phase's stream current; nothing may be computed inside."""
        return nullcontext() if self._comm is None else torch.cuda.stream(self._stream(phase))

    def _stream(self, phase: Phase) -> Any:
        return self._comm if phase.stream == "comm" else torch.cuda.current_stream(self._device)

    def finish(self, chain: _Chain, tensors: Sequence[Any]) -> None:
        """Make the chain's results, ``tensors``, safe to use on the current stream."""
        if self._comm is not None:
            self._follow(chain, torch.cuda.current_stream(self._device), tensors)

    def leave_weights(self, graph: ChunkGraph) -> None:
        """A pair is over but for weight gradients of its backward; nobody else has left any."""
        assert self._left is None
        self._left = graph

    def catch_up(self) -> None:
        """Compute the weight gradients that the last pair has left, if it has.

        Needed before anything else adds to the same gradients, which have an order, or reads them.
        Pairs and everything that a :class:`ChunkGraph` runs outside of pairs see to it.
        """
        graph, self._left = self._left, None
        if graph is not None:
            with self.paired():  # as where they come from: some means change a library's kernels
                graph.weights()

    def forget_left(self) -> None:
        """Leave them out: a step has failed."""
        self._left = None

    def settle(self) -> None:
        """After a step: order the streams after each other, and let go of what only they used."""
        self.catch_up()
        if self._comm is None:
            return
        ends = self.start(), _Chain()
        self._record(ends[1], self._comm)
        self._follow(ends[0], self._comm, ())
        self._follow(ends[1], ends[0].stream, ())

    def _record(self, chain: _Chain, stream: Any) -> None:
        self._num_events += 1
        chain.event, chain.stream, chain.number = stream.record_event(), stream, self._num_events
        self._memory.recorded(stream, chain.number)

    def _follow(self, chain: _Chain, stream: Any, tensors: Sequence[Any]) -> None:
        if stream == chain.stream:
            return
        stream.wait_event(chain.event)
        self._memory.waited(stream, chain.stream, chain.number)
        self._memory.crossed(tensors, made_on=chain.stream, user=stream)


class ChunkGraph:
    """One chunk on one stage: its forward phase by phase, then its backward in reverse.

    Autograd is cut at the stage's inputs, between phases and at its outputs. What carries no
    gradient (such a tensor, or any other object) is passed on as it is. Of the outputs only the way
    back into the graph is kept, so their memory is free once the caller drops them.

    Args:
        phases: of the stage, at least one.
        inputs: of the stage: tensors or other objects. They are used detached.
        needs_grad: for each input, whether its gradient is wanted.
        launcher: where the phases run.
        store: takes the weight gradients of backwards that defer them, under ``(key, phase)``.
        key: names the chunk in ``store``.
        stubs: keep the way back from the outputs as tensors (see :func:`cut.gradient_root`).
        stage: tells stages apart whose phases have the same names; an object of the stage's own.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        inputs: Sequence[Any],
        needs_grad: Sequence[bool],
        *,
        launcher: Launcher,
        store: WeightGradStore,
        key: Any,
        stubs: bool = False,
        stage: object = None,
    ) -> None:
        self.phases = tuple(phases)
        # Weakly: orders are kept by it, in the launcher, which a stage holds. (Its id would not do:
        # another object may get it.)
        self.stage = None if stage is None else ref(stage)
        self.launcher = launcher
        self._store = store
        self._key = key
        self._stubs = stubs
        self._entries: list[GradSlot | None] = []
        # Per phase, the roots of its backward, each with the slot its gradient will be in.
        self._exits: list[list[tuple[GradientEdge | Tensor, GradSlot]]] = []
        self._output_slots: list[GradSlot | None] = []
        with launcher.on_stream_of(self.phases[0]):
            self._state = tuple(map(self._enter, inputs, needs_grad))
        self._chain = launcher.start()

    def _enter(self, value: Any, needs_grad: bool) -> Any:
        cut = isinstance(value, Tensor) and needs_grad and torch.is_grad_enabled()
        slot = GradSlot() if cut else None
        self._entries.append(slot)
        if slot is not None:
            return receive(value, slot)
        return value.detach() if isinstance(value, Tensor) else value

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The stage's inputs as its first phase sees them, before it ran."""
        assert not self._exits
        return self._state

    def run_forward(self, index: int) -> None:
        """Run the forward of phase ``index``; phases run in order."""
        assert index == len(self._exits)
        phase = self.phases[index]
        with self.launcher.launch(phase, "F", self._chain, self._state):
            result = phase.fn(*self._state)
        if not isinstance(result, tuple):
            raise ValueError(
                f"expected phase {phase.name!r} to return a tuple, got {type(result).__name__}"
            )
        self.leave(result)

    def leave(self, result: tuple[Any, ...]) -> None:
        """Take ``result`` as what the next phase returned: cut it and keep the way back."""
        last = len(self._exits) == len(self.phases) - 1
        # A cut belongs to the stream of the phase behind it: autograd runs a node on the stream it
        # was made on, and would have that stream wait for the gradient.
        user = self.phases[len(self._exits) + (not last)]
        exits: list[tuple[GradientEdge | Tensor, GradSlot]] = []
        cut: dict[int, tuple[Any, GradSlot | None]] = {}
        for value in result:
            if id(value) in cut:
                continue
            if not (isinstance(value, Tensor) and value.requires_grad):
                cut[id(value)] = (value, None)
                continue
            slot = GradSlot()
            exits.append((gradient_root(value, as_tensor=self._stubs and last), slot))
            with self.launcher.on_stream_of(user):
                cut[id(value)] = (value.detach() if last else receive(value, slot), slot)
        self._exits.append(exits)
        self._state = tuple(cut[id(value)][0] for value in result)
        if last:
            self._output_slots = [cut[id(value)][1] for value in result]

    def forward(self) -> None:
        """Run the forward of all phases."""
        self.launcher.catch_up()
        for index in range(len(self.phases)):
            self.run_forward(index)

    def take_outputs(self) -> tuple[tuple[Any, ...], tuple[bool, ...]]:
        """The stage's outputs, detached, and which of them will want a gradient; once."""
        assert len(self._exits) == len(self.phases)
        outputs, self._state = self._state, ()
        self.launcher.finish(self._chain, outputs)
        return outputs, tuple(slot is not None for slot in self._output_slots)

    def start_backward(self, grads: Sequence[Tensor | None]) -> None:
        """Give the gradients of the first outputs, None where there is none; the rest have none."""
        assert len(grads) <= len(self._output_slots)
        for slot, grad in zip(self._output_slots, grads, strict=False):
            if slot is not None and grad is not None:
                slot.add(grad)
        self._chain = self.launcher.start()

    def take_roots(self) -> tuple[list[GradientEdge | Tensor], list[Tensor]]:
        """The roots of the next phase's backward (last to first) and their gradients; once."""
        exits = [(root, slot.take()) for root, slot in self._exits.pop()]
        return (
            [root for root, grad in exits if grad is not None],
            [grad for _, grad in exits if grad is not None],
        )

    def run_backward(self, index: int, *, defer: bool) -> None:
        """Run the backward of phase ``index``; phases run in reverse order.

        Args:
            defer: leave weight gradients to :meth:`run_weights`. Those of ``comm`` phases are
                computed at once all the same: they could not be hidden on the stream they are on.
        """
        phase = self.phases[index]
        assert index == len(self._exits) - 1
        roots, grads = self.take_roots()
        weights: AbstractContextManager[Any] = nullcontext()
        if phase.stream == "compute":
            store = self._store
            weights = store.deferring((self._key, index)) if defer else store.at_once()
        with self.launcher.launch(phase, "B", self._chain, grads), weights:
            if roots:
                torch.autograd.backward(roots, grads)

    @property
    def weights_in_parts(self) -> bool:
        """Whether deferred weight gradients can run one by one."""
        return self._store.in_parts

    def parts(self, index: int) -> list[int]:
        """Numbers of the deferred weight gradients of phase ``index`` that have not run."""
        return self._store.parts((self._key, index))

    def weight_of(self, index: int, part: int) -> Any:
        """Which weight one of :meth:`parts` is for."""
        return self._store.weight_of((self._key, index), part)

    def run_weights(self, index: int, part: int | None = None) -> None:
        """Compute the deferred weight gradients of phase ``index``: all that are left, or one."""
        left = self.parts(index)
        nothing = not left if part is None else part not in left
        if nothing and self.weights_in_parts:
            return
        # The compute stream ran the backward that deferred them: its own order is enough.
        with self.launcher.launch(self.phases[index], "W", self.launcher.start(), ()):
            self._store.run((self._key, index), part)

    def backward(self, *, defer: bool) -> None:
        """Run the backward of all phases."""
        self.launcher.catch_up()
        for index in reversed(range(len(self.phases))):
            self.run_backward(index, defer=defer)

    def weights(self) -> None:
        """Compute the deferred weight gradients of all phases, in the order of the backward."""
        self.launcher.catch_up()
        for index in reversed(range(len(self.phases))):
            if self.phases[index].stream == "compute":
                self.run_weights(index)

    def take_input_grads(self) -> list[Tensor | None]:
        """The gradients of the stage's inputs, None where there is none; once."""
        grads = [None if slot is None else slot.take() for slot in self._entries]
        self.launcher.finish(self._chain, grads)
        return grads


def run_pair(forward: ChunkGraph, backward: ChunkGraph) -> None:
    """Run the forward of one chunk and the whole backward of another, interleaved.

    ``backward.start_backward`` has been called. Every launch does what it would do alone, so the
    results are those of the forward and then the backward, bit for bit, whatever the order. (Not
    so for a weight whose gradient is deferred in one place and not in another.) Some weight
    gradients may be left to the next pair: see :meth:`Launcher.catch_up`.
    """
    launcher = forward.launcher
    order, sample = launcher.orders.begin(
        forward.phases,
        backward.phases,
        may_time=launcher.can_time() and backward.weights_in_parts,
        stages=(forward.stage, backward.stage),
    )
    leaves = LEFT in order
    with launcher.paired():
        if not leaves:
            launcher.catch_up()
        for launch in order:
            _run_launch(launch, forward, backward, sample)
        if not backward.weights_in_parts:
            return
        if leaves:
            launcher.leave_weights(backward)
        else:
            backward.weights()  # what there is more than at the time of measuring


def _run_launch(
    launch: Launch, forward: ChunkGraph, backward: ChunkGraph, sample: Sample | None
) -> None:
    """One launch of a pair, timed if there is a sample."""
    launcher = forward.launcher
    if launch == LEFT:
        launcher.catch_up()
        return
    if launch.op == "W" and sample is not None:
        for part in backward.parts(launch.index):
            single = Launch("W", launch.index, part)
            sample.weights[single] = backward.weight_of(launch.index, part)
            with launcher.timing(single, sample):
                backward.run_weights(launch.index, part)
    with launcher.timing(launch, None if launch.op == "W" else sample):
        if launch.op == "F":
            forward.run_forward(launch.index)
        elif launch.op == "B":
            backward.run_backward(launch.index, defer=True)
        else:
            backward.run_weights(launch.index, launch.part)
