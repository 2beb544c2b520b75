"""Fused SwiGLU, forward and backward: ``y = silu(gate) * up``, optionally times a weight per row.

The weight is what a Mixture-of-Experts layer multiplies an expert's rows with (their top-k weight);
fused here it costs nothing, and its gradient comes out of the same pass. Only the inputs are kept
for the backward: silu(gate) and the product are computed again. Arithmetic is float32 whatever the
dtype of the rows, rounded once on the way out.

M rows, I intermediate size. gate, up, y [M, I]; packed x [M, 2I] = [gate | up]; weights [M],
float32.
"""

from __future__ import annotations

import torch
from dualpipe_ext.kernels.backend import DTYPES, accumulator_dtype, runs_triton
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform that torch runs on
    triton = None

# Columns that one program handles at a time. 1024 float32 values over 4 warps are 8 per thread:
# two 16-byte loads of bfloat16 in flight per operand, and far from spilling in the backward.
_MAX_BLOCK = 1024


def swiglu(x: Tensor | tuple[Tensor, Tensor], weights: Tensor | None = None) -> Tensor:
    """``silu(gate) * up``, each row times its weight if weights are given. Differentiable.

    Args:
        x: [M, 2I], the gate in the first half of each row; or the pair (gate, up), both [M, I].
            float32, bfloat16, float16 or float64 (by torch). Last dimension contiguous.
        weights: float32 [M] (float64 for float64 rows), or None.

    Returns:
        [M, I] in the dtype of x.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit together.
    """
    gate, up = _halves(x) if isinstance(x, Tensor) else x
    _check(gate, up, weights)
    if isinstance(x, Tensor):
        return _PackedSwiGLU.apply(x, weights)
    return _SwiGLU.apply(gate, up, weights)


def swiglu_forward(gate: Tensor, up: Tensor, weights: Tensor | None) -> Tensor:
    """The forward kernel: y [M, I], contiguous. Rows of gate and up may be strided.

    Example: gate [[0, 1]], up [[2, 3]], weights [2] give y [[0, 4.386351]], where
    4.386351 = 2 * 3 * 1 / (1 + exp(-1)).
    """
    num_rows, size = gate.shape
    y = torch.empty(num_rows, size, dtype=gate.dtype, device=gate.device)
    if y.numel() == 0:
        return y
    # Triton launches on the current device, whichever one the tensors are on.
    with torch.cuda.device_of(gate):
        _forward_kernel[(num_rows,)](
            gate,
            up,
            weights,
            y,
            size,
            gate.stride(0),
            up.stride(0),
            HAS_WEIGHTS=weights is not None,
            BLOCK=_block(size),
        )
    return y


def swiglu_backward(
    grad_y: Tensor,
    gate: Tensor,
    up: Tensor,
    weights: Tensor | None,
    grad_gate: Tensor,
    grad_up: Tensor,
) -> Tensor | None:
    """The backward kernel: fills grad_gate and grad_up, returns the gradient of the weights.

    A row is summed by one program in a fixed order, so the result is the same bits every time.

    Args:
        grad_y: [M, I], last dimension contiguous, like all the others.
        grad_gate, grad_up: written; [M, I], may be the two halves of one [M, 2I].

    Returns:
        float32 [M], or None without weights.

    Example: grad_y [[1, 1]] with the forward's example gives grad_gate [[2, 5.566023]],
    grad_up [[0, 1.462117]] and the weight's gradient [2.193176].
    """
    num_rows, size = gate.shape
    grad_weights = None if weights is None else torch.zeros_like(weights)
    if gate.numel() == 0:
        return grad_weights
    with torch.cuda.device_of(gate):
        _backward_kernel[(num_rows,)](
            grad_y,
            gate,
            up,
            weights,
            grad_gate,
            grad_up,
            grad_weights,
            size,
            grad_y.stride(0),
            gate.stride(0),
            up.stride(0),
            grad_gate.stride(0),
            grad_up.stride(0),
            HAS_WEIGHTS=weights is not None,
            BLOCK=_block(size),
        )
    return grad_weights


if triton is not None:

    @triton.jit
    def _forward_kernel(
        gate_ptr,
        up_ptr,
        weights_ptr,
        y_ptr,
        size,
        gate_stride,
        up_stride,
        HAS_WEIGHTS: tl.constexpr,  # noqa: N803  Triton's convention for compile-time arguments
        BLOCK: tl.constexpr,  # noqa: N803
    ):
        # 64 bits: rows times stride passes 2^31 well within the memory of one GPU.
        row = tl.program_id(0).to(tl.int64)
        scale = 1.0
        if HAS_WEIGHTS:
            scale = tl.load(weights_ptr + row).to(tl.float32)
        for start in range(0, size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < size
            gate = tl.load(gate_ptr + row * gate_stride + column, inside, other=0.0).to(tl.float32)
            up = tl.load(up_ptr + row * up_stride + column, inside, other=0.0).to(tl.float32)
            y = gate * tl.sigmoid(gate) * up * scale
            tl.store(y_ptr + row * size + column, y.to(y_ptr.dtype.element_ty), inside)

    @triton.jit
    def _backward_kernel(
        grad_y_ptr,
        gate_ptr,
        up_ptr,
        weights_ptr,
        grad_gate_ptr,
        grad_up_ptr,
        grad_weights_ptr,
        size,
        grad_y_stride,
        gate_stride,
        up_stride,
        grad_gate_stride,
        grad_up_stride,
        HAS_WEIGHTS: tl.constexpr,  # noqa: N803
        BLOCK: tl.constexpr,  # noqa: N803
    ):
        row = tl.program_id(0).to(tl.int64)
        scale = 1.0
        if HAS_WEIGHTS:
            scale = tl.load(weights_ptr + row).to(tl.float32)
        partial = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < size
            grad = tl.load(grad_y_ptr + row * grad_y_stride + column, inside, other=0.0)
            gate = tl.load(gate_ptr + row * gate_stride + column, inside, other=0.0).to(tl.float32)
            up = tl.load(up_ptr + row * up_stride + column, inside, other=0.0).to(tl.float32)
            grad = grad.to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            if HAS_WEIGHTS:
                partial += grad * silu * up
            grad *= scale
            # d silu / d gate = sigmoid + gate * sigmoid * (1 - sigmoid)
            grad_gate = grad * up * (sigmoid + silu * (1.0 - sigmoid))
            grad_up = grad * silu
            tl.store(
                grad_gate_ptr + row * grad_gate_stride + column,
                grad_gate.to(grad_gate_ptr.dtype.element_ty),
                inside,
            )
            tl.store(
                grad_up_ptr + row * grad_up_stride + column,
                grad_up.to(grad_up_ptr.dtype.element_ty),
                inside,
            )
        if HAS_WEIGHTS:
            tl.store(grad_weights_ptr + row, tl.sum(partial, axis=0))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weights)
        return _forward(gate, up, weights)

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        gate, up, weights = ctx.saved_tensors
        grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        grad_up = torch.empty_like(grad_gate)
        grad_weights = _backward(grad_y, gate, up, weights, grad_gate, grad_up)
        return grad_gate, grad_up, grad_weights


class _PackedSwiGLU(torch.autograd.Function):
    """The halves are cut inside, so that the gradient is written as one [M, 2I], not glued."""

    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weights)
        return _forward(*_halves(x), weights)

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        x, weights = ctx.saved_tensors
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_weights = _backward(grad_y, *_halves(x), weights, *_halves(grad_x))
        return grad_x, grad_weights


def _forward(gate: Tensor, up: Tensor, weights: Tensor | None) -> Tensor:
    if runs_triton(gate):
        return swiglu_forward(gate, up, weights)
    wide = accumulator_dtype(gate.dtype)
    y = torch.nn.functional.silu(gate.to(wide)) * up.to(wide)
    if weights is not None:
        y *= weights[:, None]
    return y.to(gate.dtype)


def _backward(
    grad_y: Tensor,
    gate: Tensor,
    up: Tensor,
    weights: Tensor | None,
    grad_gate: Tensor,
    grad_up: Tensor,
) -> Tensor | None:
    if runs_triton(gate):
        # Autograd may hand over an expanded gradient (of a sum), whose strides are 0.
        return swiglu_backward(grad_y.contiguous(), gate, up, weights, grad_gate, grad_up)
    wide = accumulator_dtype(gate.dtype)
    grad, g, u = grad_y.to(wide), gate.to(wide), up.to(wide)
    sigmoid = torch.sigmoid(g)
    silu = g * sigmoid
    grad_weights = None
    if weights is not None:
        grad_weights = (grad * silu * u).sum(1).to(weights.dtype)
        grad = grad * weights[:, None]
    grad_gate.copy_(grad * u * (sigmoid + silu * (1 - sigmoid)))
    grad_up.copy_(grad * silu)
    return grad_weights


def _block(size: int) -> int:
    return min(_MAX_BLOCK, triton.next_power_of_2(size))


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() != 2 or x.shape[1] % 2:
        raise ValueError(f"expected x of shape [M, 2I], got {tuple(x.shape)}")
    size = x.shape[1] // 2
    return x[:, :size], x[:, size:]


def _check(gate: Tensor, up: Tensor, weights: Tensor | None) -> None:
    if gate.dim() != 2 or gate.shape != up.shape:
        raise ValueError(
            f"expected gate and up of one shape [M, I], got {tuple(gate.shape)} and "
            f"{tuple(up.shape)}"
        )
    if gate.dtype not in DTYPES or up.dtype != gate.dtype:
        raise ValueError(f"expected gate and up in one of {DTYPES}, got {gate.dtype}, {up.dtype}")
    if up.device != gate.device:
        raise ValueError(f"expected gate and up on one device, got {gate.device}, {up.device}")
    for name, tensor in (("gate", gate), ("up", up)):
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(f"expected {name} with contiguous rows, got strides {tensor.stride()}")
    if weights is None:
        return
    if weights.shape != gate.shape[:1] or weights.dtype != accumulator_dtype(gate.dtype):
        raise ValueError(
            f"expected weights {accumulator_dtype(gate.dtype)} [{gate.shape[0]}], "
            f"got {weights.dtype} {list(weights.shape)}"
        )
    if weights.device != gate.device or not weights.is_contiguous():
        raise ValueError(
            f"expected contiguous weights on {gate.device}, "
            f"got strides {weights.stride()} on {weights.device}"
        )
