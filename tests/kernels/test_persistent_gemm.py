"""The persistent grouped GEMMs in the interpreter, in float32, against float64 bit for bit."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from dualpipe_ext.kernels import persistent_gemm
from dualpipe_ext.kernels.grouped_gemm import SHORT_CTAS
from dualpipe_ext.kernels.persistent_gemm import (
    multiply_columns,
    multiply_rows,
)

from tests.kernels.gemm_cases import (
    ENDS,
    padded_blocks,
    powers_of_two,
    product_by_columns,
    product_by_rows,
    spread,
    turned,
    whole_numbers,
)

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)

ends_and_rows = pytest.mark.parametrize(("ends", "num_rows"), ENDS, ids=str)
SMS = [1, 3, None, SHORT_CTAS]


def int32(ends):
    return torch.tensor(ends, dtype=torch.int32)


@ends_and_rows
@pytest.mark.parametrize("transposed", [False, True], ids=["w", "w-transposed"])
def test_rows(ends, num_rows, transposed):
    # Neither is a multiple of a tile; of 16 bytes, both are.
    x = whole_numbers((num_rows, 72), 8, seed=0)
    w = whole_numbers((len(ends), 72, 300), 8, seed=1)
    # What nothing is multiplied with would spoil whatever it came near.
    x[ends[-1] :] = float("nan")
    for group, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if start == end:
            w[group] = float("nan")
    if transposed:
        w = w.transpose(1, 2).contiguous().transpose(1, 2)
    want = product_by_rows(x, w, ends).float()
    for max_sms in SMS:
        out = multiply_rows(x, w, int32(ends), out_dtype=torch.float32, max_sms=max_sms)
        assert torch.equal(out, want)


@ends_and_rows
def test_rows_with_scales(ends, num_rows):
    # 384 columns: half of the last tile is outside.
    size_k, size_n = 256, 384
    x = whole_numbers((num_rows, size_k), 4, seed=0)
    w = whole_numbers((len(ends), size_n, size_k), 4, seed=1).transpose(1, 2)
    x_scales = powers_of_two((num_rows, size_k // 128), seed=2)
    w_scales = powers_of_two((len(ends), size_n // 128, size_k // 128), seed=3).transpose(1, 2)
    want = product_by_rows(x * spread(x_scales, 1), w * spread(w_scales, 1, 2), ends).float()
    for max_sms in SMS:
        out = multiply_rows(
            x,
            w,
            int32(ends),
            x_scales=x_scales,
            w_scales=w_scales,
            out_dtype=torch.float32,
            max_sms=max_sms,
        )
        assert torch.equal(out, want)


@ends_and_rows
def test_columns(ends, num_rows):
    # What belongs to no group would spoil every sum that it comes near.
    x, grad = whole_numbers((num_rows, 136), 8, seed=0), whole_numbers((num_rows, 264), 8, seed=1)
    x[ends[-1] :], grad[ends[-1] :] = float("nan"), float("inf")
    want = product_by_columns(x, grad, ends).float()
    how = {"num_rows": num_rows, "out_dtype": torch.float32}
    for max_sms in SMS:
        assert torch.equal(multiply_columns(x, grad, int32(ends), **how, max_sms=max_sms), want)
        total = whole_numbers(tuple(want.shape), 8, seed=2)
        expected, version = total + want, total._version
        out = multiply_columns(x, grad, int32(ends), **how, total=total, max_sms=max_sms)
        assert out is total
        assert torch.equal(total, expected)
        assert not want.numel() or total._version > version


@ends_and_rows
def test_columns_with_scales(ends, num_rows):
    x, grad = whole_numbers((num_rows, 256), 4, seed=0), whole_numbers((num_rows, 128), 4, seed=1)
    blocks = padded_blocks(ends)
    num_blocks = num_rows // 128 + len(ends)
    x_scales, grad_scales = (powers_of_two((num_blocks, n), seed=n) for n in (256, 128))
    block_of_row = torch.full((num_rows,), 0)
    for block, rows in enumerate(blocks):
        block_of_row[rows.start : rows.stop] = block
    want = product_by_columns(x * x_scales[block_of_row], grad * grad_scales[block_of_row], ends)
    operands = turned(x, ends, num_blocks), turned(grad, ends, num_blocks), int32(ends)
    how = {"x_scales": x_scales, "grad_scales": grad_scales, "num_rows": num_rows}
    how["out_dtype"] = torch.float32
    for max_sms in (3, SHORT_CTAS):
        out = multiply_columns(*operands, **how, max_sms=max_sms)
        assert torch.equal(out, want.float())
        multiply_columns(*operands, **how, total=out, max_sms=max_sms)
        assert torch.equal(out, 2 * want.float())


@pytest.mark.parametrize(("steps", "tiles"), [(1, 14), (8, 8), (56, 2), (57, 1), (500, 1)])
def test_short_ctas_have_about_as_much_to_do(steps, tiles):
    grid = persistent_gemm._grid(torch.device("cpu"), SHORT_CTAS, 1000, steps)
    assert (grid.num_ctas, grid.tiles_each, grid.queue) == (-(-1000 // tiles), tiles, None)


@pytest.mark.parametrize(("num_tiles", "each"), [(1, 1), (31, 1), (32, 2), (100, 6), (500, 14)])
def test_short_ctas_leave_no_sm_idle(num_tiles, each):
    """Four SMs in the interpreter, four CTAs for each of them at least."""
    grid = persistent_gemm._grid(torch.device("cpu"), SHORT_CTAS, num_tiles, 1)
    assert (grid.num_ctas, grid.tiles_each) == (-(-num_tiles // each), each)


def test_more_tiles_than_a_sweep():
    """2048 rows of tiles are one sweep, here with two columns of tiles."""
    x, w = whole_numbers((2300, 8), 8, seed=0), whole_numbers((2, 8, 260), 8, seed=1)
    ends, how = [2290, 2300], {"out_dtype": torch.float32}
    out = multiply_rows(x, w, int32(ends), **how)
    assert torch.equal(out, product_by_rows(x, w, ends).float())
    x, grad = whole_numbers((9, 2300), 8, seed=0), whole_numbers((9, 260), 8, seed=1)
    out = multiply_columns(x, grad, int32([4, 9]), num_rows=9, **how)
    assert torch.equal(out, product_by_columns(x, grad, [4, 9]).float())


def test_strided_rows():
    x, grad = whole_numbers((40, 160), 8, seed=0), whole_numbers((40, 96), 8, seed=1)
    w = whole_numbers((2, 80, 64), 8, seed=2)
    ends, how = int32([25, 40]), {"out_dtype": torch.float32}
    want = multiply_rows(x[:, :80].contiguous(), w, ends, **how)
    assert torch.equal(multiply_rows(x[:, :80], w, ends, **how), want)
    want = multiply_columns(x[:, :80].contiguous(), grad, ends, num_rows=40, **how)
    assert torch.equal(multiply_columns(x[:, :80], grad, ends, num_rows=40, **how), want)


@pytest.mark.parametrize(
    "bad", [[20, 10], [5, 999], [-7, 40], [2**31 - 1, -(2**31)], [40, 0, 40, 0, 40]], ids=str
)
@pytest.mark.filterwarnings("error")
def test_offsets_that_lie_touch_nothing_outside(bad):
    """The rows around the tensors stay as they were, and nothing fails."""
    around = torch.full((80, 64), 7.0)
    x, w = around[20:60], torch.ones(len(bad), 64, 64)
    multiply_rows(x, w, int32(bad), out_dtype=torch.float32)
    out = multiply_columns(x, x, int32(bad), num_rows=40, out_dtype=torch.float32)
    assert torch.isfinite(out).all()


def test_no_more_blocks_than_there_are():
    """Three times 300 rows are nine blocks; 300 rows of five groups have seven at most."""
    scales = torch.full((14, 128), float("nan"))
    scales[:7] = 1.0
    columns, offsets = torch.ones(128, 7 * 128), int32([300, 0, 300, 0, 300])
    how = {"x_scales": scales[:7], "grad_scales": scales[:7]}
    out = multiply_columns(columns, columns, offsets, num_rows=300, out_dtype=torch.float32, **how)
    assert torch.isfinite(out).all()
