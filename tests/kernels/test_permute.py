"""The kernels' rows and sums in the interpreter, against what ``dualpipe_ext.ep.expand`` defines.

The kernels run with ``TRITON_INTERPRET=1`` only (float32 and float64: the interpreter rounds bf16
wrongly); on CPU tensors ``ep.expand`` never calls them, so it is the independent side.
"""

from __future__ import annotations

import os

import pytest
import torch
from dualpipe_ext.kernels import permute

from dualpipe_ext.ep import expand

pytestmark = pytest.mark.skipif(not permute.AVAILABLE, reason="needs Triton")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


def random_map(num_rows=23, num_experts=5, top_k=3, *, alignment=4, spare=3):
    """Some rows with all choices here, some with none, and padding inside and after the groups."""
    gen = torch.Generator().manual_seed(0)
    scores = torch.rand(num_rows, 2 * num_experts, generator=gen)
    idx = scores.topk(top_k).indices
    idx[idx >= num_experts] = -1
    counts = torch.bincount(idx[idx >= 0], minlength=num_experts)
    total = int(((counts + alignment - 1) // alignment * alignment).sum())
    return expand.build_map(idx, counts, alignment=alignment, num_rows=total + spare)


def table_of(m, num_rows):
    return permute.expert_rows_of(m.row, m.turn, m.position, num_rows=num_rows, top_k=m.top_k)


def random_rows(num_rows, size, dtype):
    """Numbers of many sizes: another order of the sum, or a fused product, gives other bits."""
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(num_rows, size, generator=gen, dtype=torch.float64)
    return (x * 10.0 ** torch.randint(-3, 4, x.shape, generator=gen)).to(dtype)


def test_table_of_the_docstring():
    m = [torch.tensor(values) for values in ([0, 1, 1], [0, 0, 1], [2, 0, 3])]
    assert permute.expert_rows_of(*m, num_rows=2, top_k=2).tolist() == [[2, -1], [0, 3]]


@interpreted
def test_examples_of_the_docstrings():
    table = torch.tensor([[2, -1], [0, 3]])
    tokens = torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    out = permute.expand_rows(tokens, table, torch.tensor([2, 0, 3]), 4)
    assert out.tolist() == [[7, 8], [0, 0], [5, 6], [7, 8]]
    rows = torch.tensor([[1.0, 2.0], [9.0, 9.0], [3.0, 4.0], [5.0, 6.0]])
    weights = torch.tensor([2.0, 9.0, 1.0, 10.0])
    assert permute.reduce_rows(rows, table, weights).tolist() == [[3, 4], [52, 64]]
    assert permute.reduce_rows(rows, table, None).tolist() == [[3, 4], [6, 8]]


# Rows of whole and of broken 8-byte words, below and above one program's part of a row.
@interpreted
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1),
        (torch.float32, 1030),
        (torch.float64, 7),
        (torch.bfloat16, 6),
        (torch.bfloat16, 5),
        (torch.uint8, 8),
        (torch.uint8, 4099),
    ],
    ids=str,
)
def test_expand_equals_the_definition(dtype, size):
    m = random_map()
    tokens = random_rows(23, size, torch.float32).abs().clamp_max(255).to(dtype)
    want = expand.expand(tokens, m)
    assert torch.equal(permute.expand_rows(tokens, table_of(m, 23), m.position, m.num_rows), want)


@interpreted
def test_expand_takes_rows_that_start_anywhere():
    m = random_map()
    tokens = random_rows(24, 8, torch.float32).flatten()[1:185].view(23, 8)
    want = expand.expand(tokens, m)
    assert torch.equal(permute.expand_rows(tokens, table_of(m, 23), m.position, m.num_rows), want)
    strided = tokens[:, ::2]
    got = permute.expand_rows(strided, table_of(m, 23), m.position, m.num_rows)
    assert torch.equal(got, want[:, ::2])


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 24, 700])
@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "plain"])
def test_reduce_equals_the_definition(dtype, size, weighted):
    m = random_map()
    rows = random_rows(m.num_rows, size, dtype)
    weights = random_rows(m.num_rows, 1, torch.float32).flatten() if weighted else None
    want = expand.reduce(rows, m, 23, weights)
    assert torch.equal(permute.reduce_rows(rows, table_of(m, 23), weights), want)


@interpreted
def test_reduce_takes_strided_rows():
    m = random_map()
    rows = random_rows(m.num_rows, 40, torch.float32)
    for view in (rows[:, 8:24], rows[:, ::2]):
        want = expand.reduce(view, m, 23, None)
        assert torch.equal(permute.reduce_rows(view, table_of(m, 23), None), want)


@interpreted
def test_sum_starts_at_positive_zero():
    """As the definition's does: -0 alone becomes +0, with or without turns that have no row."""
    table = torch.tensor([[0, -1], [1, 2], [-1, -1]])
    out = permute.reduce_rows(torch.full((3, 4), -0.0), table, None)
    assert not torch.signbit(out).any()


@interpreted
def test_no_rows():
    m = random_map(num_rows=0)
    table = table_of(m, 0)
    tokens = torch.ones(0, 8)
    assert torch.equal(permute.expand_rows(tokens, table, m.position, 3), torch.zeros(3, 8))
    assert permute.expand_rows(tokens, table, m.position, 0).shape == (0, 8)
    assert permute.reduce_rows(torch.ones(3, 8), table, None).shape == (0, 8)


@pytest.mark.parametrize(
    ("rows", "table", "weights", "message"),
    [
        (torch.zeros(2, 4), torch.zeros(2, 1), None, "expected a table int64"),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), None, "expected a table int64"),
        (torch.zeros(2, 4, dtype=torch.int32), None, None, "expected rows"),
        (torch.zeros(8), None, None, "expected rows"),
        (torch.zeros(2, 4), None, torch.zeros(3), "expected weights"),
    ],
)
def test_bad_input(rows, table, weights, message):
    table = torch.zeros(2, 1, dtype=torch.int64) if table is None else table
    with pytest.raises(ValueError, match=message):
        permute.reduce_rows(rows, table, weights)
