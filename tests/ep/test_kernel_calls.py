"""What kernels are given: dense, aligned, and never an empty tensor's missing address."""

from __future__ import annotations

import pytest
import torch

from dualpipe_ext.ep import quantize
from dualpipe_ext.ep.kernel_calls import combine_input, dispatch_input


def test_a_rank_without_rows_still_has_addresses() -> None:
    # An empty tensor's address is 0, which the kernel reads as "not given": its tokens would then
    # get no numbers back from other ranks.
    given = combine_input(torch.empty(0, 16), None, None, torch.empty(0, 3))
    assert given.rows.data_ptr() != 0
    assert given.row_weights is not None
    assert given.row_weights.data_ptr() != 0
    assert given.row_weights.shape[1:] == (3,)
    by_expert = combine_input(torch.empty(0, 16), None, None, torch.empty(0))
    assert by_expert.row_weights is not None
    assert by_expert.row_weights.data_ptr() != 0
    assert combine_input(torch.empty(0, 16), None, None, None).row_weights is None


@pytest.mark.parametrize("shift", [0, 1])
def test_numbers_of_choices_start_on_16_bytes(shift: int) -> None:
    # A view into a packed tensor is dense, but bulk copies need its address aligned.
    numbers = torch.arange(1 + 6 * 4, dtype=torch.float32)[shift : shift + 24].view(6, 4)
    sent = dispatch_input(torch.zeros(6, 16), numbers, fp8=False, pow2_scales=False)
    returned = combine_input(torch.zeros(6, 16), None, None, numbers)
    for tensor in (sent.weights, returned.row_weights):
        assert tensor is not None
        assert tensor.data_ptr() % 16 == 0
        assert torch.equal(tensor, numbers)


def test_only_bfloat16_is_quantised_by_the_kernel() -> None:
    x = torch.randn(3, 128)
    in_kernel = dispatch_input(x.bfloat16(), None, fp8=True, pow2_scales=True)
    assert (in_kernel.payload, in_kernel.in_bytes, in_kernel.out_bytes) == (
        "quantize_pow2",
        256,
        128,
    )
    before = dispatch_input(x, None, fp8=True, pow2_scales=False)
    want = quantize(x)
    assert (before.payload, before.num_scales) == ("as_is", 1)
    assert torch.equal(before.rows.view(torch.uint8), want.values.view(torch.uint8))
    assert torch.equal(before.scales, want.scales)


def test_factors_have_the_dtype_of_the_sums() -> None:
    weights = torch.ones(2, dtype=torch.float64)
    assert combine_input(torch.ones(2, 8).bfloat16(), weights, None, None).weights.dtype == (
        torch.float32
    )
    assert combine_input(torch.ones(2, 2).double(), weights.float(), None, None).weights.dtype == (
        torch.float64
    )
