"""Cutting a batch into chunks and putting results together."""

from __future__ import annotations

import pytest
import torch

from dualpipe_ext.pipeline.microbatch import backward_inputs, merge, split, uneven


def test_split_and_merge():
    x, y = torch.arange(14.0).reshape(7, 2), torch.arange(7)
    chunks = split("inputs", (x, None, y), 3, 0)
    assert [len(c[0]) for c in chunks] == [3, 2, 2]
    assert all(c[1] is None for c in chunks)
    assert uneven(chunks)
    assert not uneven(split("inputs", (x[:6],), 3, 0))
    a, b = merge([(c[0], c[2].sum()) for c in chunks], 0)
    assert torch.equal(a, x)
    assert torch.equal(b, torch.tensor([3, 7, 11]))
    assert torch.equal(merge([(c[0],) for c in chunks], 0), x)


def test_other_dimension():
    x = torch.arange(12.0).reshape(2, 6)
    assert torch.equal(merge(split("inputs", (x,), 3, 1), 1), x)


def test_chunks_carry_no_graph():
    x = torch.ones(4, requires_grad=True)
    assert not any(chunk[0].requires_grad for chunk in split("inputs", (x,), 2, 0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(4), "inputs to be a tuple or list of tensors, got a tensor"),
        ((3,), "inputs to be tensors or None, got int"),
        ((torch.zeros(1),), r"at least 2 entries along dimension 0, .* got shape \[1\]"),
        ((torch.zeros(()),), r"got shape \[\]"),
    ],
)
def test_bad_batches(values, message):
    with pytest.raises(ValueError, match=message):
        split("inputs", values, 2, 0)


def test_gradients_of_inputs_flow_on_once():
    base = torch.ones(3, requires_grad=True)
    x = base * torch.tensor([1.0, 2.0, 3.0])
    backward_inputs((x, torch.zeros(3)), [[torch.ones(2), None], [None, None]], 0)
    assert torch.equal(base.grad, torch.tensor([1.0, 2.0, 0.0]))
