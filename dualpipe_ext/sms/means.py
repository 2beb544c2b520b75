"""The means by which compute learns that communication has taken some of the SMs.

What belongs here: one class per means, what each needs of torch and of the GPU, and which one is
the default. Who asks them, and when, is in ``partition.py``.

n SMs communicate, of S that the GPU has.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, ClassVar

import torch

from dualpipe_ext.kernels.grouped_gemm import SHORT_CTAS


class Untold:
    """``none``: compute takes all SMs, and its CTAs wait where communication is.

    Base of the others.

    Args:
        device: a GPU.
        num_sms: S.
    """

    same_bits: ClassVar[bool] = True
    """Whether results have the same bits for every n."""

    def __init__(self, device: torch.device, num_sms: int) -> None:
        self.device, self.num_sms = device, num_sms

    @classmethod
    def unavailable(cls) -> str | None:
        """Why this torch cannot do it, in one line; None if it can."""
        return None

    def left(self, comm_sms: int) -> int:
        """SMs that compute beside communication is told to take."""
        return self.num_sms

    def grid_limit(self, comm_sms: int, *, beside: bool) -> int | None:
        """SMs for a kernel that takes a limit, beside communication or alone; None for all.

        ``SHORT_CTAS`` for all, by CTAs that make room soon (``kernels/grouped_gemm.py``).
        """
        return None

    def step(self, comm_sms: int) -> AbstractContextManager[Any]:
        """Around all launches of a step."""
        return nullcontext()

    def beside(self, comm_sms: int) -> AbstractContextManager[Any]:
        """Around launches of compute that communication runs beside."""
        return nullcontext()


class Persistent(Untold):
    """``persistent``: grouped GEMMs have S - n CTAs beside communication, and S otherwise.

    Other kernels are not told. A limit is given always, so that the same kernel runs whatever n:
    its results do not depend on the limit.
    """

    def left(self, comm_sms: int) -> int:
        return self.num_sms - comm_sms

    def grid_limit(self, comm_sms: int, *, beside: bool) -> int | None:
        return self.left(comm_sms) if beside else self.num_sms


class Yielding(Untold):
    """``yielding``: grouped GEMMs by CTAs that are over in some tens of microseconds, always.

    Whatever communication launches, on its stream of high priority, gets SMs that soon, and only
    as many as it asks for. The libraries' products hold all SMs from their first tile to their
    last, milliseconds long, and give every CTA a fixed share: communication waits for their end,
    and a product that begins beside communication ends as late as that.
    """

    def grid_limit(self, comm_sms: int, *, beside: bool) -> int | None:
        return SHORT_CTAS


class CarveOut(Untold):
    """``carve_out``: torch's own matrix products leave n SMs out, beside communication.

    A private call of torch. Its libraries may choose another kernel for another number of SMs, so
    results are equal but for rounding.
    """

    same_bits = False

    @classmethod
    def unavailable(cls) -> str | None:
        if _carve_out() is None:
            return f"torch {torch.__version__} has no _set_sm_carveout_experimental"
        return None

    def left(self, comm_sms: int) -> int:
        return self.num_sms - comm_sms

    @contextmanager
    def beside(self, comm_sms: int) -> Iterator[None]:
        if comm_sms == 0:
            yield
            return
        calls = _carve_out()
        assert calls is not None
        get, put = calls
        before = get()
        put(comm_sms)
        try:
            yield
        finally:
            put(before)


# A Hopper GPU is divided in groups of as many SMs. Source: CUDA driver API, green contexts,
# cuDevSmResourceSplitByCount: at least 8 and a multiple of 8 from compute capability 9.0 on.
SM_GROUP = 8


class Green(Untold):
    """``green_context``: a step's compute runs on a stream that has S - n SMs and no others.

    Rounded down to groups of :data:`SM_GROUP`. It holds for all compute of a step, also where
    nothing communicates: autograd runs a backward on the stream of its forward, and whether that
    will be beside communication is not known then. As with ``carve_out``, results are equal but
    for rounding.
    """

    same_bits = False

    @classmethod
    def unavailable(cls) -> str | None:
        if _green_contexts() is None:
            return f"torch {torch.__version__} has no green contexts with streams"
        return None

    def left(self, comm_sms: int) -> int:
        if comm_sms == 0:
            return self.num_sms
        return (self.num_sms - comm_sms) // SM_GROUP * SM_GROUP

    @contextmanager
    def step(self, comm_sms: int) -> Iterator[None]:
        if comm_sms == 0:
            yield
            return
        outer = torch.cuda.current_stream(self.device)
        stream = green_stream(self.device.index, self.left(comm_sms))
        stream.wait_stream(outer)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            # Memory of either stream that is given back from here on is used again only after
            # what the other one has done with it.
            outer.wait_stream(stream)


_BY_NAME: dict[str, type[Untold]] = {
    "none": Untold,
    "persistent": Persistent,
    "yielding": Yielding,
    "carve_out": CarveOut,
    "green_context": Green,
}
MEANS = tuple(_BY_NAME)
# Which of them a run takes that asks for none: the best of those that have been measured
# (docs/LOG.md, "Overlapped pairs"), by `dualpipe bench pipeline --sm-means ...`.
DEFAULT_MEANS = "yielding"


def check_means(means: object) -> None:
    """Refuse with ``ValueError`` what is not one of :data:`MEANS`."""
    if means not in MEANS:
        raise ValueError(f"expected sm_means to be one of {', '.join(MEANS)}, got {means!r}")


def depends_on_number(means: str) -> bool:
    """Whether compute does anything else for another number of SMs."""
    return _BY_NAME[means] not in (Untold, Yielding)


def has_same_bits(means: str) -> bool:
    """Whether results have the same bits for every number of SMs."""
    return _BY_NAME[means].same_bits


def make_means(means: str, device: torch.device, num_sms: int) -> Untold:
    """The means of that name, for a GPU of ``num_sms`` SMs.

    Raises:
        ValueError: no such means, or this torch lacks what it needs.
    """
    check_means(means)
    kind = _BY_NAME[means]
    reason = kind.unavailable()
    if reason is not None:
        raise ValueError(f"expected sm_means that can be used here, got {means!r}: {reason}")
    return kind(device, num_sms)


@cache
def green_stream(device_index: int, num_sms: int) -> Any:
    """A stream on ``num_sms`` SMs of a GPU; made once, since work on it may outlive its users."""
    contexts = _green_contexts()
    assert contexts is not None
    context = contexts.create(num_sms=num_sms, device_id=device_index)
    _green_alive.append(context)
    return context.Stream()


# A stream does not keep its context.
_green_alive: list[Any] = []


def _green_contexts() -> Any:
    """``torch.cuda.green_contexts.GreenContext``, or None where there is nothing like it."""
    try:
        module = importlib.import_module("torch.cuda.green_contexts")
    except ImportError:
        return None
    found = getattr(module, "GreenContext", None)
    supported = getattr(module, "SUPPORTED", True)
    return found if supported and hasattr(found, "create") and hasattr(found, "Stream") else None


def _carve_out() -> tuple[Callable[[], int | None], Callable[[int | None], None]] | None:
    """torch's private calls to read and to set the number of SMs left out."""
    get = getattr(torch._C, "_get_sm_carveout_experimental", None)
    put = getattr(torch._C, "_set_sm_carveout_experimental", None)
    return None if get is None or put is None else (get, put)
