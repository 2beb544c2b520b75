"""The ranks of a measurement, be they processes or virtual ranks of one process.

What belongs here: starting them, meeting, and collecting what each of them found.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext import launch
from dualpipe_ext.ep.local_ranks import LocalRank, LocalRanks

T = TypeVar("T")

# Longest wait of a rank for another outside the measured calls, which have time-outs of their own.
MEETING_TIMEOUT_S = 120.0


class ProblemError(Exception):
    """Some rank has a problem, which all ranks know; its text is the reason."""


@dataclass(frozen=True, slots=True)
class _Problem:
    """In the place of what a rank was to give."""

    text: str


def _first_problem(items: Sequence[Any]) -> str | None:
    found = (f"rank {r}: {i.text}" for r, i in enumerate(items) if isinstance(i, _Problem))
    return next(found, None)


class Ranks(ABC):
    """This rank among the others. Every method is called by all ranks, in the same order."""

    rank: int
    num_ranks: int
    device: torch.device
    local: LocalRank | None = None
    """Given for virtual ranks."""

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, by rank; all of one shape and of a dtype that gloo knows.

        Raises:
            ProblemError: as :meth:`gather_object`.
        """
        self.gather_object(None)
        return self._exchange_tensors(tensor)

    @abstractmethod
    def _exchange_tensors(self, tensor: Tensor) -> list[Tensor]:
        """See :meth:`gather`."""

    @abstractmethod
    def _exchange(self, item: Any) -> list[Any]:
        """Every rank's item, by rank."""

    def gather_object(self, item: T) -> list[T]:
        """Every rank's item, by rank.

        Raises:
            ProblemError: a rank has a problem instead (see :meth:`together`).
        """
        found = self._exchange(item)
        reason = _first_problem(found)
        if reason is not None:
            raise ProblemError(reason)
        return found

    def barrier(self) -> None:
        """What this rank gives its current stream from now on runs after all ranks have come here.

        Raises:
            ProblemError: as :meth:`gather_object`.
        """
        self.gather_object(None)
        self._meet()

    @abstractmethod
    def _meet(self) -> None:
        """Order the streams of the ranks, whose hosts have met: see :meth:`barrier`."""

    def maxima(self, values: Sequence[float]) -> list[float]:
        """The largest of all ranks' values, place by place."""
        return [max(column) for column in zip(*self.gather_object(list(values)), strict=True)]

    def problem(self, error: BaseException | str | None) -> str | None:
        """What the first rank that has a problem says, on every rank; None if none has."""
        text = _one_line(error)
        return _first_problem(self._exchange(None if text is None else _Problem(text)))

    def together(self, step: Callable[[], T]) -> T:
        """What the step returns, if all ranks did it well; else :class:`ProblemError` on all.

        So the ranks leave every step together: one that went on alone would wait for the others.
        Those that gather something meanwhile, in the step, learn of the problem there.
        """
        result, error = None, None
        try:
            result = step()
        except ProblemError:
            raise  # all ranks know
        except Exception as caught:  # whatever it is, the other ranks must know
            error = caught
        reason = self.problem(error)
        if reason is not None:
            raise ProblemError(reason)
        return result


class ProcessRanks(Ranks):
    """A process per rank: those of the default process group, over NCCL or gloo."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.device = device
        self._flag = torch.zeros(1, device=device)

    def _exchange_tensors(self, tensor: Tensor) -> list[Tensor]:
        everyone = [torch.empty_like(tensor) for _ in range(self.num_ranks)]
        dist.all_gather(everyone, tensor.contiguous())
        return everyone

    def _exchange(self, item: Any) -> list[Any]:
        everyone: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(everyone, item)
        return everyone

    def _meet(self) -> None:
        # On CUDA this orders streams: nobody starts late because its host was late.
        dist.all_reduce(self._flag)


class VirtualRanks(Ranks):
    """A thread per rank; they share a GPU and its current stream."""

    def __init__(self, member: LocalRank, device: torch.device) -> None:
        self.rank, self.num_ranks = member.rank, member.num_ranks
        self.device = device
        self.local = member

    def _exchange_tensors(self, tensor: Tensor) -> list[Tensor]:
        return self.local.gather(tensor)

    def _exchange(self, item: Any) -> list[Any]:
        return self.local.gather(item)

    def _meet(self) -> None:
        """One stream has them all."""


def under_torchrun() -> bool:
    """Whether the processes of the ranks exist already."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start(
    fn: Callable[..., T],
    num_ranks: int,
    *args: object,
    virtual: bool,
    device_type: str,
    environment: Mapping[str, str] | None = None,
) -> T | None:
    """Call ``fn(ranks, *args)`` on every rank; returns rank 0's result, None in other processes.

    Args:
        fn: a module-level function; its result must be picklable.
        num_ranks: number of ranks; under torchrun its own.
        virtual: threads on one device instead of processes.
        device_type: "cuda" or "cpu".
        environment: variables that the processes of the ranks have besides, before they meet; this
            process keeps them if it is one of them.

    Raises:
        WorkerFailedError: a process of a rank raised or died.
    """
    if virtual or under_torchrun():
        os.environ.update(environment or {})  # before NCCL has threads that read it
    if virtual:
        ranks = LocalRanks(num_ranks, timeout_s=MEETING_TIMEOUT_S)
        return ranks.run(_virtual_rank, device_type, fn, *args)[0]
    backend = "gloo" if device_type == "cpu" else None
    if under_torchrun():
        launch.init_from_env(backend=backend, timeout_s=MEETING_TIMEOUT_S)
        try:
            result = _process_rank(device_type, fn, *args)
            return result if dist.get_rank() == 0 else None
        finally:
            dist.destroy_process_group()
    results = launch.run_ranks(
        _process_rank,
        num_ranks,
        device_type,
        fn,
        *args,
        backend=backend,
        timeout_s=MEETING_TIMEOUT_S,
        environment=environment,
    )
    return results[0]


def _process_rank(device_type: str, fn: Callable[..., T], *args: object) -> T:
    return fn(ProcessRanks(_device(device_type)), *args)


def _virtual_rank(member: LocalRank, device_type: str, fn: Callable[..., T], *args: object) -> T:
    return fn(VirtualRanks(member, _device(device_type)), *args)


def _device(device_type: str) -> torch.device:
    if device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device_type)


def _one_line(error: BaseException | str | None) -> str | None:
    if error is None or isinstance(error, str):
        return error
    text = " ".join(str(error).split())
    # The rest of a CUDA error is advice on environment variables.
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{text[:300]}" if text else type(error).__name__
