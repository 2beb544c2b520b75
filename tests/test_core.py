"""The compiled core on a machine without a GPU: it imports, and refuses bad input clearly."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dualpipe_ext import core
from dualpipe_ext.errors import CommTimeoutError, DualPipeError

needs_core = pytest.mark.skipif(not core.available(), reason=core.why_unavailable())

SHAPE = {"num_ranks": 8, "num_experts": 256, "top_k": 8, "max_tokens": 4096, "row_bytes": 14336}

RECORD = {
    "code": 1,
    "phase": "barrier",
    "rank": 3,
    "peer": 5,
    "chunk": 0,
    "expected": 7,
    "seen": 6,
    "epoch": 7,
}


def test_no_record_raises_nothing():
    core.raise_on_failure(None, timeout_s=1.0)


def test_a_time_out_names_who_waited_for_whom():
    with pytest.raises(CommTimeoutError) as caught:
        core.raise_on_failure(RECORD, timeout_s=0.5)
    assert str(caught.value) == (
        "rank 3 waited 0.5 s for rank 5 in phase barrier, chunk 0: "
        "expected its flag to reach 7, saw 6 (epoch 7)"
    )


def test_messages_that_do_not_fit_are_told_apart():
    own, theirs = 64 | 2 << 17 | 1 << 19 | 2 << 20, 32 | 1 << 16 | 1 << 17
    with pytest.raises(ValueError, match=r"reset\(\)") as caught:
        core.raise_on_failure(RECORD | {"code": 2, "expected": own, "seen": theirs}, timeout_s=0.5)
    assert str(caught.value).startswith(
        "expected the same call, dtype, fp8 and weights on all ranks, got a dispatch with rows of "
        "512 bytes, scales, numbers of 4 bytes at rank 5, a combine in float32 with rows of 1024 "
        "bytes, numbers of 8 bytes at rank 3 (call 7)"
    )


def test_an_unknown_code_is_not_a_time_out():
    with pytest.raises(DualPipeError, match="known error code"):
        core.raise_on_failure(RECORD | {"code": 99}, timeout_s=0.5)


def test_a_missing_core_says_what_to_do(monkeypatch):
    monkeypatch.setattr(core, "_load", lambda: (None, "it was not built"))
    assert not core.available()
    with pytest.raises(DualPipeError, match=r"it was not built.*DUALPIPE_CUDA=1"):
        core.module()


@needs_core
def test_imports_without_torch_and_without_a_gpu():
    program = (
        "import sys; from dualpipe_ext import core; core.module().devices(); "
        "sys.exit('torch' in sys.modules)"
    )
    # No device is visible, as on a machine without a GPU.
    done = subprocess.run(
        [sys.executable, "-c", program], env={"CUDA_VISIBLE_DEVICES": ""}, timeout=60
    )
    assert done.returncode == 0


@needs_core
def test_layout_tells_what_is_where():
    layout = core.module().WorkspaceLayout(**SHAPE, num_slabs=2)
    regions = layout.regions()
    assert regions["state"] == (0, 128)
    assert regions["barrier_flags"] == (128, 8 * 128)
    assert regions["permits"] == (9 * 128, 8 * 128)
    assert regions["rows"] == (layout.slab_offset(0), 8 * 4096 * 14336)
    assert layout.bytes == layout.slab_offset(1) + layout.slab_bytes
    # Row by row it is the payload that counts: under 1% for everything else.
    assert layout.bytes < 1.01 * 2 * 8 * 4096 * 14336


@needs_core
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_ranks": 0}, "num_ranks from 1 to 64, got 0"),
        ({"num_ranks": 65, "num_experts": 65}, "num_ranks from 1 to 64, got 65"),
        ({"num_experts": 250}, r"multiple of num_ranks \(8\), got 250"),
        ({"top_k": 33}, "top_k from 1 to 32, got 33"),
        ({"max_tokens": 0}, "max_tokens of at least 1, got 0"),
        ({"row_bytes": 100}, "row_bytes to be a positive multiple of 16, got 100"),
        ({"num_slabs": 0}, "num_slabs of at least 1, got 0"),
        ({"max_tokens": 2**60}, r"less than 2\^63 bytes"),
    ],
)
def test_impossible_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        core.module().WorkspaceLayout(**SHAPE | change)


@needs_core
@pytest.mark.parametrize(
    ("bases", "message"),
    [
        ([], "from 1 to 64 base addresses, got 0"),
        ([0], "multiple of 128 for rank 0, got 0"),
        ([64], "multiple of 128 for rank 0, got 64"),
        ([128] * 65, "from 1 to 64 base addresses, got 65"),
    ],
)
def test_bad_peer_tables(bases, message):
    with pytest.raises(ValueError, match=message):
        core.module().PeerTable(bases, bytes=1024)


@needs_core
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ends": []}, "ascending ends of parts, the last 8"),
        ({"ends": [2, 5]}, "ascending ends of parts, the last 8"),
        ({"ends": [5, 5, 8]}, "ascending ends of parts, the last 8"),
        ({"ends": [0, 8]}, "ascending ends of parts, the last 8"),
        ({"ends": [4, 9]}, "ascending ends of parts, the last 8"),
        ({"ends": [*range(1, 9), 8]}, "ascending ends of parts, the last 8"),
        ({"take_ctas": 0}, "at least one SM for a kernel, got 0"),
    ],
)
def test_bad_parts(change, message):
    c = core.module()
    warps = c.Tuning(
        send_ctas=1,
        send_warps=1,
        send_stages=2,
        own_warps=0,
        own_stages=0,
        receive_warps=1,
        receive_stages=2,
        send_piece=1024,
        receive_piece=1024,
        mixed=False,
    )
    good = {"ends": [2, 5, 8], "in_turn": True, "together": True, "pack_ctas": 1, "take_ctas": 1}
    c.CopyShape(staging_slab=1, pack=warps, take=warps, **good)
    with pytest.raises(ValueError, match=message):
        c.CopyShape(staging_slab=1, pack=warps, take=warps, **good | change)
