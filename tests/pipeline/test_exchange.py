"""What a stage may hand to the next one, and what it is told otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dualpipe_ext.pipeline.exchange import TensorSpec, _specs_of
from dualpipe_ext.pipeline.plan import Action, Op

MESSAGE = Action(Op.F, 3, 0)


class Distributed(Tensor):
    """As a DTensor looks from outside."""

    def to_local(self) -> Tensor:
        return self.as_subclass(Tensor)


def specs(*outputs: Any) -> tuple[TensorSpec, ...]:
    needs_grad = [isinstance(x, Tensor) and x.is_floating_point() for x in outputs]
    return _specs_of(MESSAGE, outputs, needs_grad, torch.device("cpu"))


def test_shapes_and_dtypes_are_announced() -> None:
    assert specs(torch.zeros(2, 3), torch.zeros(4, dtype=torch.int64)) == (
        TensorSpec((2, 3), torch.float32, True),
        TensorSpec((4,), torch.int64, False),
    )
    assert specs() == ()


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (7, "expected stage 3 to return tensors, got int"),
        (torch.zeros(2).as_subclass(Distributed), "to return plain tensors, got a DTensor"),
        (torch.zeros(2, device="meta"), "expected outputs of stage 3 on cpu, got one on meta"),
        (torch.zeros([1] * 40), "expected at most .* dimensions from stage 3"),
        (torch.zeros(2, dtype=torch.uint16), "in a dtype that can be sent, got torch.uint16"),
    ],
)
def test_what_cannot_travel_is_refused(output: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        specs(torch.zeros(1), output)
