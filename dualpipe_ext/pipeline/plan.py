"""Pipeline schedules as data: what every rank does, in which order, and nothing about how.

What belongs here: the data model (:class:`Plan` of :class:`Action` and :class:`Pair`), building a
plan by name (:func:`build_plan`) and checking one from elsewhere (:func:`check_plan`). The orders
themselves are in ``programs.py``; time is in ``simulate.py``; execution is in ``runtime.py``.
Pure Python, no torch, no NumPy.

P ranks, S virtual stages, m chunks (micro-batches). A *pipe* is the run of virtual stages a chunk
flows through. DualPipe has two, one in each direction, and two copies of every model stage:

======== ======== =============== ==================================================
kind     S        rank r runs     pipes
======== ======== =============== ==================================================
1f1b     P        r               0..P-1
zb1p     P        r               0..P-1
zbv      2P       r and 2P-1-r    0..2P-1
dualpipev 2P      r and 2P-1-r    0..2P-1
dualpipe 2P       r and 2P-1-r    0..P-1 (enters at rank 0), P..2P-1 (enters at rank P-1)
======== ======== =============== ==================================================
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from dualpipe_ext.pipeline import programs

KINDS = ("dualpipe", "dualpipev", "1f1b", "zb1p", "zbv")

# The largest plans that still fit an ordinary machine's memory and patience: 4096 ranks x 8192
# chunks take some gigabytes and tens of seconds to simulate.
MAX_CHUNKS = 2**20
MAX_CELLS = 2**25

_PROGRAMS: dict[str, Callable[[int, int, int], str]] = {
    "dualpipe": programs.dualpipe,
    "dualpipev": programs.dualpipe_v,
    "1f1b": programs.one_f_one_b,
    "zb1p": programs.zb_h1,
    "zbv": programs.zb_v,
}


class Op(str, Enum):
    """What is done to a chunk on a stage, with the letters of ``torch.distributed.pipelining``."""

    F = "F"  # forward
    B = "B"  # full backward
    I = "I"  # noqa: E741  backward for the gradient of the input only
    W = "W"  # backward for the gradients of the weights, after an I of the same stage and chunk

    def __str__(self) -> str:
        return self.value


class Action(NamedTuple):
    """One operation on one chunk on one virtual stage; ``str()`` gives torch's notation, 3F7."""

    op: Op
    stage: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op.value}{self.chunk}"


class Pair(NamedTuple):
    """A forward and a full backward, on two stages of one rank, that run overlapped."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})OVERLAP_F_B"


def parts(step: Action | Pair) -> tuple[Action, ...]:
    """The actions a step consists of: one, or the two of a pair (forward first)."""
    return (step,) if isinstance(step, Action) else (step.forward, step.backward)


@dataclass(frozen=True)
class Plan:
    """A schedule: per rank the actions in execution order.

    Attributes:
        kind: one of :data:`KINDS`, or a name of your own.
        num_ranks: pipeline ranks P.
        num_chunks: chunks per step, of all pipes together.
        actions: per rank, its steps in execution order. :func:`build_plan` gives a sequence that
            expands a rank's tuple when it is first asked for; it compares equal to the tuples.
        stage_rank: the rank that runs each virtual stage.
        pipes: per pipe, the contiguous virtual stages a chunk flows through, first to last.
            Chunks are numbered from 0 within their pipe.
    """

    kind: str
    num_ranks: int
    num_chunks: int
    actions: Sequence[tuple[Action | Pair, ...]]
    stage_rank: tuple[int, ...]
    pipes: tuple[range, ...]

    @property
    def num_stages(self) -> int:
        """Number of virtual stages, copies included."""
        return len(self.stage_rank)

    @property
    def has_copies(self) -> bool:
        """Whether every model stage exists once per pipe, so that gradients must be summed."""
        return len(self.pipes) > 1

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The virtual stages that ``rank`` runs, ascending."""
        return tuple(stage for stage, owner in enumerate(self.stage_rank) if owner == rank)

    def last_backwards(self, rank: int) -> dict[int, int]:
        """Behind which of the rank's steps, by index, a stage's gradients are all computed."""
        return {
            action.stage: index
            for index, step in enumerate(self.actions[rank])
            for action in parts(step)
            if action.op is not Op.F
        }

    def pipe_of(self, stage: int) -> int:
        """The index of the pipe that virtual stage ``stage`` belongs to."""
        for index, pipe in enumerate(self.pipes):
            if stage in pipe:
                return index
        raise ValueError(f"expected a stage in 0..{self.num_stages - 1}, got {stage}")

    def chunks_of_pipe(self, pipe: int) -> int:
        """How many of the plan's chunks flow through pipe ``pipe``; all pipes take the same."""
        if not 0 <= pipe < len(self.pipes):
            raise ValueError(f"expected a pipe in 0..{len(self.pipes) - 1}, got {pipe}")
        return self.num_chunks // len(self.pipes)

    def is_first(self, stage: int) -> bool:
        """Whether chunks enter their pipe at ``stage``."""
        return stage == self.pipes[self.pipe_of(stage)][0]

    def is_last(self, stage: int) -> bool:
        """Whether chunks leave their pipe at ``stage``, which is where the loss is."""
        return stage == self.pipes[self.pipe_of(stage)][-1]

    def model_stage(self, stage: int) -> int:
        """The stage's place in its pipe: virtual stages with the same one are copies."""
        return stage - self.pipes[self.pipe_of(stage)][0]


class ProgramActions(Sequence[tuple[Action | Pair, ...]]):
    """Per-rank actions kept as programs (a letter a step), expanded rank by rank on demand.

    One rank of a large run needs only its own actions, and a simulation needs none of them; a plan
    for a thousand ranks stays a few megabytes.
    """

    __slots__ = ("_expanded", "programs", "stages")

    def __init__(self, programs: tuple[str, ...], stages: tuple[tuple[int, ...], ...]) -> None:
        self.programs = programs
        self.stages = stages
        self._expanded: dict[int, tuple[Action | Pair, ...]] = {}

    def __len__(self) -> int:
        return len(self.programs)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[rank] for rank in range(len(self))[index])
        rank = range(len(self))[index]
        if rank not in self._expanded:
            self._expanded[rank] = tuple(_expand(self.programs[rank], self.stages[rank]))
        return self._expanded[rank]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ProgramActions):
            return (self.programs, self.stages) == (other.programs, other.stages)
        return tuple(self) == other

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"ProgramActions({len(self)} ranks)"

    def __reduce__(self) -> tuple[Any, ...]:
        return ProgramActions, (self.programs, self.stages)


def _expand(program: str, stages: tuple[int, ...]) -> Iterator[Action | Pair]:
    """Fill in stages and chunk numbers; the letters are explained in ``programs.py``."""
    forwards = [0] * len(stages)
    backwards = [0] * len(stages)
    without_weights: tuple[deque[int], ...] = tuple(deque() for _ in stages)

    def take(op: Op, slot: int) -> Action:
        if op is Op.W:
            return Action(op, stages[slot], without_weights[slot].popleft())
        counts = forwards if op is Op.F else backwards
        chunk = counts[slot]
        counts[slot] += 1
        if op is Op.I:
            without_weights[slot].append(chunk)
        return Action(op, stages[slot], chunk)

    for letter in program:
        slot = int(letter.islower())
        if letter in "Xx":
            yield Pair(take(Op.F, slot), take(Op.B, 1 - slot))
        else:
            yield take(Op(letter.upper()), slot)


def build_plan(kind: str, *, num_ranks: int, num_chunks: int) -> Plan:
    """The named schedule for ``num_ranks`` ranks and ``num_chunks`` chunks.

    Args:
        kind: one of :data:`KINDS`, in any case: ``dualpipe``, ``dualpipev``, ``1f1b``, ``zb1p``
            (ZB-H1) or ``zbv`` (ZB-V).
        num_ranks: pipeline ranks P; even for ``dualpipe``.
        num_chunks: chunks (micro-batches) per step. At least 2P for ``dualpipev``; even and at
            least 2P for ``dualpipe``, which sends half of them through each direction. At most
            :data:`MAX_CHUNKS`, and times P at most :data:`MAX_CELLS`.

    Raises:
        ValueError: the schedule does not exist for this shape; the message says what would work.
    """
    name = normalise_kind(kind)
    _check_shape(name, num_ranks, num_chunks)
    if name in ("1f1b", "zb1p"):
        stages = tuple((rank,) for rank in range(num_ranks))
        stage_rank = tuple(range(num_ranks))
    else:
        stages = tuple((rank, 2 * num_ranks - 1 - rank) for rank in range(num_ranks))
        stage_rank = (*range(num_ranks), *reversed(range(num_ranks)))
    both_ways = (range(num_ranks), range(num_ranks, 2 * num_ranks))
    write = _PROGRAMS[name]
    return Plan(
        kind=name,
        num_ranks=num_ranks,
        num_chunks=num_chunks,
        actions=ProgramActions(
            tuple(write(num_ranks, rank, num_chunks) for rank in range(num_ranks)), stages
        ),
        stage_rank=stage_rank,
        pipes=both_ways if name == "dualpipe" else (range(len(stage_rank)),),
    )


def normalise_kind(kind: str) -> str:
    """``kind`` in lower case, if it is one of :data:`KINDS`; ``ValueError`` if it is not."""
    name = kind.lower() if isinstance(kind, str) else kind
    if name not in _PROGRAMS:
        raise ValueError(f"expected a kind of {', '.join(KINDS)}, got {kind!r}")
    return name


def _check_shape(kind: str, num_ranks: int, num_chunks: int) -> None:
    for what, value in (("num_ranks", num_ranks), ("num_chunks", num_chunks)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"expected {what} to be a positive integer, got {value!r}")
    if num_chunks > MAX_CHUNKS or num_ranks * num_chunks > MAX_CELLS:
        raise ValueError(
            f"expected num_chunks of at most {MAX_CHUNKS} and num_ranks x num_chunks of at most "
            f"{MAX_CELLS}, got {num_ranks} x {num_chunks}"
        )
    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
    if kind == "dualpipe":
        if num_ranks % 2:
            raise ValueError(
                f"expected an even num_ranks for dualpipe, got {num_ranks} "
                f"(dualpipev takes any number)"
            )
        if num_chunks % 2 or num_chunks < 2 * num_ranks:
            raise ValueError(
                f"expected an even num_chunks of at least {2 * num_ranks} for dualpipe "
                f"on {ranks}, got {num_chunks}"
            )
    if kind == "dualpipev" and num_chunks < 2 * num_ranks:
        raise ValueError(
            f"expected num_chunks of at least {2 * num_ranks} for dualpipev on {ranks}, "
            f"got {num_chunks}"
        )


def check_plan(plan: Plan) -> None:
    """Check that a plan trains every chunk once and runs to its end.

    Each stage must do for each chunk of its pipe one F and either one B or one I and one W, on its
    own rank and in that order; and the ranks, each executing its actions in order and waiting for
    the inputs of the next one, must not deadlock. A pair starts when both its inputs are there.

    Raises:
        ValueError: names the first stage, chunk or rank that is wrong.
    """
    _check_structure(plan)
    _check_completeness(plan)
    _check_progress(plan)


def _check_structure(plan: Plan) -> None:
    if len(plan.actions) != plan.num_ranks:
        raise ValueError(f"expected actions for {plan.num_ranks} ranks, got {len(plan.actions)}")
    stray = [rank for rank in plan.stage_rank if not 0 <= rank < plan.num_ranks]
    if stray:
        raise ValueError(f"expected stages on ranks 0..{plan.num_ranks - 1}, got rank {stray[0]}")
    covered = [stage for pipe in plan.pipes for stage in pipe]
    if covered != list(range(plan.num_stages)):
        raise ValueError(
            f"expected pipes that cover stages 0..{plan.num_stages - 1} in order, "
            f"got {', '.join(map(str, plan.pipes)) or 'none'}"
        )
    if plan.num_chunks % len(plan.pipes):
        raise ValueError(
            f"expected num_chunks to be a multiple of the {len(plan.pipes)} pipes, "
            f"got {plan.num_chunks}"
        )


def _check_completeness(plan: Plan) -> None:
    num_chunks = plan.num_chunks // len(plan.pipes)
    # Per stage and chunk the operations so far, as a word: "F", "FB", "FI" or "FIW".
    words: list[list[str]] = [[""] * num_chunks for _ in plan.stage_rank]
    for rank, steps in enumerate(plan.actions):
        for action in (action for step in steps for action in parts(step)):
            if not (0 <= action.stage < plan.num_stages and 0 <= action.chunk < num_chunks):
                raise ValueError(
                    f"expected stages below {plan.num_stages} and chunks below {num_chunks}, "
                    f"got {action} on rank {rank}"
                )
            if plan.stage_rank[action.stage] != rank:
                raise ValueError(
                    f"expected stage {action.stage} on rank {plan.stage_rank[action.stage]}, "
                    f"got {action} on rank {rank}"
                )
            word = words[action.stage][action.chunk] + action.op.value
            if word not in ("F", "FB", "FI", "FIW"):
                raise ValueError(
                    f"expected F then B, or F then I then W, for stage {action.stage} chunk "
                    f"{action.chunk}, got {' '.join(word)}"
                )
            words[action.stage][action.chunk] = word
        for pair in (step for step in steps if isinstance(step, Pair)):
            if (pair.forward.op, pair.backward.op) != (Op.F, Op.B):
                raise ValueError(f"expected a pair of one F and one B, got {pair} on rank {rank}")
    for stage, row in enumerate(words):
        for chunk, word in enumerate(row):
            if word not in ("FB", "FIW"):
                raise ValueError(
                    f"expected F then B, or F then I then W, for stage {stage} chunk {chunk}, "
                    f"got {' '.join(word) or 'nothing'}"
                )


def _check_progress(plan: Plan) -> None:
    first = {pipe[0] for pipe in plan.pipes}
    last = {pipe[-1] for pipe in plan.pipes}
    done: set[tuple[bool, int, int]] = set()  # (is forward, stage, chunk) whose output exists
    waiting: dict[tuple[bool, int, int], int] = {}  # what a stopped rank waits for
    position = [0] * plan.num_ranks

    def missing(step: Action | Pair) -> tuple[bool, int, int] | None:
        for op, stage, chunk in parts(step):
            if op is Op.F and stage not in first:
                need = (True, stage - 1, chunk)
            elif op in (Op.B, Op.I):
                # The loss on a last stage needs its own forward, done before and not in this pair.
                need = (True, stage, chunk) if stage in last else (False, stage + 1, chunk)
            else:
                continue
            if need not in done:
                return need
        return None

    runnable = deque(range(plan.num_ranks))
    while runnable:
        rank = runnable.popleft()
        steps = plan.actions[rank]
        while position[rank] < len(steps):
            step = steps[position[rank]]
            need = missing(step)
            if need is not None:
                waiting[need] = rank
                break
            position[rank] += 1
            for op, stage, chunk in parts(step):
                if op is not Op.W:
                    output = (op is Op.F, stage, chunk)
                    done.add(output)
                    if output in waiting:
                        runnable.append(waiting.pop(output))
    if waiting:
        stuck = ", ".join(
            f"rank {rank} at {plan.actions[rank][position[rank]]}"
            for rank in sorted(waiting.values())[:4]
        )
        raise ValueError(f"expected a plan that runs to its end, got a deadlock: {stuck}")
