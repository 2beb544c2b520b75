"""The plain push: rows and places are those of a dispatch; the kernel itself is in tests/gpu."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from unittest.mock import patch

import pytest
import torch

from dualpipe_ext import core
from dualpipe_ext.bench import timing
from dualpipe_ext.bench.ep_cases import PUSH_BF16, PUSH_FP8, EpOptions, make_inputs, wire_rows
from dualpipe_ext.bench.ep_check import placements, wrong_push
from dualpipe_ext.bench.ep_push import PUSH, PushRunner, shapes, slots, with_pushes
from dualpipe_ext.bench.ep_variants import Prepared, Variant, variants
from dualpipe_ext.bench.ranks import Ranks, VirtualRanks
from dualpipe_ext.ep import quantize, reference
from dualpipe_ext.ep.local_ranks import LocalRank, LocalRanks
from tests.bench.runs import small
from tests.ep import host_core
from tests.ep.cases import make_case

RANKS, SMS = 3, 5
needs_core = pytest.mark.skipif(not core.available(), reason=core.why_unavailable())


def test_measured_beside_every_number_of_sms() -> None:
    found = with_pushes(variants(small(transports=("nvlink", "copy_engine"), sms=(8, 24))))
    assert [(one.transport, one.num_sms) for one in found] == [
        *(("nvlink", 8), (PUSH, 8), ("nvlink", 24), (PUSH, 24), ("copy_engine", None)),
    ]
    without = variants(small(transports=("copy_engine", "nccl")))
    assert with_pushes(without) == without


@pytest.mark.parametrize("kind", ["uneven", "repeated", "masked", "all_dropped", "one_expert"])
def test_places_are_those_of_a_dispatch(kind: str) -> None:
    case = make_case(kind, RANKS, max_tokens=7)
    every_idx, xs = torch.cat(case.topk_idx), torch.cat(case.xs)
    want = reference.dispatch(case.xs, case.topk_idx, num_experts=case.num_experts, layout="token")
    places = slots(every_idx, RANKS, case.num_experts // RANKS)
    assert places.dtype == torch.int32
    for rank, received in enumerate(want):
        goes = places[:, rank] >= 0
        rows = torch.zeros_like(received.tokens)
        rows[places[goes, rank].long()] = xs[goes]
        assert goes.sum() == len(rows)
        assert torch.equal(rows, received.tokens)


@pytest.mark.parametrize(("hidden", "num_bytes"), [(7168, 7392), (128, 144)])
def test_rows_of_fp8_carry_their_scales(hidden: int, num_bytes: int) -> None:
    x = torch.randn(3, hidden).bfloat16()
    assert torch.equal(wire_rows(x), x.view(torch.uint8))
    quantised = quantize(x)
    rows = wire_rows(quantised)
    assert rows.shape == (3, num_bytes)
    scale_bytes = hidden // 128 * 4
    values, scales, rest = rows.split([hidden, scale_bytes, num_bytes - hidden - scale_bytes], 1)
    assert torch.equal(values, quantised.values.view(torch.uint8))
    assert torch.equal(scales.contiguous().view(torch.float32), quantised.scales)
    assert not rest.any()


@needs_core
@pytest.mark.parametrize("row_bytes", [16, 144, 7392, 14336, 14352, 65536, 1 << 20])
@pytest.mark.parametrize("num_ranks", [2, 8, 64])
def test_some_shape_fits_any_row(row_bytes: int, num_ranks: int) -> None:
    push_stages = core.module().push_stages
    found = shapes(row_bytes, num_ranks, push_stages)
    assert found
    assert len(set(found)) == len(found)
    for warps, piece in found:
        assert 2 <= push_stages(warps=warps, piece_bytes=piece, num_ranks=num_ranks) <= 4
        assert piece % 16 == 0
        assert piece == row_bytes or (piece < row_bytes and piece % 128 == 0)


def test_what_cannot_be_pushed_says_why() -> None:
    def runner(member: LocalRank, device: str) -> PushRunner:
        ranks = VirtualRanks(member, torch.device(device))
        return PushRunner(Variant(PUSH, 8), small(), make_inputs(small(), ranks), ranks)

    with pytest.raises(ValueError, match="expected --device cuda for a plain push, got cpu"):
        LocalRanks(2).run(runner, "cpu")

    def alone(member: LocalRank) -> PushRunner:
        ranks = VirtualRanks(member, torch.device("cpu"))
        inputs = make_inputs(small(), ranks)
        ranks.device = torch.device("cuda", 0)
        return PushRunner(Variant(PUSH, 8), small(), inputs, ranks)

    with pytest.raises(ValueError, match="expected two ranks or more for a plain push, got 1"):
        LocalRanks(1).run(alone)


# --- with a stand-in for the kernel, which copies between the ranks of this process ---------------


@pytest.fixture(scope="module")
def launches() -> Iterator[ModuleType]:
    if host_core.why_unavailable():
        pytest.skip(host_core.why_unavailable())
    with host_core.host_core() as told:
        told.keep_launches(True)
        yield told


def second_is_fastest(calls: dict, ranks: Ranks, **_: object) -> dict[str, list[float]]:
    """In the place of ``timing.interleaved``, which needs a GPU's clock."""
    for call in calls.values():
        call()
    ranks.barrier()
    return {name: [abs(1 - number)] for number, name in enumerate(calls)}


def push_everything(member: LocalRank, options: EpOptions) -> list[tuple]:
    """What is wrong with each case, before and after a bit was flipped; and what its row tells."""
    ranks = VirtualRanks(member, torch.device("cpu"))
    inputs = make_inputs(options, ranks)
    ranks.device = torch.device("cuda", 0)
    runner = PushRunner(Variant(PUSH, SMS), options, inputs, ranks)
    found = []
    for case in (PUSH_BF16, PUSH_FP8):
        at = placements(inputs, ranks, options.experts // RANKS, case)[member.rank]
        prepared: Prepared = runner.prepare(case, 0)
        ranks.barrier()
        # Nothing of what was tried out is left.
        empty = not prepared.cached.arrived.any()
        ranks.barrier()
        rows = prepared.cached()
        ranks.barrier()
        right = wrong_push(rows, case, inputs, at, member.rank)
        rows[0, 3] ^= 1
        wrong = wrong_push(rows, case, inputs, at, member.rank)
        found.append((empty, right, wrong, prepared.note, prepared.uncached))
    return found


def test_rows_arrive_where_the_check_wants_them(launches: ModuleType) -> None:
    options = small(tokens=9, hidden=7168, experts=6)
    launches.take_launches()
    with patch.object(timing, "interleaved", second_is_fastest):
        told = LocalRanks(RANKS).run(push_everything, options)
    notes = (
        "fastest with 8 warps of 2 stages of 14336 bytes",
        "fastest with 8 warps of 3 stages of 7392 bytes",
    )
    for found in told:
        for (empty, right, wrong, note, uncached), want in zip(found, notes, strict=True):
            assert empty
            assert right is None
            assert wrong == "1 of 27 rows differ, the first is row 0"
            assert note == want
            assert uncached is None
    made = launches.take_launches()
    assert {one["kernel"] for one in made} == {"push"}
    assert {one["rank"] for one in made} == set(range(RANKS))
    assert {(one["num_tokens"], one["ctas"], one["stream"]) for one in made} == {
        (9, SMS, host_core.STREAM)
    }
    assert {(one["warps"], one["stages"], one["piece_bytes"]) for one in made} == {
        *((4, 4, 14336), (8, 2, 14336), (8, 3, 7168), (4, 4, 7392), (8, 3, 7392)),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 2}, "a rank below 2, got 2"),
        ({"x": 8}, "rows on a multiple of 16 bytes, got 8"),
        ({"ctas": 0}, "at least one SM, got 0"),
        ({"warps": 17}, "warps from 1 to 16, got 17"),
        ({"piece_bytes": 24}, "piece_bytes to be a positive multiple of 16, got 24"),
        ({"warps": 16, "piece_bytes": 14336}, "two stages for every warp .*, got 14336"),
    ],
)
def test_launches_that_cannot_be(launches: ModuleType, change: dict, message: str) -> None:
    c = core.module()
    layout = c.PushLayout(num_rows=10, row_bytes=14336)
    table = c.PeerTable([1 << 20, 1 << 21], bytes=layout.bytes)
    given = {"rank": 0, "x": 0, "num_tokens": 5, "slots": 0, "ctas": 8, "warps": 4}
    given["piece_bytes"] = 14336
    assert c.PushArgs(table, layout, **given).stages == 4
    with pytest.raises(ValueError, match=message):
        c.PushArgs(table, layout, **given | change)
    larger = c.PushLayout(num_rows=11, row_bytes=14336)
    with pytest.raises(ValueError, match=f"a layout of at most {layout.bytes} bytes, as the peer"):
        c.PushArgs(table, larger, **given)
    for sizes in ({"num_rows": 0}, {"num_rows": 2**31}, {"row_bytes": 24}, {"row_bytes": 0}):
        with pytest.raises(ValueError, match=f"expected {next(iter(sizes))}"):
            c.PushLayout(**{"num_rows": 10, "row_bytes": 16} | sizes)
