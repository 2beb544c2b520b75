"""Groups and tiles of the grouped GEMMs, in the interpreter."""

from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from dualpipe_ext.kernels.gemm_tiles import group_rows, padded_groups, place  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


def test_group_rows_example():
    @triton.jit
    def kernel(offsets_ptr, out_ptr, num_rows, num_groups, GROUPS: tl.constexpr):  # noqa: N803
        sizes, ends = group_rows(offsets_ptr, num_rows, num_groups, GROUPS)
        tl.store(out_ptr + tl.arange(0, GROUPS), sizes)
        tl.store(out_ptr + GROUPS + tl.arange(0, GROUPS), ends)

    out = torch.empty(2, 8, dtype=torch.int32)
    kernel[(1,)](torch.tensor([2, 2, 3], dtype=torch.int32), out, 4, 3, GROUPS=8)
    assert out.tolist() == [[2, 0, 1, 1, 0, 0, 0, 0], [2, 2, 3, 4, 4, 4, 4, 4]]


@pytest.mark.parametrize(("row_tiles", "col_tiles"), [(1, 1), (5, 3), (16, 4), (35, 2)])
def test_places_are_all_tiles_sweep_by_sweep(row_tiles, col_tiles):
    @triton.jit
    def kernel(out_ptr, row_tiles, col_tiles):
        tile = tl.program_id(0)
        row, col = place(tile, row_tiles, col_tiles, 16)
        tl.store(out_ptr + 2 * tile, row)
        tl.store(out_ptr + 2 * tile + 1, col)

    num = row_tiles * col_tiles
    out = torch.empty(num, 2, dtype=torch.int32)
    kernel[(num,)](out, row_tiles, col_tiles)
    places = [tuple(pair) for pair in out.tolist()]
    assert sorted(places) == [(r, c) for r in range(row_tiles) for c in range(col_tiles)]
    assert places == sorted(places, key=lambda at: (at[0] // 16, at[1], at[0]))


def test_padded_groups():
    assert [padded_groups(n) for n in (1, 32, 33, 257)] == [32, 32, 64, 512]
