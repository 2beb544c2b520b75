"""RMSNorm and its gradients in float64, each with the error that float32 arithmetic may add to it.

With unit roundoff u = 2^-24, a sum of n terms is off by at most 4 sqrt(n) u times the sum of their
magnitudes: rounding errors are independent and of mean zero, so they add like their square root
(Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019; factor 4 for a
chance of failure under 1e-3 in its most pessimistic form). A product or difference adds 1 u; where
the GPU approximates, a quotient adds up to 4 u (``div.full``) and a root 2 u (``sqrt.approx``).
"""

from __future__ import annotations

import torch
from torch import Tensor

U = 2.0**-24


def exact_and_bounds(
    x: Tensor, weight: Tensor, grad_y: Tensor, eps: float
) -> list[tuple[Tensor, Tensor]]:
    """(value, bound) in float64 of y, grad_x and grad_weight. x and grad_y [M, H], weight [H]."""
    num_rows, size = x.shape
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    mean_square = exact_x.square().mean(1, keepdim=True) + eps
    y = exact_x / mean_square.sqrt() * exact_weight
    grad_x, grad_weight = torch.autograd.grad(y, (exact_x, exact_weight), grad_y.double())

    row_sum, column_sum = 4 * size**0.5 * U, 4 * num_rows**0.5 * U
    # All squares are positive; the root halves the relative error of what is under it: the sum, a
    # square, a quotient and eps (6 u). Then the root itself (2 u) and the quotient (4 u).
    rms = row_sum / 2 + 9 * U
    inverse_rms = mean_square.detach().rsqrt()
    normed = (exact_x.detach() * inverse_rms).abs()
    raw_grad = grad_y.double().abs()
    grad = raw_grad * weight.detach().double().abs()
    spread = (grad * normed).mean(1, keepdim=True)  # bounds the mean of grad * normed, and its sum

    y = y.detach()
    errors = [
        y.abs() * (rms + 2 * U),
        # inverse_rms is in the second term three times; its mean is four products and a quotient.
        inverse_rms * (grad * (rms + 3 * U) + normed * spread * (3 * rms + row_sum + 11 * U)),
        (raw_grad * normed).sum(0) * (rms + column_sum + 2 * U),
    ]
    values = [y, grad_x, grad_weight]
    dtypes = [x.dtype, x.dtype, weight.dtype]
    return [
        (value, error + _rounding(value, dtype))
        for value, error, dtype in zip(values, errors, dtypes, strict=True)
    ]


def _rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    # Once, to nearest: half a unit in the last place, also of the subnormal numbers. A little more,
    # since it is the inexact value that is rounded.
    info = torch.finfo(dtype)
    return value.abs() * (info.eps / 2 * 1.001) + info.smallest_normal * info.eps


def within(got: Tensor, expected: tuple[Tensor, Tensor]) -> bool:
    value, bound = expected
    return bool(((got.detach().double() - value).abs() <= bound).all())
