"""One step of one rank: the plan's actions, carried out one after the other.

What belongs here: what each action needs, does and hands on. Which tensors cross between ranks, and
how, is in ``exchange.py``; how a stage runs is in ``stage.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dualpipe_ext.pipeline import messages
from dualpipe_ext.pipeline.exchange import Exchange
from dualpipe_ext.pipeline.overlap import ChunkGraph
from dualpipe_ext.pipeline.plan import Action, Op, Plan, parts
from dualpipe_ext.pipeline.stage import Criterion, LocalStage, overlap
from dualpipe_ext.pipeline.timing import Stopwatch


@dataclass
class Batch:
    """What a rank puts into a step and gets out of it, by chunk.

    Attributes:
        inputs: if a pipe begins here.
        needs_grad: which of the inputs want a gradient.
        criterion: loss of a pipe's outputs and labels, if one ends here.
        labels: if a pipe ends here.
        keep_outputs: whether to collect ``outputs``.
        losses: scalars, where a pipe ends and there is a criterion.
        outputs: where a pipe ends.
        input_grads: of the inputs, where a pipe begins.
    """

    inputs: list[list[Any]]
    needs_grad: list[bool]
    criterion: Criterion | None
    labels: list[list[Any]]
    keep_outputs: bool
    losses: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    input_grads: dict[int, list[Tensor | None]] = field(default_factory=dict)


class StepExecutor:
    """Carries out a rank's actions of one step.

    Args:
        plan: of the step.
        rank: this pipeline rank.
        stages: this rank's, by virtual stage.
        exchange: with the other ranks.
        batch: what goes in and comes out.
        training: forward and backward; else the forwards alone.
        zero_bubble: split I from W; else I does all of a backward, and W nothing.
        stopwatch: times the actions, if given.
        on_grads: called with a stage once all its backwards have been launched, but for weight
            gradients that a pair has left.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        stages: dict[int, LocalStage],
        exchange: Exchange,
        batch: Batch,
        *,
        training: bool,
        zero_bubble: bool,
        stopwatch: Stopwatch | None,
        on_grads: Callable[[int], None] | None = None,
    ) -> None:
        self._plan = plan
        self._rank = rank
        self._stages = stages
        self._exchange = exchange
        self._batch = batch
        self._training = training
        self._zero_bubble = zero_bubble
        self._stopwatch = stopwatch
        self._on_grads = on_grads
        # Chunks between their forward and their backward, and between that and their W.
        self._graphs: dict[tuple[int, int], ChunkGraph] = {}
        self._owing: dict[tuple[int, int], ChunkGraph] = {}
        # What one stage of this rank handed to the next, by the name of the message it would be.
        self._handed: dict[Action, tuple[Sequence[Any], Sequence[bool]]] = {}

    def run(self) -> None:
        """Run all actions."""
        self._exchange.look_ahead()
        done: dict[int, list[int]] = {}
        if self._on_grads is not None:
            for stage, index in self._plan.last_backwards(self._rank).items():
                done.setdefault(index, []).append(stage)
        for index, step in enumerate(self._plan.actions[self._rank]):
            actions = [a for a in parts(step) if self._training or a.op is Op.F]
            if not actions:
                continue
            asked = self._mark()
            given = [self._gather(action) for action in actions]
            # Memory for the action: what it was given may have come long after what was sent.
            self._exchange.release_sent()
            start = self._mark()
            self._carry_out(actions, given)
            if self._stopwatch is not None:
                self._stopwatch.add(str(step), asked, start, self._mark())
            for stage in done.get(index, ()):
                self._on_grads(stage)
        assert not any((self._graphs, self._owing, self._handed))

    def _mark(self) -> Any:
        return None if self._stopwatch is None else self._stopwatch.mark()

    def _gather(self, action: Action) -> tuple[Sequence[Any], Sequence[bool]]:
        """The tensors that ``action`` starts from and, for a forward, which want a gradient."""
        if action.op is Op.W:
            return (), ()
        message = messages.source(self._plan, action)
        if message is None and action.op is Op.F:
            return self._batch.inputs[action.chunk], self._batch.needs_grad
        if message is None:
            return [torch.ones_like(self._batch.losses[action.chunk])], ()
        if self._plan.stage_rank[message.stage] == self._rank:
            return self._handed.pop(message)
        tensors, specs = self._exchange.receive(message)
        if action.op is Op.F:
            return tensors, [spec.requires_grad for spec in specs]
        received = iter(tensors)
        return [next(received) if spec.requires_grad else None for spec in specs], ()

    def _carry_out(
        self, actions: list[Action], given: list[tuple[Sequence[Any], Sequence[bool]]]
    ) -> None:
        if len(actions) == 2:
            self._pair(*actions, *given)
            return
        action, (tensors, needs_grad) = actions[0], given[0]
        if action.op is Op.F:
            graph = self._begin(action, tensors, needs_grad)
            graph.forward()
            self._deliver_outputs(action, graph)
        elif action.op is Op.W:
            if self._zero_bubble:
                self._owing.pop((action.stage, action.chunk)).weights()
        else:
            graph = self._graphs.pop((action.stage, action.chunk))
            graph.start_backward(tensors)
            defer = action.op is Op.I and self._zero_bubble
            graph.backward(defer=defer)
            if defer:
                self._owing[action.stage, action.chunk] = graph
            self._deliver_grads(action, graph)

    def _pair(
        self,
        forward: Action,
        backward: Action,
        inputs: tuple[Sequence[Any], Sequence[bool]],
        grads: tuple[Sequence[Any], Sequence[bool]],
    ) -> None:
        forward_graph = self._begin(forward, *inputs)
        backward_graph = self._graphs.pop((backward.stage, backward.chunk))
        backward_graph.start_backward(grads[0])
        criterion, labels = self._loss_of(forward)
        overlap(
            self._stages[forward.stage],
            forward_graph,
            self._stages[backward.stage],
            backward_graph,
            criterion=criterion,
            labels=labels,
            backward_has_loss=self._plan.is_last(backward.stage),
        )
        self._deliver_outputs(forward, forward_graph)
        self._deliver_grads(backward, backward_graph)

    def _begin(
        self, action: Action, inputs: Sequence[Any], needs_grad: Sequence[bool]
    ) -> ChunkGraph:
        criterion, labels = self._loss_of(action)
        return self._stages[action.stage].begin(
            inputs,
            needs_grad,
            key=(action.stage, action.chunk),
            criterion=criterion,
            labels=labels,
        )

    def _loss_of(self, action: Action) -> tuple[Criterion | None, Sequence[Any]]:
        batch = self._batch
        if batch.criterion is None or not self._plan.is_last(action.stage):
            return None, ()
        return batch.criterion, batch.labels[action.chunk]

    def _deliver_outputs(self, action: Action, graph: ChunkGraph) -> None:
        outputs, needs_grad = graph.take_outputs()
        if self._training:
            self._graphs[action.stage, action.chunk] = graph
        target = messages.destination(self._plan, action)
        if target is None:
            batch = self._batch
            if batch.criterion is not None:
                batch.losses[action.chunk], outputs = outputs[0], outputs[1:]
            if batch.keep_outputs:
                batch.outputs[action.chunk] = outputs
        elif self._plan.stage_rank[target] == self._rank:
            self._exchange.pass_on(action.stage)
            self._handed[action] = outputs, needs_grad
        else:
            self._exchange.send_outputs(action, outputs, needs_grad)

    def _deliver_grads(self, action: Action, graph: ChunkGraph) -> None:
        grads = graph.take_input_grads()
        message = messages.name(action)
        target = messages.destination(self._plan, action)
        if target is None:
            self._batch.input_grads[action.chunk] = grads
        elif self._plan.stage_rank[target] == self._rank:
            self._handed[message] = grads, ()
        else:
            self._exchange.send_grads(message, grads)
