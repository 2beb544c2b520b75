"""The permutation kernels on a GPU: the bits that the torch operations give on the CPU."""

from __future__ import annotations

import pytest
import torch
from dualpipe_ext.kernels import permute

from dualpipe_ext.ep import expand

ROWS, EXPERTS, TOP_K = 501, 7, 6


def to_gpu(m):
    fields = {name: getattr(m, name) for name in expand.ExpertMap.__dataclass_fields__}
    on_gpu = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
    return expand.ExpertMap(**on_gpu)


@pytest.fixture(scope="module")
def maps():
    gen = torch.Generator().manual_seed(0)
    idx = torch.rand(ROWS, 2 * EXPERTS, generator=gen).topk(TOP_K).indices
    idx[idx >= EXPERTS] = -1
    counts = torch.bincount(idx[idx >= 0], minlength=EXPERTS)
    total = int(((counts + 15) // 16 * 16).sum())
    m = expand.build_map(idx, counts, alignment=16, num_rows=total + 9)
    return m, to_gpu(m)


def random_rows(num_rows, size, dtype):
    """Numbers of many sizes: another order of the sum, or a fused product, gives other bits."""
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(num_rows, size, generator=gen, dtype=torch.float64)
    return (x * 10.0 ** torch.randint(-3, 4, x.shape, generator=gen)).to(dtype)


def same_bits(got, want):
    return torch.equal(got.cpu().view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("size", [7168, 1000, 5])
def test_expand_and_reduce(maps, dtype, size):
    here, there = maps
    tokens = random_rows(ROWS, size, dtype)
    assert expand._kernels_for(tokens.cuda()) is permute
    assert same_bits(expand.expand(tokens.cuda(), there), expand.expand(tokens, here))

    rows = random_rows(here.num_rows, size, dtype)
    weights = random_rows(here.num_rows, 1, torch.float32).flatten()
    for factor in (None, weights):
        want = expand.reduce(rows, here, ROWS, factor)
        on_gpu = None if factor is None else factor.cuda()
        assert same_bits(expand.reduce(rows.cuda(), there, ROWS, on_gpu), want)


def test_fp8_bytes_and_their_scales(maps):
    here, there = maps
    values = random_rows(ROWS, 1024, torch.float32).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = random_rows(ROWS, 8, torch.float32)
    for rows in (values, scales):
        assert same_bits(expand.expand(rows.cuda(), there), expand.expand(rows, here))


def test_subnormal_numbers_are_not_flushed(maps):
    here, there = maps
    rows = random_rows(here.num_rows, 64, torch.float32) * 2.0**-140
    weights = torch.full((here.num_rows,), 0.75)
    want = expand.reduce(rows, here, ROWS, weights)
    assert 0 < want.abs().max() < torch.finfo(torch.float32).tiny
    assert same_bits(expand.reduce(rows.cuda(), there, ROWS, weights.cuda()), want)


def test_no_rows(maps):
    _, there = maps
    none = expand.build_map(
        torch.empty(0, 2, dtype=torch.int64, device="cuda"),
        torch.zeros(3, dtype=torch.int64, device="cuda"),
        num_rows=4,
    )
    tokens = torch.ones(0, 8, device="cuda")
    assert torch.equal(expand.expand(tokens, none), torch.zeros(4, 8, device="cuda"))
    assert expand.reduce(torch.ones(4, 8, device="cuda"), none, 0, None).shape == (0, 8)
    no_columns = torch.ones(ROWS, 0, device="cuda")
    assert expand.expand(no_columns, there).shape == (there.num_rows, 0)


def test_autograd_still_works(maps):
    """Someone who differentiates the helpers themselves gets the torch operations."""
    _, there = maps
    tokens = torch.ones(ROWS, 8, device="cuda", requires_grad=True)
    expand.reduce(expand.expand(tokens, there), there, ROWS, None).sum().backward()
    uses = torch.bincount(there.row, minlength=ROWS).float()
    assert torch.equal(tokens.grad, uses[:, None].expand(ROWS, 8))


def test_more_than_2_to_31_elements():
    num_rows = 2**19 + 3
    position = torch.tensor([num_rows - 1, 0], device="cuda")
    # 4097 bytes: a row of single bytes, so that byte offsets are element offsets.
    tokens = torch.arange(4097, device="cuda").to(torch.uint8)[None]
    out = permute.expand_rows(tokens, position[None], position, num_rows)
    assert torch.equal(out[0], tokens[0])
    assert torch.equal(out[-1], tokens[0])
    assert not out[1:-1].any()
    del out

    rows = torch.zeros(num_rows, 4104, dtype=torch.bfloat16, device="cuda")
    rows[-1], rows[0] = 1.0, 2.0
    out = permute.reduce_rows(rows, position[None], None)
    assert torch.equal(out, torch.full((1, 4104), 3.0, device="cuda").bfloat16())

    table = torch.full((num_rows, 1), -1, device="cuda")
    table[-1] = 0
    out = permute.reduce_rows(rows, table, None)
    assert (out[-1] == 2).all()
    assert not out[:-1].any()
