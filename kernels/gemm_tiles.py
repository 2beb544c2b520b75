"""What a CTA of the grouped GEMMs needs beside its sums: which tile is its, and a tile's operands.

What belongs here: functions of Triton that the kernels in ``persistent_gemm.py`` call; the first
also finds groups for the kernel that quantises along rows (``fp8_gemm.py``).
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform that torch runs on
    triton = None


def padded_groups(num_groups: int) -> int:
    """What the kernels count groups with: a power of two of at least as many."""
    # Fewer than a warp has threads are no cheaper, and each number is compiled anew.
    return max(32, triton.next_power_of_2(num_groups))


if triton is not None:

    @triton.jit
    def group_rows(
        offsets_ptr,
        num_rows,
        num_groups,
        GROUPS: tl.constexpr,  # noqa: N803  Triton's convention for compile-time arguments
    ):
        """Sizes and ends of the groups; the rows of none are one group more, others are empty.

        Example: offsets [2, 2, 3] of 4 rows, GROUPS 8: sizes [2, 0, 1, 1, 0, 0, 0, 0], ends
        [2, 2, 3, 4, 4, 4, 4, 4].
        """
        group = tl.arange(0, GROUPS)
        starts = tl.load(offsets_ptr + group - 1, (group > 0) & (group <= num_groups), other=0)
        starts = tl.where(group > num_groups, num_rows, starts)
        ends = tl.load(offsets_ptr + group, group < num_groups, other=num_rows)
        # Whatever the offsets say, rows outside the tensors are never touched.
        starts = tl.minimum(tl.maximum(starts, 0), num_rows)
        ends = tl.minimum(tl.maximum(ends, 0), num_rows)
        return tl.maximum(ends - starts, 0), ends

    @triton.jit
    def place(tile, row_tiles, col_tiles, SWEEP: tl.constexpr):  # noqa: N803
        """Row and column of a group's tile: column by column within sweeps of SWEEP rows."""
        sweep = tile // (SWEEP * col_tiles)
        rest = tile - sweep * SWEEP * col_tiles
        # At least one: offsets that decrease give tiles to groups without rows.
        rows = tl.maximum(tl.minimum(row_tiles - sweep * SWEEP, SWEEP), 1)
        return sweep * SWEEP + rest % rows, rest // rows

    @triton.jit
    def next_tile(queue_ptr, tile, tiles_each, num_tiles):
        """From the queue, one that nobody has; without a queue the next of this CTA's own.

        Every CTA begins with its own ``tiles_each``, of which with a queue there is one.
        """
        if queue_ptr is None:
            own = tile + 1 < (tl.program_id(0) + 1) * tiles_each
            return tl.where(own, tile + 1, num_tiles)
        else:  # noqa: RET505  Triton compiles one branch; without else it would see both
            return tl.num_programs(0) + tl.atomic_add(queue_ptr, 1, sem="relaxed")

    @triton.jit
    def add_scaled(total, product, scales, IN_ORDER: tl.constexpr):  # noqa: N803
        """``total + product * scales``, with one rounding."""
        if IN_ORDER:
            # As assembly, because the compiler would gather those of both halves behind the second
            # product: 128 registers more than there are. The interpreter has no assembly.
            return tl.inline_asm_elementwise(
                "fma.rn.f32 $0, $1, $2, $3;",
                "=f,f,f,f",
                [product, scales.broadcast_to(product.shape), total],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
        else:  # noqa: RET505
            return total + product * scales

    @triton.jit
    def call_to_l2(
        ptr,
        row,
        col,
        size_m,
        size_n,
        BLOCK_M: tl.constexpr,  # noqa: N803
        BLOCK_N: tl.constexpr,  # noqa: N803
    ):
        """Have a tile of [M, N] in the L2 cache by the time that it is read.

        While products are computed there are no registers for it.
        """
        rows = tl.minimum(row + tl.arange(0, BLOCK_M), size_m - 1).to(tl.int64)
        size = tl.minimum(size_n - col, BLOCK_N) * (ptr.dtype.element_ty.primitive_bitwidth // 8)
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
            "=r,l,r",
            [ptr + rows * size_n + col, size],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def load_weights(
        w_desc,
        group,
        k,
        col,
        W_TRANSPOSED: tl.constexpr,  # noqa: N803
        BLOCK_N: tl.constexpr,  # noqa: N803
        BLOCK_K: tl.constexpr,  # noqa: N803
    ):
        if W_TRANSPOSED:
            return w_desc.load([group, col, k]).reshape(BLOCK_N, BLOCK_K).T
        else:  # noqa: RET505
            return w_desc.load([group, k, col]).reshape(BLOCK_K, BLOCK_N)
