"""Migration in the background: experts move while training goes on.

Here belongs what makes a wave (``transfer.py``) run beside a step: a thread, a stream and a process
group of its own, and spare memory with a bound.

Weights and optimizer state do not change between two optimizer steps. So what is on its way while a
step runs forward and backward is still current when its optimizer is about to run, and the maps may
switch there, on every rank at the same step::

    migrator.start(tensors, old, new)        # after an optimizer step; returns at once
    ...                                      # forward and backward, by the old maps
    layers = migrator.wait()                 # what has arrived, on every rank
    for layer in layers:                     # the gradients that the new maps' slots need
        reduce_replica_grads(grads[layer], old[layer], group, onto=new[layer])
    migrator.commit()                        # rows into place; route by the new maps from here on
    optimizer.step()

The thread only ever waits for peers and for the transfer; it holds up neither the caller nor the
stream that computes. Agreement and confirmation happen in it too, so that ``wait`` has nothing to
do if the transfer took less time than the step.

Shapes: S slots in all, R ranks; rank r holds slots from ``r * S / R``. Tensors are [S/R, ...].
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from threading import Thread

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext.agreement import group_size_and_rank
from dualpipe_ext.eplb.exchange import data_device, join
from dualpipe_ext.eplb.move_plan import MigrationReport
from dualpipe_ext.eplb.peer_staging import PeerStaging
from dualpipe_ext.eplb.transfer import Carrier, LayerChange, PointToPoint, StagedLayer, carry
from dualpipe_ext.errors import CommTimeoutError, DualPipeError
from dualpipe_ext.timeouts import check_timeout, wait_for_event

PATHS = ("auto", "copy_engine", "point_to_point")
DEFAULT_SPARE_BYTES = 256 << 20

# Our own waits should end first: the NCCL watchdog ends the whole process.
_WATCHDOG_MARGIN_S = 60.0
# Beyond what the thread's own waits add up to.
_JOIN_MARGIN_S = 10.0


class Migrator:
    """Moves experts' weights and optimizer state between ranks while training goes on.

    Making one is a collective call, which waits for the device and for the other ranks; make it
    before training. All ranks of ``group`` must have made the same number of process groups before.

    Args:
        group: the R ranks that hold the slots, by default the world. It lends its ranks only:
            messages go through a group of the migrator's own.
        device: where the tensors are; by default the current GPU if there is one, else the CPU.
        timeout_s: longest wait for a peer in one step of a transfer, in seconds.
        spare_bytes: memory on each rank for rows on their way in. One wave takes as many layers as
            fit, and at least the first one must. (``point_to_point`` also holds the messages that
            leave; ``copy_engine`` allocates the spare memory once and keeps it.)
        path: "copy_engine" (rows go straight into the peers' memory, over NVLink, without an SM),
            "point_to_point" (the group's own send and receive), or "auto": the first where it can
            be had.

    Attributes:
        path: the one in use.

    Raises:
        ValueError: no such path or bound; or "copy_engine" where it cannot be had, with the reason.
        CommTimeoutError: another rank did not come.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | None = None,
        timeout_s: float = 60.0,
        spare_bytes: int = DEFAULT_SPARE_BYTES,
        path: str = "auto",
    ) -> None:
        check_timeout(timeout_s)
        if path not in PATHS:
            raise ValueError(f"expected a path of {', '.join(PATHS)}, got {path!r}")
        if spare_bytes < 1:
            raise ValueError(f"expected spare_bytes of at least 1, got {spare_bytes}")
        if device is None:
            device = torch.device("cuda") if torch.cuda.is_available() else None
        if device is not None and device.type == "cuda" and device.index is None:
            # A thread of its own works on it, whose current device is another matter.
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = torch.device("cpu") if device is None else device
        self._timeout_s, self._spare_bytes = timeout_s, spare_bytes
        self._group = _own_group(group, timeout_s)
        self._num_ranks, self._rank = group_size_and_rank(self._group)
        self._carrier = self._make_carrier(path)
        self.path = "copy_engine" if isinstance(self._carrier, PeerStaging) else "point_to_point"
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._flight: _Flight | None = None
        self._arrived: dict[int, StagedLayer] = {}
        self._failed: str | None = None

    def _make_carrier(self, path: str) -> Carrier:
        reason = "the tensors are on the CPU"
        if self._device.type == "cuda" and self._num_ranks > 1 and path != "point_to_point":
            # Here, not at the top: what only needs the CPU shall not load it.
            from dualpipe_ext.ep import memory
            from dualpipe_ext.ep.transport import Ranks

            ranks = Ranks(
                group=self._group,
                rank=self._rank,
                num_ranks=self._num_ranks,
                timeout_s=self._timeout_s,
            )
            reason = memory.unavailable(ranks)
            if reason is None:
                # Messages start on 16 bytes and are a multiple of that.
                spare = memory.allocate(-(-self._spare_bytes // 16) * 16, ranks)
                return PeerStaging(spare.everyone, self._rank, keep=spare)
        if path == "copy_engine":
            raise ValueError(f"expected ranks that reach each other's memory, but {reason}")
        # NCCL connects at the first call, which may wait for the device: not beside training.
        join(self._group, data_device(self._group, self._device))
        return PointToPoint(self._group)

    @property
    def in_flight(self) -> bool:
        """Whether a wave has been started and not been waited for."""
        return self._flight is not None

    def start(
        self,
        tensors: Mapping[int, Sequence[Tensor]],
        old: Mapping[int, Tensor | Sequence[int]],
        new: Mapping[int, Tensor | Sequence[int]],
    ) -> None:
        """Begin to move the first of these layers, as many as fit into the spare memory.

        Returns at once. Until :meth:`wait` returns nobody may write to any of the tensors. Maps and
        tensors that do not fit are found in the background, and raised by ``wait`` on every rank.

        Args:
            tensors: layer -> [S/R, ...] each, any dtype: what belongs to the slots of this rank.
                The same layers in the same order, with the same shapes and dtypes, on every rank.
            old: layer -> [S] the expert in every slot now. Maps on the CPU.
            new: layer -> [S] the expert wanted in every slot.

        Raises:
            ValueError: the last wave has not been committed or dropped, or the layers of the three
                differ.
            DualPipeError: an earlier wave failed.
        """
        if self._failed is not None:
            raise DualPipeError(f"expected a migrator without a failure, got one: {self._failed}")
        if self._flight is not None or self._arrived:
            raise ValueError("expected one wave at a time: wait and commit, or drop, the last one")
        if not list(tensors) == list(old) == list(new):
            raise ValueError(
                f"expected the same layers in tensors, old and new, got {list(tensors)}, "
                f"{list(old)} and {list(new)}"
            )
        layers = {
            layer: LayerChange(some, old[layer], new[layer]) for layer, some in tensors.items()
        }
        self._flight = _Flight(self, layers)

    def wait(self) -> tuple[int, ...]:
        """Wait until the wave has arrived on every rank; the layers that it took.

        The wait is bounded, as all waits in the background are. Nothing has changed yet: gradients
        for the new maps can be made now. Without a wave there are no layers.

        Raises:
            ValueError: maps or tensors that do not fit, on this rank or another, or that differ
                between ranks, or a layer that needs more than ``spare_bytes``. The same message on
                every rank; the migrator stays usable.
            CommTimeoutError: a peer did not answer; it is named, with what was expected of it.
            DualPipeError: another rank failed or has gone away.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return tuple(self._arrived)
        try:
            self._arrived = flight.result()
        except ValueError:
            raise
        except BaseException as error:
            self._failed = str(error)
            raise
        return tuple(self._arrived)

    def commit(self) -> dict[int, MigrationReport]:
        """Put what has arrived into place, in the order of the current stream; cannot fail.

        Call it on all ranks, after :meth:`wait`.

        Returns:
            By layer what was moved.
        """
        arrived, self._arrived = self._arrived, {}
        for layer in arrived.values():
            layer.commit()
        return {index: layer.report for index, layer in arrived.items()}

    def finish(self) -> dict[int, MigrationReport]:
        """:meth:`wait` and :meth:`commit`."""
        self.wait()
        return self.commit()

    def drop(self) -> None:
        """Forget what is in flight, on all ranks: the old placement stays.

        Raises:
            as :meth:`wait`.
        """
        self.wait()
        self._arrived = {}

    def close(self) -> None:
        """Drop what is in flight, whatever has become of it, and give up the spare memory."""
        if self._flight is not None:
            self._flight.end()
        self._flight, self._arrived = None, {}
        self._carrier = PointToPoint(self._group)
        self._failed = "it has been closed"


class _Flight:
    """A wave in the background: a thread that ends by itself, for all its waits are bounded."""

    def __init__(self, migrator: Migrator, layers: Mapping[int, LayerChange]) -> None:
        self._migrator, self._layers = migrator, layers
        self._phase = "beginning"
        self._future: Future[dict[int, StagedLayer]] = Future()
        self._ready: torch.cuda.Event | None = None
        if migrator._stream is not None:
            # From here on the tensors hold what shall travel, and earlier waves have been read.
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(migrator._device))
        # A daemon: a rank that fails elsewhere must be able to leave.
        self._thread = Thread(target=self._run, name="migrator", daemon=True)
        self._thread.start()

    def result(self) -> dict[int, StagedLayer]:
        """What has arrived, or what went wrong."""
        migrator = self._migrator
        self.end()
        if not self._future.done():
            raise CommTimeoutError(
                f"rank {migrator._rank}: expected the migration of layers {list(self._layers)} to "
                f"end within {self._bound_s:g} s, got it still {self._phase}"
            )
        return self._future.result()

    def end(self) -> None:
        """Wait for the thread."""
        self._thread.join(self._bound_s)

    @property
    def _bound_s(self) -> float:
        """What the waits in the thread add up to at most: for the device, for the agreement, for
        each layer, for the word that something failed, for the confirmation."""
        return (len(self._layers) + 4) * self._migrator._timeout_s + _JOIN_MARGIN_S

    def _run(self) -> None:
        migrator = self._migrator
        try:
            stream = migrator._stream
            if stream is not None:
                torch.cuda.set_device(migrator._device)
            with torch.no_grad(), nullcontext() if stream is None else torch.cuda.stream(stream):
                staged = carry(
                    self._collect,
                    migrator._carrier,
                    migrator._group,
                    timeout_s=migrator._timeout_s,
                    spare_bytes=migrator._spare_bytes,
                    on_phase=self._enter,
                )
        except BaseException as error:
            self._future.set_exception(error)
        else:
            self._future.set_result(staged)

    def _enter(self, phase: str) -> None:
        self._phase = phase

    def _collect(self) -> Mapping[int, LayerChange]:
        migrator = self._migrator
        if self._ready is not None:
            # On the host, not on the stream: a peer that copies into this rank's memory takes this
            # rank's word for it.
            wait_for_event(
                self._ready,
                migrator._timeout_s,
                f"rank {migrator._rank}: expected the GPU to get to the migration within "
                f"{migrator._timeout_s:g} s, got it still busy with what came before",
            )
        return self._layers


def _own_group(group: dist.ProcessGroup | None, timeout_s: float) -> dist.ProcessGroup | None:
    """The same ranks in a group that nobody else uses."""
    if not dist.is_initialized():
        return None
    group = dist.group.WORLD if group is None else group
    backend = dist.get_backend_config(group)
    margin = _WATCHDOG_MARGIN_S if "nccl" in backend else 0.0
    return dist.new_group(
        dist.get_process_group_ranks(group),
        backend=backend,
        timeout=datetime.timedelta(seconds=timeout_s + margin),
        use_local_synchronization=True,
    )
