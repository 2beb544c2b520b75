"""Buffers that change their number of SMs, on transports that a CPU can play.

With the transports themselves: test_transports.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch

from dualpipe_ext.ep import Buffer, registry, switching
from dualpipe_ext.ep.collective import CollectiveTransport
from tests.ep import switching_checks
from tests.ep.cases import make_case
from tests.ep.rank_checks import raises
from tests.ep.ranks import GLOO, Ranks


class _Played(CollectiveTransport):
    """A transport of peer memory as far as its buffer can see, over torch.distributed."""

    memory_bytes = 1000
    not_here: str | None = None

    @classmethod
    def unavailable(cls, config):
        return cls.not_here

    @classmethod
    def memory_needed(cls, config):
        return 1000


class Kernels(_Played):
    name = "nvlink"

    def __init__(self, config):
        super().__init__(config)
        self.comm_sms = config.num_sms or 24

    comm_sms = 24

    def use_sms(self, num_sms):
        self.comm_sms = num_sms


class Copies(_Played):
    name = "copy_engine"
    memory_bytes = 2000
    comm_sms = 0


def played(**changes: Any) -> ExitStack:
    """Where the transports are played; changes replace what ``switching`` has under these names."""
    stack = ExitStack()
    kinds = (Kernels, Copies, CollectiveTransport)
    stack.enter_context(patch.object(registry, "_TRANSPORTS", kinds))
    parts = {"NVLinkTransport": Kernels, "CopyEngineTransport": Copies}
    parts["_short_of_memory"] = lambda num_bytes: None
    for name, value in {**parts, **changes}.items():
        stack.enter_context(patch.object(switching, name, value))
    return stack


def _on_both(ranks: Ranks, check: Callable[[Ranks], None]) -> None:
    with played():
        for ranks.transport in ("nvlink", "copy_engine"):
            check(ranks)


def same_bits(ranks: Ranks) -> None:
    _on_both(ranks, switching_checks.every_number_gives_the_same_bits)


def backward(ranks: Ranks) -> None:
    _on_both(ranks, switching_checks.a_backward_takes_the_transport_of_its_forward)


def memory(ranks: Ranks) -> None:
    with played():
        ranks.transport = "nvlink"
        switching_checks.unused_memory_is_given_up(ranks)


def too_little_memory_on_one_rank(ranks: Ranks) -> str:
    """What the ranks are told if the last one has no room."""
    short = (lambda num_bytes: f"{num_bytes} bytes") if ranks.last else (lambda num_bytes: None)
    with played(_short_of_memory=short):
        ranks.transport = "nvlink"
        case = make_case("uneven", ranks.num_ranks)
        buffer = ranks.make_buffer(case)
        told = buffer.cannot_use_sms(0)
        message = raises(ValueError, buffer.use_sms, 0)
        assert message == f"expected num_sms that can be used here, got 0: {told}"
        assert buffer.transport == "nvlink"
        buffer.use_sms(8)  # the same transport: needs nothing
        assert buffer.num_sms == 8
    return told


def test_on_two_ranks() -> None:
    *_, told = zip(
        *GLOO.run(2, same_bits, backward, memory, too_little_memory_on_one_rank), strict=True
    )
    assert told == ("rank 1: 1000 bytes",) * 2


SIZES = {"hidden": 4, "num_experts": 2, "top_k": 2, "max_tokens": 8}


def test_collective_takes_no_sms() -> None:
    buffer = Buffer(**SIZES, transport="collective")
    assert buffer.num_sms is None
    assert buffer.cannot_use_sms(8) == "transport 'collective' takes no SMs of its own"
    with pytest.raises(ValueError, match="got 0: transport 'collective' takes no SMs of its own"):
        buffer.use_sms(0)
    with pytest.raises(ValueError, match="num_sms to be an integer of at least 0, got -1"):
        buffer.use_sms(-1)


def test_a_transport_that_is_not_here_leaves_the_buffer_as_it_was() -> None:
    with played():
        buffer = Buffer(**SIZES, transport="nvlink")
        with patch.object(Copies, "not_here", "no engines"):
            assert buffer.cannot_use_sms(0) == "no engines"
            with pytest.raises(ValueError, match="got 0: no engines"):
                buffer.use_sms(0)
        x = torch.ones(2, 4)
        recv, handle = buffer.dispatch(x, torch.tensor([[0, 1], [1, -1]]))
        assert torch.equal(buffer.combine(recv.tokens, handle)[0], x)


def test_the_number_that_a_buffer_is_made_with() -> None:
    with played():
        assert Buffer(**SIZES).num_sms == 24
        assert Buffer(**SIZES, num_sms=16).num_sms == 16
        assert Buffer(**SIZES, transport="copy_engine").num_sms == 0


def test_compiled_calls_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    with played():
        buffer = Buffer(**SIZES, transport="nvlink")
        x, idx = torch.randn(3, 4), torch.tensor([[0, 1], [1, -1], [-1, 0]])

        def there_and_back(x: torch.Tensor) -> torch.Tensor:
            recv, handle = buffer.dispatch(x, idx, layout="expert", max_recv_tokens=6)
            return buffer.combine(recv.tokens * 3, handle)[0]

        compiled = torch.compile(there_and_back, backend="aot_eager")
        want = there_and_back(x)
        for number in (8, 0, 8):
            buffer.use_sms(number)
            assert torch.equal(compiled(x), want)
