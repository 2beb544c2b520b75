"""What every rank checks of a buffer that goes from one number of SMs to another.

Shapes: R ranks, T tokens of a rank, H hidden, E experts, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualpipe_ext.ep import Buffer, Handle
from tests.ep.cases import Case, make_case
from tests.ep.rank_checks import LAYOUTS, leaf, raises, round_trip_equals_reference, scramble
from tests.ep.ranks import Ranks

# From kernels to copy engines and back, and between numbers.
NUMBERS = (8, 0, 24, 16, 0, 1)


def every_number_gives_the_same_bits(ranks: Ranks) -> None:
    case = make_case("uneven", ranks.num_ranks, hidden=16, dtype=torch.bfloat16)
    buffer = ranks.make_buffer(case, num_slabs=0)
    with_sms = buffer.transport if buffer.num_sms else "nvlink"
    for number in NUMBERS:
        buffer.use_sms(number)
        assert buffer.transport == (with_sms if number else "copy_engine")
        assert buffer.num_sms <= number
        assert bool(buffer.num_sms) == bool(number)
        for how in LAYOUTS:
            round_trip_equals_reference(ranks, buffer, case, how, f"{number} SMs, {how}")
    buffer.check()


def a_backward_takes_the_transport_of_its_forward(ranks: Ranks) -> None:
    """Gradients with a change between forward and backward, against those without one."""
    case = make_case("uneven", ranks.num_ranks, hidden=16, seed=1)
    buffer = ranks.make_buffer(case, num_slabs=0)
    start, other = buffer.num_sms, 0 if buffer.num_sms else 8
    *graph, _ = _forward(ranks, buffer, case)
    want = _backward(*graph)
    *graph, handle = _forward(ranks, buffer, case)
    buffer.use_sms(other)
    *between, _ = _forward(ranks, buffer, case)
    message = raises(ValueError, buffer.dispatch, graph[1][0].detach(), handle=handle)
    assert message.startswith("expected a handle that this Buffer's dispatch returned")
    for one in (graph, between):
        for got, wanted in zip(_backward(*one), want, strict=True):
            assert torch.equal(got, wanted)
    buffer.use_sms(start)
    buffer.dispatch(graph[1][0].detach(), handle=handle)  # its transport is in use again


def _forward(ranks: Ranks, buffer: Buffer, case: Case) -> tuple[Tensor, list[Tensor], Handle]:
    x, idx, weights = ranks.inputs(case)
    leaves = [leaf(x, ranks.device), leaf(weights, ranks.device)]
    recv, handle = buffer.dispatch(leaves[0], idx, leaves[1], layout="expert")
    y, _ = buffer.combine(recv.tokens * 2, handle, weights=recv.weights)
    return (y * scramble(y.detach().cpu(), 3).to(y.device)).sum(), leaves, handle


def _backward(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    loss.backward()
    return [one.grad for one in leaves]


def unused_memory_is_given_up(ranks: Ranks) -> None:
    case = make_case("uneven", ranks.num_ranks, hidden=16)
    buffer = ranks.make_buffer(case, num_slabs=0)
    alone, other = buffer.memory_bytes, 0 if buffer.num_sms else 8
    assert buffer.cannot_use_sms(other) is None
    assert buffer.memory_bytes == alone
    buffer.use_sms(other)
    both = buffer.memory_bytes
    buffer.use_sms(8 if other == 0 else 0)
    assert buffer.memory_bytes == both
    buffer.forget_unused()
    assert buffer.memory_bytes == alone
    round_trip_equals_reference(ranks, buffer, case, {"layout": "expert"}, "after that")
    buffer.use_sms(other)  # made anew
    round_trip_equals_reference(ranks, buffer, case, {"layout": "token"}, "and back")
