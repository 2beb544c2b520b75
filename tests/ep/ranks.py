"""Where the checks of a transport run: processes of a real group, or virtual ranks on one GPU.

A check is a function of one :class:`Ranks`, called on every rank; it does not know which of the two
it is in, unless it asks.

Shapes: R ranks, T tokens of a rank, H hidden, E experts, K top-k.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext.ep import Buffer
from dualpipe_ext.ep.local_ranks import LocalRank, LocalRanks
from dualpipe_ext.launch import run_ranks
from tests.ep.cases import Case

T = TypeVar("T")

TIMEOUT_S = 20.0
MEETING_S = 60.0
MAX_TOKENS = 64
# SM clock of a Hopper GPU, roughly: torch.cuda._sleep counts cycles.
CYCLES_PER_US = 1700


class Ranks:
    """One rank's place in a check: who it is, its buffers, and meetings outside of the transport.

    ``member`` is None in a process of a group.
    """

    def __init__(
        self,
        transport: str,
        device: str,
        rank: int,
        num_ranks: int,
        member: LocalRank | None = None,
        part_ends: tuple[int, ...] | None = None,
    ) -> None:
        self.transport = transport
        self.device = device
        self.rank = rank
        self.num_ranks = num_ranks
        self.member = member
        self.part_ends = part_ends
        self._num_gathers = 0

    @classmethod
    def of_processes(cls, environment: Environment) -> Ranks:
        return cls(
            environment.transport,
            environment.device,
            dist.get_rank(),
            dist.get_world_size(),
            part_ends=environment.part_ends,
        )

    @classmethod
    def of_threads(cls, member: LocalRank, environment: Environment) -> Ranks:
        return cls(
            environment.transport,
            environment.device,
            member.rank,
            member.num_ranks,
            member,
            environment.part_ends,
        )

    @property
    def virtual(self) -> bool:
        return self.member is not None

    @property
    def last(self) -> bool:
        return self.rank == self.num_ranks - 1

    def make_buffer(self, case: Case, **options: object) -> Buffer:
        """A buffer that fits the case, for rows of its dtype."""
        settings = {
            "hidden": case.xs[0].shape[1],
            "num_experts": case.num_experts,
            "top_k": case.top_k,
            "max_tokens": MAX_TOKENS,
            "dtype": case.xs[0].dtype,
            "timeout_s": TIMEOUT_S,
            "local": self.member,
        }
        buffer = Buffer(transport=self.transport, **{**settings, **options})
        if self.part_ends is not None:
            buffer._transport.part_ends = self.part_ends
        return buffer

    def inputs(self, case: Case) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's x, topk_idx and topk_weights, on its device."""
        by_rank = (case.xs, case.topk_idx, case.topk_weights)
        x, idx, weights = (tensors[self.rank].to(self.device) for tensors in by_rank)
        return x, idx, weights

    def once(self, fn: Callable[[], T]) -> T:
        """What ``fn`` returns, which is the same on all ranks: threads let one of them call it."""
        return fn() if self.member is None else self.member.together(None, lambda _: fn())

    def gather(self, item: T) -> list[T]:
        """What every rank brought; past the transport, so that it works where that has failed."""
        if self.member is not None:
            return self.member.gather(item)
        store = dist.distributed_c10d._get_default_store()
        self._num_gathers += 1
        names = [f"gather {self._num_gathers} of {rank}" for rank in range(self.num_ranks)]
        store.set(names[self.rank], pickle.dumps(item))
        store.wait(names, datetime.timedelta(seconds=MEETING_S))
        return [pickle.loads(store.get(name)) for name in names]

    def barrier(self) -> None:
        self.gather(None)

    def synchronize(self) -> None:
        """Wait on the host for what all ranks have launched so far."""
        self.barrier()
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.barrier()

    def allocated_by(self, fn: Callable[[], T]) -> tuple[T, int]:
        """What ``fn`` returns, and the bytes of GPU memory that are in use since, on average."""
        self.synchronize()
        before = torch.cuda.memory_allocated()
        result = fn()
        self.synchronize()
        grown = torch.cuda.memory_allocated() - before
        self.barrier()
        # Threads share one allocator.
        return result, grown // self.num_ranks if self.virtual else grown

    def delay(self, buffer: Buffer, send_us: float, receive_us: float = 0.0) -> None:
        """Make this rank late in all calls from now on; zeros end it."""
        if self.device == "cpu" or not has_kernels(buffer):
            time.sleep(1e-6 * (send_us + receive_us))
            return
        buffer._transport.delays_ns = (int(1000 * send_us), int(1000 * receive_us))
        if not self.virtual and send_us:
            torch.cuda._sleep(int(CYCLES_PER_US * send_us))

    def capture(self, fn: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Capture ``fn`` of all ranks; returns what replays it, on all ranks, and its result."""
        if self.member is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = fn()
            return graph.replay, result
        # One graph holds what all threads launch into one stream.
        graph, stream = self.member.together(None, _begin_capture)
        try:
            with torch.cuda.stream(stream):
                result = fn()
                self.member.together(None, lambda _: graph.capture_end())
        except BaseException:
            # A stream that stays in capture would fail every later test, too.
            with contextlib.suppress(Exception):
                graph.capture_end()
            raise
        return lambda: self.member.together(None, lambda _: graph.replay()), result


def _begin_capture(_: object) -> tuple[torch.cuda.CUDAGraph, torch.cuda.Stream]:
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Relaxed: the only mode in which one thread may end what another has begun.
        graph.capture_begin(capture_error_mode="relaxed")
    return graph, stream


def has_kernels(buffer: Buffer) -> bool:
    """Whether it is one of the GPU transports, which wait on the device and can be delayed."""
    return not buffer._transport.capabilities.syncs_host


@dataclass(frozen=True)
class Environment:
    """A transport and the kind of ranks it runs on."""

    transport: str
    device: str
    backend: str | None
    """torch.distributed backend of the processes; None for virtual ranks."""
    part_ends: tuple[int, ...] | None = None
    """Copy engines: parts that even the smallest segments travel in."""

    @property
    def virtual(self) -> bool:
        return self.backend is None

    def run(
        self, num_ranks: int, *checks: Callable[[Ranks], Any], timeout_s: float = 120.0
    ) -> list[list[Any]]:
        """Run checks one after the other on R ranks: starting processes takes the most time.

        Returns:
            By rank, what each check returned.
        """
        if self.backend is None:
            ranks = LocalRanks(num_ranks, timeout_s=MEETING_S, run_timeout_s=timeout_s)
            return ranks.run(_in_thread, self, checks)
        if self.device == "cuda" and num_ranks > torch.cuda.device_count():
            pytest.skip(f"needs {num_ranks} GPUs")
        return run_ranks(
            _in_process, num_ranks, self, checks, backend=self.backend, run_timeout_s=timeout_s
        )


def _in_process(environment: Environment, checks: Sequence[Callable[[Ranks], Any]]) -> list[Any]:
    ranks = Ranks.of_processes(environment)
    return [check(ranks) for check in checks]


def _in_thread(
    member: LocalRank, environment: Environment, checks: Sequence[Callable[[Ranks], Any]]
) -> list[Any]:
    ranks = Ranks.of_threads(member, environment)
    return [check(ranks) for check in checks]


GLOO = Environment("collective", "cpu", "gloo")
NCCL = Environment("collective", "cuda", "nccl")
# The store and the GPU memory handles of a group go over whatever it has; default_backend() of
# dualpipe_ext.launch where there is a GPU.
NVLINK = Environment("nvlink", "cuda", "cpu:gloo,cuda:nccl")
COPY_ENGINE = Environment("copy_engine", "cuda", "cpu:gloo,cuda:nccl")
NVLINK_VIRTUAL = Environment("nvlink", "cuda", None)
COPY_ENGINE_VIRTUAL = Environment("copy_engine", "cuda", None)
LOW_LATENCY = Environment("low_latency", "cuda", "cpu:gloo,cuda:nccl")
LOW_LATENCY_VIRTUAL = Environment("low_latency", "cuda", None)
# What only large segments do otherwise: as many parts as there can be.
COPY_ENGINE_PARTS = replace(COPY_ENGINE, part_ends=(1, 2, 3, 4, 5, 6, 7, 8))
COPY_ENGINE_PARTS_VIRTUAL = replace(COPY_ENGINE_VIRTUAL, part_ends=(1, 2, 3, 4, 5, 6, 7, 8))
