"""Divisions of the SMs: whatever the shape, every role that has work has warps, stages and room."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from dualpipe_ext.ep import tuning
from dualpipe_ext.ep.kernel_calls import CombineInput, DispatchInput
from dualpipe_ext.ep.transport import TransportConfig

# Threads that the kernels are compiled for (dispatch.cu, combine.cu), shared memory of a CTA.
DISPATCH_THREADS, TOKEN_THREADS, EXPERT_THREADS = 512, 640, 512
SHARED_BYTES = 227 * 1024

SHAPES = list(itertools.product((1, 2, 8, 64), (1, 8, 32), (128, 896, 7168, 16384, 131072)))
SMS = (1, 2, 8, 15, 16, 24, 47, 48, 132)


def config_of(num_ranks: int, top_k: int, hidden: int) -> TransportConfig:
    return TransportConfig(
        group=None,
        rank=0,
        num_ranks=num_ranks,
        hidden=hidden,
        num_experts=64,
        top_k=top_k,
        max_tokens=1,
        num_sms=None,
        timeout_s=1,
    )


def input_of(hidden: int, dtype: torch.dtype, payload: str) -> DispatchInput:
    out = dtype if payload == "as_is" else torch.float8_e4m3fn
    return DispatchInput(torch.empty(0, hidden, dtype=dtype), None, None, payload, out)


def stage_bytes(row_bytes: int, piece: int, scales: int, config: TransportConfig) -> int:
    """As ``StageLayout`` and ``StageNumbers`` in csrc/ep count them, with float64 weights."""

    def up(number: int, unit: int) -> int:
        return -(-number // unit) * unit

    k, ranks = up(config.top_k, 4), up(config.num_ranks, 4)
    numbers = 4 * (4 + k + ranks + k + up(scales, 4)) + up(8 * config.top_k, 16)
    return up(min(row_bytes, piece), 128) + up(numbers, 128)


def expect_room(t: tuning.Tuning, source: DispatchInput, config: TransportConfig) -> None:
    # What quantises has its rows in registers, and in its stages what becomes of them.
    shrinks = 1 if source.payload == "as_is" else 2
    send = stage_bytes(
        source.in_bytes // shrinks, t.send_piece // shrinks, source.num_scales, config
    )
    receive = stage_bytes(source.out_bytes, t.receive_piece, source.num_scales, config)
    sending = t.send_warps * (t.send_stages * (send + 8) + 12 * config.num_ranks) + 128
    local = t.own_warps * t.own_stages * (send + 8)
    local += t.receive_warps * t.receive_stages * (receive + 8)
    used = sending + local if t.mixed else max(sending, local)
    assert used <= SHARED_BYTES, (t, used)
    warps = (t.send_warps + t.receive_warps) if t.mixed else 0
    assert 32 * max(warps, t.send_warps, t.own_warps + t.receive_warps) <= DISPATCH_THREADS


@pytest.mark.parametrize(("num_ranks", "top_k", "hidden"), SHAPES)
def test_dispatch_fits_and_every_role_has_warps(num_ranks: int, top_k: int, hidden: int) -> None:
    config = config_of(num_ranks, top_k, hidden)
    kinds = [(torch.bfloat16, "as_is"), (torch.float64, "as_is"), (torch.bfloat16, "quantize")]
    kinds.append((torch.float8_e4m3fn, "as_is"))
    for (dtype, payload), sms, layout in itertools.product(kinds, SMS, ("token", "expert")):
        source = input_of(hidden, dtype, payload)
        for in_slab in (False, True) if layout == "token" else (False,):
            handle = SimpleNamespace(layout=layout)
            t = tuning.for_dispatch(source, handle, in_slab, sms, config)
            expect_room(t, source, config)
            assert t.receive_warps >= 1
            assert in_slab or t.receive_stages >= 2
            if t.mixed:
                assert t.send_warps >= 1
                assert t.send_stages >= 2
            else:
                assert t.own_warps >= 1
                assert t.own_stages >= 2
                assert 0 <= t.send_ctas < sms
                assert (t.send_ctas > 0) == (num_ranks > 1)
        pack, unpack = tuning.for_pack(source, sms, config), tuning.for_unpack(source, config)
        for t, stages in ((pack, pack.send_stages), (unpack, unpack.receive_stages)):
            expect_room(t, source, config)
            assert stages >= 2


@pytest.mark.parametrize(("num_ranks", "top_k", "hidden"), SHAPES)
def test_combine_fits_and_every_role_has_warps(num_ranks: int, top_k: int, hidden: int) -> None:
    config = config_of(num_ranks, top_k, hidden)
    source = CombineInput(torch.empty(0, hidden, dtype=torch.bfloat16), None, None, None)
    lists = 16 * (num_ranks + top_k)
    for sms, layout in itertools.product(SMS, ("token", "expert")):
        t = tuning.for_combine(source, SimpleNamespace(layout=layout), sms, config)
        warps = t.send_warps + t.receive_warps if t.mixed else max(t.send_warps, t.receive_warps)
        assert 32 * warps <= (TOKEN_THREADS if layout == "token" else EXPERT_THREADS)
        assert t.receive_warps >= 1
        assert t.mixed or (0 <= t.send_ctas < sms and (t.send_ctas > 0) == (num_ranks > 1))
        stage = stage_bytes(source.row_bytes, t.send_piece, 0, config)
        stages = t.send_warps * t.send_stages
        assert stages * (stage + 8) + warps * lists + 4 * num_ranks <= SHARED_BYTES
        assert layout == "expert" or t.send_stages >= 2
        reduce = tuning.for_reduce(SimpleNamespace(layout=layout))
        most = TOKEN_THREADS if layout == "token" else EXPERT_THREADS
        assert 32 * reduce.receive_warps <= most
        assert reduce.receive_warps * lists + 4 * num_ranks <= SHARED_BYTES


def test_the_share_of_senders_follows_the_work() -> None:
    config = config_of(2, 8, 7168)
    source = input_of(7168, torch.bfloat16, "as_is")

    def senders(layout: str, in_slab: bool = False) -> int:
        return tuning.for_dispatch(
            source, SimpleNamespace(layout=layout), in_slab, 24, config
        ).send_ctas

    # Rows that stay in the slab leave the least to do, copies for every expert the most.
    assert senders("token", in_slab=True) > senders("token") > senders("expert")


def test_segments_travel_in_parts_if_they_are_large() -> None:
    config = replace(config_of(2, 8, 7168), max_tokens=4096)
    assert tuning.segment_parts(2 * 7168, config) == (2, 5, 8)
    assert tuning.segment_parts(7168 // 2, config) == (4, 8)
    assert tuning.segment_parts(2 * 7168, replace(config, max_tokens=128)) == (8,)
    assert tuning.segment_parts(2 * 7168, replace(config, max_tokens=0)) == (8,)


def test_rows_in_turn_get_larger_parts() -> None:
    config = replace(config_of(4, 8, 7168), max_tokens=4096)
    parts = partial(tuning.segment_parts, in_turn=True)
    assert parts(2 * 7168, replace(config, max_tokens=16384)) == (4, 8)
    assert parts(2 * 7168, config) == (8,)
    assert parts(2 * 7168, replace(config, max_tokens=0)) == (8,)


@pytest.mark.parametrize("max_tokens", [0, 1, 2, 3, 7, 8, 9, 13, 64, 1023, 4096])
def test_no_segment_has_more_parts_than_rows(max_tokens: int) -> None:
    # A part has a flag where nvlink has one for every run, of which there are few in small buffers.
    config = replace(config_of(2, 8, 7168), max_tokens=max_tokens)
    ends = tuning.segment_parts(2 * 7168, config, (1, 2, 3, 4, 5, 6, 7, 8))
    assert list(ends) == sorted(set(ends))
    assert ends[-1] == tuning.SEGMENT_UNITS
    assert len(ends) <= max(1, max_tokens)
    if max_tokens % 8 == 0 and max_tokens > 0:
        assert len(ends) == 8
