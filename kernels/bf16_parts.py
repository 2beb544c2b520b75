"""Float32 numbers cut into bfloat16 numbers that sum to them, side by side for a matrix product.

Of ``x``, part 0 is the nearest bfloat16, part 1 that of what is left, part 2 that of what is left
then: two have 16 bits of a float32, three all 24. In torch operations that is nine kernels and one
more to put them together; here it is one.
"""

from __future__ import annotations

import torch
from dualpipe_ext.kernels.backend import runs_triton
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform that torch runs on
    triton = None

NUM_PARTS = 3
# Numbers of one program: 8 for a thread.
_BLOCK = 1024


def bf16_parts(x: Tensor, order: tuple[int, ...], *, dim: int) -> Tensor:
    """Parts of ``x`` in the given order, along ``dim``.

    Args:
        x: float32 [R, C].
        order: numbers of parts, 0 to 2; of N entries.
        dim: 0 or 1.

    Returns:
        bfloat16 [N R, C], or [R, N C] with ``dim`` 1.

    Raises:
        ValueError: the shape, the dtype or the order does not fit.

    Example: of 1 + 2**-9 + 2**-18, whose parts are 1, 2**-9 and 2**-18, the order (2, 0) gives
    [2**-18, 1].
    """
    if x.dim() != 2 or x.dtype != torch.float32 or dim not in (0, 1):
        raise ValueError(f"expected float32 [R, C] and dim 0 or 1, got {x.dtype} {list(x.shape)}")
    if not order or any(part not in range(NUM_PARTS) for part in order):
        raise ValueError(f"expected an order of parts 0 to {NUM_PARTS - 1}, got {order}")
    x = x.detach()  # parameters, as plain tensors
    # Not where a compiler traces, which fuses the torch operations itself.
    if type(x) is not Tensor or not runs_triton(x):
        parts = []
        for _ in range(NUM_PARTS):
            parts.append(x.bfloat16())
            x = x - parts[-1].float()
        return torch.cat([parts[part] for part in order], dim)
    return parts_kernel(x.contiguous(), order, dim)


def parts_kernel(x: Tensor, order: tuple[int, ...], dim: int) -> Tensor:
    """The kernel behind :func:`bf16_parts`, of a contiguous float32 ``x``."""
    num_rows, num_columns = x.shape
    num = len(order)
    shape = (num * num_rows, num_columns) if dim == 0 else (num_rows, num * num_columns)
    out = torch.empty(shape, dtype=torch.bfloat16, device=x.device)
    if x.numel():
        row, block = (num_columns, x.numel()) if dim == 0 else (num * num_columns, num_columns)
        with torch.cuda.device_of(x):
            _kernel[(triton.cdiv(x.numel(), _BLOCK),)](
                x, out, x.numel(), num_columns, row, block, ORDER=order, BLOCK=_BLOCK
            )
    return out


if triton is not None:

    @triton.jit
    def _kernel(
        x_ptr,
        out_ptr,
        num,
        num_columns,
        out_row,
        out_block,
        ORDER: tl.constexpr,  # noqa: N803  Triton's convention for compile-time arguments
        BLOCK: tl.constexpr,  # noqa: N803
    ):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < num
        x = tl.load(x_ptr + at, inside, other=0.0)
        part_0 = x.to(tl.bfloat16)
        x -= part_0.to(tl.float32)
        part_1 = x.to(tl.bfloat16)
        x -= part_1.to(tl.float32)
        part_2 = x.to(tl.bfloat16)
        target = out_ptr + at // num_columns * out_row + at % num_columns
        for place in tl.static_range(len(ORDER)):
            if ORDER[place] == 0:
                tl.store(target, part_0, inside)
            elif ORDER[place] == 1:
                tl.store(target, part_1, inside)
            else:
                tl.store(target, part_2, inside)
            target += out_block
