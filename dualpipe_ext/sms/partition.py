"""``SMPartition``: how many SMs communicate, as one setting that everybody concerned reads.

What belongs here: the setting and its rules. Who owns what: the training loop makes one partition
per GPU and is the only one to change it, between steps; a communication buffer follows it
(:meth:`SMPartition.follow`); a pipeline marks steps and the launches that communication runs
beside (:meth:`SMPartition.step`, :meth:`SMPartition.beside`); layers ask it for the limit of their
grids (:meth:`SMPartition.max_sms`). None of them knows of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any
from weakref import WeakMethod

import torch
from torch import nn

from dualpipe_ext.sms.means import (
    DEFAULT_MEANS,
    MEANS,
    Untold,
    check_means,
    has_same_bits,
    make_means,
)

AUTO = "auto"


class SMPartition:
    """The division of one GPU's SMs, read by all that communicate or compute on it.

    Args:
        comm_sms: SMs that carry tokens between GPUs; 0 for copy engines, which take none; "auto"
            for a number that :class:`~dualpipe_ext.sms.SMTuner` finds, and that of the transport
            until then.
        means: how compute beside communication is told, one of
            :data:`~dualpipe_ext.sms.MEANS`: "none", "persistent" (grouped GEMMs with fewer CTAs),
            "yielding" (grouped GEMMs whose CTAs soon make room), "carve_out" (torch's private
            call), "green_context" (a stream with fewer SMs).
        device: the GPU. On a CPU everything here does nothing.

    Raises:
        ValueError: a number that leaves compute nothing; means that are not here; "auto" with means
            whose results depend on the number, which would make losses depend on measured times.

    >>> partition = SMPartition(0, device=torch.device("cpu"))
    >>> partition.comm_sms, partition.max_sms()
    (0, None)
    >>> SMPartition("auto", means="carve_out")
    Traceback (most recent call last):
    ...
    ValueError: expected sm_means whose results have the same bits for every number of SMs (none, \
persistent, yielding) with comm_sms='auto', got 'carve_out'; give a number
    """

    def __init__(
        self,
        comm_sms: int | str = AUTO,
        *,
        means: str = DEFAULT_MEANS,
        device: torch.device | None = None,
    ) -> None:
        check_comm_sms(comm_sms, means)
        self.asked, self.means = comm_sms, means
        self._comm_sms: int | None = None
        self.trying = False
        """Whether the number in force is one of several that are being compared."""
        self._beside = False
        # Each gives the follower, or None once its object is gone.
        self._followers: list[Callable[[], Callable[[int], object] | None]] = []
        self._told: Untold | None = None
        if device is None and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        if device is not None and device.type == "cuda":
            num_sms = torch.cuda.get_device_properties(device).multi_processor_count
            self._told = make_means(means, device, num_sms)
        if comm_sms != AUTO:
            self.set(comm_sms)

    @property
    def comm_sms(self) -> int | None:
        """The number in force; None while "auto" is undecided, or where no SM communicates."""
        return self._comm_sms

    @property
    def num_sms(self) -> int | None:
        """SMs of the GPU; None on a CPU."""
        return None if self._told is None else self._told.num_sms

    @property
    def compute_sms(self) -> int | None:
        """SMs that compute beside communication is told to take; None on a CPU."""
        return None if self._told is None else self._told.left(self._comm_sms or 0)

    def set(self, comm_sms: int) -> None:
        """Change the number, on all ranks alike and between steps; tells the followers.

        Raises:
            ValueError: not a number of SMs, or compute would have none.
        """
        self.check(comm_sms)
        self._followers = [one for one in self._followers if one() is not None]
        told = []
        try:
            for reference in self._followers:
                if (follower := reference()) is not None:
                    follower(comm_sms)
                    told.append(follower)
        except BaseException:
            for follower in told if self._comm_sms is not None else ():
                follower(self._comm_sms)
            raise
        self._comm_sms = comm_sms

    def check(self, comm_sms: int) -> None:
        """Refuse with ``ValueError`` what :meth:`set` would."""
        check_comm_sms(comm_sms, self.means)
        if comm_sms == AUTO:
            raise ValueError("expected comm_sms to be a number by now, got 'auto'")
        if self._told is not None and (
            comm_sms >= self._told.num_sms or self._told.left(comm_sms) < 1
        ):
            raise ValueError(
                f"expected comm_sms that leaves compute some of the {self._told.num_sms} SMs, "
                f"got {comm_sms}"
            )

    def follow(self, follower: Callable[[int], object]) -> None:
        """Call ``follower`` with every number that is set from now on, before it is in force.

        A method does not keep its object alive: the caller does. Who follows may hold the
        partition, and layers that a buffer serves do: the memory of either would wait for the
        garbage collector, which runs in any thread at any time, in the capture of a CUDA graph too.
        """
        is_method = isinstance(follower, MethodType)
        self._followers.append(WeakMethod(follower) if is_method else lambda: follower)

    def max_sms(self) -> int | None:
        """The limit of a grid that is launched now, for kernels that take one; None for none."""
        if self._told is None:
            return None
        return self._told.grid_limit(self._comm_sms or 0, beside=self._beside)

    def step(self) -> AbstractContextManager[Any]:
        """Around a step: compute in the body runs where it has been told to run.

        On CUDA the body may have another current stream, which is ordered after the one outside,
        and that one after the body. The host waits for nothing.
        """
        return nullcontext() if self._told is None else self._told.step(self._comm_sms or 0)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Around launches that communication runs beside; what is launched outside is alone."""
        if self._told is None:
            yield
            return
        before, self._beside = self._beside, True
        try:
            with self._told.beside(self._comm_sms or 0):
                yield
        finally:
            self._beside = before


def check_comm_sms(comm_sms: object, means: str = DEFAULT_MEANS) -> None:
    """Refuse with ``ValueError`` what is no setting at all, on whatever machine."""
    check_means(means)
    if comm_sms == AUTO:
        if not has_same_bits(means):
            same_bits = ", ".join(name for name in MEANS if has_same_bits(name))
            raise ValueError(
                "expected sm_means whose results have the same bits for every number of SMs "
                f"({same_bits}) with comm_sms='auto', got {means!r}; give a number"
            )
        return
    if not isinstance(comm_sms, int) or isinstance(comm_sms, bool) or comm_sms < 0:
        raise ValueError(
            f"expected comm_sms to be 'auto' or an integer of at least 0, got {comm_sms!r}"
        )


def set_partition(model: nn.Module, partition: SMPartition | None) -> None:
    """Let every module in ``model`` that has an attribute ``partition`` ask this one."""
    for module in model.modules():
        if hasattr(module, "partition"):
            module.partition = partition
