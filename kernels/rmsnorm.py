"""Fused RMSNorm, forward and backward: ``y = x * weight / sqrt(mean(x ** 2) + eps)`` of each row.

Only the input and the weight are kept for the backward, which computes the inverse root mean square
again in the pass that it makes over the rows anyway. Arithmetic is float32 whatever the dtype of
the rows, rounded once on the way out. The gradient of the weight is a partial sum per program and
then a sum of those, in a fixed order, so it is the same bits every time.

M rows, H hidden size. x, y [..., H], seen as [M, H]; weight [H]. With r = 1 / sqrt(mean(x ** 2) +
eps), n = x * r and g = grad_y * weight, of one row:

    grad_x = r * (g - n * mean(g * n)),    grad_weight = sum over the rows of grad_y * n
"""

from __future__ import annotations

import math

import torch
from dualpipe_ext.kernels.backend import DTYPES, accumulator_dtype, runs_triton
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform that torch runs on
    triton = None

# Columns that one program handles at a time: a row of every model in use, so that the backward
# keeps its part of the weight's gradient in registers (16 float32 per thread and operand).
_MAX_BLOCK = 8192

# Programs of the backward, each with a row of partial sums: two for every SM of an H100 or H200.
# Not asked of the device, so that the order of the sum is the same on every one.
_MAX_PROGRAMS = 264


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Each row over its root mean square, times the weight. Differentiable once.

    Args:
        x: [..., H], H at least 1; float32, bfloat16, float16 or float64 (by torch). Last
            dimension contiguous. Its squares must fit in float32.
        weight: [H], contiguous, in the dtype of x or float32.
        eps: added to the mean square; finite, at least 0.

    Returns:
        [..., H] in the dtype of x.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit together, or eps is negative.

    Example: x [[3, 4]], weight [1, 2], eps 0 give [[0.848528, 2.262742]]: the root mean square is
    sqrt(12.5) = 3.535534.
    """
    _check(x, weight, eps)
    return _RMSNorm.apply(x, weight, float(eps))


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The forward kernel: x [M, H], whose rows may be strided, to y [M, H], contiguous."""
    num_rows, size = x.shape
    y = torch.empty(num_rows, size, dtype=x.dtype, device=x.device)
    if num_rows:
        # Triton launches on the current device, whichever one the tensors are on.
        with torch.cuda.device_of(x):
            _forward_kernel[(num_rows,)](x, weight, y, size, x.stride(0), eps, **_launch(size))
    return y


def rms_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The backward kernel and the sum of its partial sums.

    Args:
        grad_y, x: [M, H], rows may be strided, last dimension contiguous.

    Returns:
        The gradients of x, [M, H], and of the weight, [H], each in the dtype of its tensor.

    Example: grad_y [[1, 1]] with the forward's example gives grad_x [[-0.090510, 0.067882]] and
    the weight's gradient [0.848528, 1.131371].
    """
    num_rows, size = x.shape
    grad_x = torch.empty(num_rows, size, dtype=x.dtype, device=x.device)
    if not num_rows:
        return grad_x, torch.zeros_like(weight)
    programs = min(num_rows, _MAX_PROGRAMS)
    partial = torch.empty(programs, size, dtype=torch.float32, device=x.device)
    kernel = _backward_kernel
    if size > _MAX_BLOCK:
        kernel = _wide_backward_kernel
        partial.zero_()
    with torch.cuda.device_of(x):
        kernel[(programs,)](
            grad_y,
            x,
            weight,
            grad_x,
            partial,
            num_rows,
            size,
            grad_y.stride(0),
            x.stride(0),
            eps,
            **_launch(size),
        )
    return grad_x, partial.sum(0).to(weight.dtype)


if triton is not None:

    @triton.jit
    def _forward_kernel(
        x_ptr,
        weight_ptr,
        y_ptr,
        size,
        x_stride,
        eps,
        BLOCK: tl.constexpr,  # noqa: N803  Triton's convention for compile-time arguments
    ):
        # 64 bits: rows times stride passes 2^31 well within the memory of one GPU.
        row = tl.program_id(0).to(tl.int64)
        squares = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * x_stride + column, column < size, other=0.0).to(tl.float32)
            squares += x * x
        inverse_rms = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / size + eps)
        # The row again, now from the cache.
        for start in range(0, size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < size
            x = tl.load(x_ptr + row * x_stride + column, inside, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32)
            y = x * inverse_rms * weight
            tl.store(y_ptr + row * size + column, y.to(y_ptr.dtype.element_ty), inside)

    @triton.jit
    def _backward_kernel(
        grad_y_ptr,
        x_ptr,
        weight_ptr,
        grad_x_ptr,
        partial_ptr,
        num_rows,
        size,
        grad_y_stride,
        x_stride,
        eps,
        BLOCK: tl.constexpr,  # noqa: N803
    ):
        """A row is one block: read once, and the partial sums stay in registers."""
        program = tl.program_id(0)
        column = tl.arange(0, BLOCK)
        inside = column < size
        weight = tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32)
        partial = tl.zeros([BLOCK], dtype=tl.float32)
        for index in range(program, num_rows, tl.num_programs(0)):
            row = tl.cast(index, tl.int64)
            x = tl.load(x_ptr + row * x_stride + column, inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_y_ptr + row * grad_y_stride + column, inside, other=0.0)
            grad = grad.to(tl.float32)
            inverse_rms = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / size + eps)
            normed = x * inverse_rms
            partial += grad * normed
            grad *= weight
            mean = tl.sum(grad * normed, axis=0) / size
            grad_x = inverse_rms * (grad - normed * mean)
            tl.store(
                grad_x_ptr + row * size + column, grad_x.to(grad_x_ptr.dtype.element_ty), inside
            )
        tl.store(partial_ptr + program.to(tl.int64) * size + column, partial, inside)

    @triton.jit
    def _wide_backward_kernel(
        grad_y_ptr,
        x_ptr,
        weight_ptr,
        grad_x_ptr,
        partial_ptr,
        num_rows,
        size,
        grad_y_stride,
        x_stride,
        eps,
        BLOCK: tl.constexpr,  # noqa: N803
    ):
        """A row is many blocks: read twice, and the partial sums, zero before, lie in memory."""
        program = tl.program_id(0)
        partial_row = partial_ptr + program.to(tl.int64) * size
        for index in range(program, num_rows, tl.num_programs(0)):
            row = tl.cast(index, tl.int64)
            squares = tl.zeros([BLOCK], dtype=tl.float32)
            products = tl.zeros([BLOCK], dtype=tl.float32)
            for start in range(0, size, BLOCK):
                column = start + tl.arange(0, BLOCK)
                inside = column < size
                x = tl.load(x_ptr + row * x_stride + column, inside, other=0.0).to(tl.float32)
                grad = tl.load(grad_y_ptr + row * grad_y_stride + column, inside, other=0.0)
                weight = tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32)
                squares += x * x
                products += grad.to(tl.float32) * weight * x
            inverse_rms = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / size + eps)
            mean = tl.sum(products, axis=0) * inverse_rms / size
            for start in range(0, size, BLOCK):
                column = start + tl.arange(0, BLOCK)
                inside = column < size
                x = tl.load(x_ptr + row * x_stride + column, inside, other=0.0).to(tl.float32)
                grad = tl.load(grad_y_ptr + row * grad_y_stride + column, inside, other=0.0)
                weight = tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32)
                grad = grad.to(tl.float32)
                normed = x * inverse_rms
                grad_x = inverse_rms * (grad * weight - normed * mean)
                tl.store(
                    grad_x_ptr + row * size + column, grad_x.to(grad_x_ptr.dtype.element_ty), inside
                )
                partial = tl.load(partial_row + column, inside, other=0.0) + grad * normed
                tl.store(partial_row + column, partial, inside)
            # The next row may read a partial sum in another thread than the one that wrote it.
            tl.debug_barrier()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        rows = x.reshape(-1, x.shape[-1])
        if runs_triton(x):
            return rms_norm_forward(rows, weight, eps).view(x.shape)
        wide = rows.to(accumulator_dtype(x.dtype))
        y = wide * _inverse_rms(wide, eps) * weight.to(wide.dtype)
        return y.to(x.dtype).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor):
        x, weight = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        # Autograd may hand over an expanded gradient (of a sum), whose strides are 0.
        grad_rows = grad_y.contiguous().view(rows.shape)
        backward = rms_norm_backward if runs_triton(x) else _fallback_backward
        grad_x, grad_weight = backward(grad_rows, rows, weight, ctx.eps)
        return grad_x.view(x.shape), grad_weight, None


def _fallback_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    wide = x.to(accumulator_dtype(x.dtype))
    grad = grad_y.to(wide.dtype)
    inverse_rms = _inverse_rms(wide, eps)
    normed = wide * inverse_rms
    grad_weight = (grad * normed).sum(0)
    grad = grad * weight.to(wide.dtype)
    grad_x = inverse_rms * (grad - normed * (grad * normed).mean(1, keepdim=True))
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def _inverse_rms(rows: Tensor, eps: float) -> Tensor:
    return 1.0 / (rows.square().mean(1, keepdim=True) + eps).sqrt()


def _launch(size: int) -> dict[str, int]:
    block = min(_MAX_BLOCK, triton.next_power_of_2(size))
    return {"BLOCK": block, "num_warps": max(4, block // 512)}


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"expected x of shape [..., H] with H at least 1, got {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"expected x in one of {DTYPES}, got {x.dtype}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"expected x with contiguous rows, got strides {x.stride()}")
    if weight.shape != x.shape[-1:] or weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"expected weight of shape [{x.shape[-1]}] in {x.dtype} or torch.float32, "
            f"got {list(weight.shape)} in {weight.dtype}"
        )
    if weight.device != x.device or not weight.is_contiguous():
        raise ValueError(
            f"expected contiguous weight on {x.device}, "
            f"got strides {weight.stride()} on {weight.device}"
        )
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"expected eps finite and at least 0, got {eps}")
