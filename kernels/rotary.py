"""Rotary positions for the queries and keys of attention, with all three cut out of one projection.

One kernel each way: the forward reads the rows of the projection once and writes queries and keys,
rotated, and values; the backward gathers their gradients into the projection's. In torch operations
that is some eighty kernels, most of which read rows in pieces. Arithmetic is float32 whatever the
dtype, rounded once on the way out.

Source of the method: Su et al., "RoFormer", 2021; values i and i + D/2 of a head are a pair, as in
GPT-NeoX.

N sequences of L positions, A heads of D values each.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
from dualpipe_ext.kernels.backend import DTYPES, accumulator_dtype, runs_triton
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform that torch runs on
    triton = None

# Pairs that one program handles at a time: 4 of each operand per thread of 4 warps, which in 16
# bits are loads of 8 bytes.
_MAX_BLOCK = 512


def rotary(qkv: Tensor, num_heads: int, base: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, rotated by their positions, and values. Differentiable.

    Position l turns pair i of a head by ``l * base**(-2 i / D)``.

    Args:
        qkv: [N, L, 3 A D] or [N, L, 3, A, D], contiguous: float32, bfloat16, float16 or float64
            (by torch).
        num_heads: A.
        base: of the angles' wavelengths, 10,000 in the paper.

    Returns:
        Three tensors [N, A, L, D] in the dtype of ``qkv``, in memory of their own, in which a
        token's heads lie together (that of a contiguous [N, L, A, D]).

    Raises:
        ValueError: the shape or the dtype does not fit.
    """
    if qkv.dtype not in DTYPES:
        raise ValueError(f"expected qkv in one of {DTYPES}, got {qkv.dtype}")
    width = qkv.shape[2:].numel() if qkv.dim() > 2 else 0
    if num_heads < 1 or width == 0 or width % (6 * num_heads):
        raise ValueError(
            f"expected qkv of shape [N, L, 3 x {num_heads} x D] with an even D, "
            f"got {list(qkv.shape)}"
        )
    heads = qkv.reshape(*qkv.shape[:2], 3, num_heads, width // (3 * num_heads))
    return _Rotary.apply(heads, base)


def rotary_forward(heads: Tensor, table: Tensor, out: Tensor) -> None:
    """The forward kernel: rotates the first two of ``heads`` into ``out``, and copies the third.

    Args:
        heads: [N, L, 3, A, D], contiguous.
        table: float32 [2, L, D / 2], cosines and sines of every position's angles.
        out: written; [3, N, L, A, D], contiguous.
    """
    num, length, _, num_heads, size = heads.shape
    if heads.numel() == 0:
        return
    pairs = num_heads * size // 2
    # Triton launches on the current device, whichever one the tensors are on.
    with torch.cuda.device_of(heads):
        _forward_kernel[(num * length,)](
            heads, table, out, length, num * length, pairs, HALF=size // 2, BLOCK=_block(pairs)
        )


def rotary_backward(grads: tuple[Tensor, Tensor, Tensor], table: Tensor, out: Tensor) -> None:
    """The backward kernel: turns the first two of ``grads`` back, and gathers all three.

    Args:
        grads: of queries, keys and values, [N, L, A, D] each, every head's values contiguous.
        table: as for the forward.
        out: written; [N, L, 3, A, D], contiguous.
    """
    num, length, _, num_heads, size = out.shape
    if out.numel() == 0:
        return
    pairs = num_heads * size // 2
    with torch.cuda.device_of(out):
        _backward_kernel[(num * length,)](
            *grads,
            table,
            out,
            length,
            pairs,
            *(stride for grad in grads for stride in grad.stride()[:3]),
            HALF=size // 2,
            BLOCK=_block(pairs),
        )


def _block(pairs: int) -> int:
    return min(_MAX_BLOCK, triton.next_power_of_2(pairs))


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, heads: Tensor, base: float) -> tuple[Tensor, Tensor, Tensor]:
        ctx.table = table = _table_for(heads, base)
        num, length, _, num_heads, size = heads.shape
        if runs_triton(heads):
            out = heads.new_empty(3, num, length, num_heads, size)
            rotary_forward(heads.contiguous(), table, out)
        else:
            wide = heads.to(accumulator_dtype(heads.dtype)).unbind(2)
            out = torch.stack([_turn(wide[0], table), _turn(wide[1], table), wide[2]])
            out = out.to(heads.dtype)
        query, key, value = (part.transpose(1, 2) for part in out.unbind(0))
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        by_token = [grad.transpose(1, 2) for grad in grads]
        num, length, num_heads, size = by_token[0].shape
        out = by_token[0].new_empty(num, length, 3, num_heads, size)
        if runs_triton(out):
            rows = [g if g.stride(3) == 1 else g.contiguous() for g in by_token]
            rotary_backward((rows[0], rows[1], rows[2]), ctx.table, out)
            return out, None
        wide = [grad.to(ctx.table.dtype) for grad in by_token]
        back = torch.stack((ctx.table[0], -ctx.table[1]))
        torch.stack([_turn(wide[0], back), _turn(wide[1], back), wide[2]], 2, out=out)
        return out, None


def _turn(x: Tensor, table: Tensor) -> Tensor:
    """``x`` [N, L, A, D] with every pair turned by its angle."""
    cos, sin = table.unsqueeze(2).unbind(0)  # [L, 1, D / 2]
    first, second = x.chunk(2, dim=3)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=3)


def _table_for(heads: Tensor, base: float) -> Tensor:
    """Cosines and sines [2, L, D / 2], in the dtype that is computed in."""
    length, half = heads.shape[1], heads.shape[4] // 2
    sizes = (length, half, base, accumulator_dtype(heads.dtype), heads.device)
    if type(heads) is not Tensor or torch.compiler.is_compiling():
        # Tensors of a tracer are not to be kept for others.
        return _table(*sizes)
    return _TABLES.of(sizes)


class _Tables:
    """Tables that were made, the last used ones, so that not every layer makes its own."""

    def __init__(self, most: int) -> None:
        self._most = most
        # By sizes and stream: made on one stream, a table is not ready on another.
        self._kept: OrderedDict[tuple[Any, int], Tensor] = OrderedDict()
        self._captured: dict[Any, Tensor] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget all but those that graphs read."""
        self._kept.clear()

    def of(self, sizes: tuple[Any, ...]) -> Tensor:
        """For a launch on the current stream; ``sizes`` are the arguments of :func:`_table`."""
        with self._lock:
            return self._of(sizes)

    def _of(self, sizes: tuple[Any, ...]) -> Tensor:
        device, stream = sizes[-1], 0
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return self._for_graph(sizes)
            stream = torch.cuda.current_stream(device).cuda_stream
        key = sizes, stream
        table = self._kept.pop(key, None)
        self._kept[key] = table = _table(*sizes) if table is None else table
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return table

    def _for_graph(self, sizes: tuple[Any, ...]) -> Tensor:
        # A replay reads the same memory for as long as there is the graph, which does not tell when
        # it goes: a table that one reads stays. Any stream's, for whoever captures runs what is
        # captured before, and waits for it (as torch.cuda.graph does).
        if sizes not in self._captured:
            tables = (table for (of, _), table in self._kept.items() if of == sizes)
            table = next(tables, None)
            if table is None:  # made by every replay anew, so for this graph alone
                return _table(*sizes)
            self._captured[sizes] = table
        return self._captured[sizes]


_TABLES = _Tables(16)


def _table(length: int, half: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # In float64: of a late position's angle, float32 leaves few digits behind the point.
    exponents = torch.arange(half, device=device, dtype=torch.float64) / half
    positions = torch.arange(length, device=device, dtype=torch.float64)
    angles = positions[:, None] * base**-exponents
    return torch.stack((angles.cos(), angles.sin())).to(dtype)


if triton is not None:

    @triton.jit
    def _angles(
        table_ptr,
        position,
        length,
        pair,
        inside,
        HALF: tl.constexpr,  # noqa: N803  Triton's convention for compile-time arguments
    ):
        at = table_ptr + position * HALF + pair
        cos = tl.load(at, inside, other=0.0)
        return cos, tl.load(at + length * HALF, inside, other=0.0)

    @triton.jit
    def _move(
        source,
        target,
        inside,
        cos,
        sin,
        TURN: tl.constexpr,  # noqa: N803
        HALF: tl.constexpr,  # noqa: N803
    ):
        """Pairs from one place to another, turned or as they are."""
        first = tl.load(source, inside)
        second = tl.load(source + HALF, inside)
        if TURN:
            a, b = first.to(tl.float32), second.to(tl.float32)
            first = (a * cos - b * sin).to(target.dtype.element_ty)
            second = (b * cos + a * sin).to(target.dtype.element_ty)
        tl.store(target, first, inside)
        tl.store(target + HALF, second, inside)

    # A constant, as Triton makes of 1, has no dtype to widen.
    @triton.jit(do_not_specialize=["num_tokens"])
    def _forward_kernel(
        heads_ptr,
        table_ptr,
        out_ptr,
        length,
        num_tokens,
        pairs,
        HALF: tl.constexpr,  # noqa: N803
        BLOCK: tl.constexpr,  # noqa: N803
    ):
        # 64 bits: tokens times width passes 2^31 well within the memory of one GPU.
        token = tl.program_id(0).to(tl.int64)
        num_tokens = num_tokens.to(tl.int64)
        for start in range(0, pairs, BLOCK):
            index = start + tl.arange(0, BLOCK)
            inside = index < pairs
            pair = index % HALF
            place = index // HALF * (2 * HALF) + pair
            cos, sin = _angles(table_ptr, token % length, length, pair, inside, HALF)
            for part in tl.static_range(3):
                source = heads_ptr + (token * 3 + part) * 2 * pairs + place
                target = out_ptr + (part * num_tokens + token) * 2 * pairs + place
                _move(source, target, inside, cos, sin, part < 2, HALF)

    @triton.jit
    def _backward_kernel(
        query_ptr,
        key_ptr,
        value_ptr,
        table_ptr,
        out_ptr,
        length,
        pairs,
        query_n,
        query_l,
        query_a,
        key_n,
        key_l,
        key_a,
        value_n,
        value_l,
        value_a,
        HALF: tl.constexpr,  # noqa: N803
        BLOCK: tl.constexpr,  # noqa: N803
    ):
        token = tl.program_id(0).to(tl.int64)
        sequence, position = token // length, token % length
        for start in range(0, pairs, BLOCK):
            index = start + tl.arange(0, BLOCK)
            inside = index < pairs
            head, pair = (index // HALF).to(tl.int64), index % HALF
            cos, sin = _angles(table_ptr, position, length, pair, inside, HALF)
            out = out_ptr + token * 6 * pairs + head * (2 * HALF) + pair
            query = query_ptr + sequence * query_n + position * query_l + head * query_a + pair
            key = key_ptr + sequence * key_n + position * key_l + head * key_a + pair
            value = value_ptr + sequence * value_n + position * value_l + head * value_a + pair
            _move(query, out, inside, cos, -sin, True, HALF)
            _move(key, out + 2 * pairs, inside, cos, -sin, True, HALF)
            _move(value, out + 4 * pairs, inside, cos, -sin, False, HALF)
