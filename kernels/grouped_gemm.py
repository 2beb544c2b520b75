"""Matrix products over groups of rows: every expert multiplies the rows routed to it.

What belongs here: the two products that a layer of experts needs, without autograd (that is
``dualpipe_ext.pipeline.weight_grad``). On CUDA, bfloat16 operands go to ``torch._grouped_mm``,
which reads the offsets on the device and takes every SM; with a limit on the SMs, or to make room
for others, to our own kernels in ``persistent_gemm.py``. Everything else is a loop over the groups.

Shapes: M rows, G groups, K inputs, N outputs. ``offsets`` int32 [G] holds the END row of each
group, so group g is rows ``offsets[g - 1]`` to ``offsets[g]`` and may be empty. Rows from
``offsets[-1]`` on belong to no group.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

SHORT_CTAS = 0
"""As ``max_sms``: on all SMs, by CTAs that are over soon, so that kernels on a stream of higher
priority find SMs at any time."""

_ALIGNMENT = 16  # bytes; what torch._grouped_mm asks of every stride but the unit one


def grouped_mm(x: Tensor, w: Tensor, offsets: Tensor, *, max_sms: int | None = None) -> Tensor:
    """Multiply each group of rows by its own matrix: ``out[rows of g] = x[rows of g] @ w[g]``.

    Example: with ``offsets = [2, 2, 3]`` and four rows, rows 0 and 1 meet ``w[0]``, nothing meets
    ``w[1]``, row 2 meets ``w[2]``, and row 3 of the result is zero.

    Args:
        x: [M, K], any float dtype.
        w: [G, K, N], dtype of ``x``.
        offsets: int32 [G], non-decreasing, at most M.
        max_sms: SMs to use at most, beside communication say, or :data:`SHORT_CTAS`, where the
            operands allow it: bfloat16 and sizes that are multiples of 8, on Hopper GPUs. None for
            all.

    Returns:
        [M, N] in the dtype of ``x``; rows past ``offsets[-1]`` are zero.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    check_max_sms(max_sms)
    _check(x, offsets)
    if w.dim() != 3 or w.dtype != x.dtype or w.shape[:2] != (offsets.shape[0], x.shape[1]):
        raise ValueError(
            f"expected w of shape [{offsets.shape[0]}, {x.shape[1]}, N] and {x.dtype}, "
            f"got {list(w.shape)} and {w.dtype}"
        )
    x, w = _readable(x), _readable(w)
    if x.shape[0] and _on_device(x, w):
        if max_sms is not None and (kernels := _kernels_for(x.device)) is not None:
            rows, how = _by_rows(x), {"out_dtype": x.dtype, "max_sms": max_sms}
            w = w if w.transpose(1, 2).is_contiguous() else w.contiguous()
            if _aligned(rows) and _aligned(w):
                return kernels.multiply_rows(rows, w, offsets, **how)
        out = torch._grouped_mm(x, w, offs=offsets)
        # The kernel leaves rows of no group as it found them, and their number is not known here.
        tail = torch.arange(x.shape[0], device=x.device) >= offsets[-1]
        return out.masked_fill_(tail.unsqueeze(1), 0)
    out = x.new_zeros(x.shape[0], w.shape[2])
    for group, (start, end) in enumerate(group_bounds(offsets)):
        if end > start:
            torch.mm(x[start:end], w[group], out=out[start:end])
    return out


def grouped_mm_weight_grad(
    x: Tensor,
    grad: Tensor,
    offsets: Tensor,
    *,
    total: Tensor | None = None,
    max_sms: int | None = None,
) -> Tensor:
    """Gradient of :func:`grouped_mm` for ``w``: ``out[g] = x[rows of g].T @ grad[rows of g]``.

    Args:
        x: [M, K], any float dtype.
        grad: [M, N], dtype of ``x``.
        offsets: int32 [G], non-decreasing, at most M.
        total: the gradient so far, [G, K, N] and contiguous, to add to in place: the bits of
            ``total.add_(...)`` with the gradient in the dtype of ``x``, but on a GPU with
            ``max_sms`` without that gradient in memory.
        max_sms: as in :func:`grouped_mm`.

    Returns:
        [G, K, N] in the dtype of ``x``, zero for empty groups; or ``total``.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    check_max_sms(max_sms)
    _check(x, offsets)
    if grad.dim() != 2 or grad.shape[0] != x.shape[0] or grad.dtype != x.dtype:
        raise ValueError(
            f"expected grad of shape [{x.shape[0]}, N] and {x.dtype}, "
            f"got {list(grad.shape)} and {grad.dtype}"
        )
    check_total(total, (offsets.shape[0], x.shape[1], grad.shape[1]))
    x, grad = _readable(x), _readable(grad)
    if x.shape[0] and _on_device(x, grad):
        if max_sms is not None and (kernels := _kernels_for(x.device)) is not None:
            how = {"num_rows": x.shape[0], "out_dtype": x.dtype, "max_sms": max_sms}
            rows, grad_rows = _by_rows(x), _by_rows(grad)
            if _aligned(rows) and _aligned(grad_rows):
                return kernels.multiply_columns(rows, grad_rows, offsets, total=total, **how)
        return added(torch._grouped_mm(x.t(), grad, offs=offsets), total)
    out = x.new_zeros(offsets.shape[0], x.shape[1], grad.shape[1])
    for group, (start, end) in enumerate(group_bounds(offsets)):
        if end > start:
            torch.mm(x[start:end].t(), grad[start:end], out=out[group])
    return added(out, total)


def group_bounds(offsets: Tensor) -> list[tuple[int, int]]:
    """First row and END row of each group, read on the host."""
    ends = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def added(out: Tensor, total: Tensor | None) -> Tensor:
    """``total`` with ``out`` added to it in place, unless they are one; ``out`` without total."""
    return out if total is None or out is total else total.add_(out)


def check_total(total: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse with ``ValueError`` what a gradient of ``shape`` cannot be added to."""
    if total is not None and not (total.shape == shape and total.is_contiguous()):
        raise ValueError(
            f"expected a contiguous total of shape {list(shape)}, got {list(total.shape)} with "
            f"strides {list(total.stride())}"
        )


def check_max_sms(max_sms: int | None) -> None:
    """Refuse with ``ValueError`` a number of SMs that nothing can run on."""
    if max_sms is not None and max_sms < 1 and max_sms != SHORT_CTAS:
        raise ValueError(f"expected max_sms of at least 1, or 0 for short CTAs, got {max_sms}")


def check_offsets(offsets: Tensor) -> None:
    """Refuse with ``ValueError`` what cannot be offsets of groups."""
    if offsets.dim() != 1 or offsets.dtype != torch.int32 or offsets.shape[0] == 0:
        raise ValueError(
            f"expected offsets int32 [G] with G > 0, got {list(offsets.shape)} and {offsets.dtype}"
        )


def _check(x: Tensor, offsets: Tensor) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(
            f"expected x of shape [M, K] and a float dtype, got {list(x.shape)} and {x.dtype}"
        )
    check_offsets(offsets)


def _kernels_for(device: torch.device) -> ModuleType | None:
    """The kernels that keep to some SMs, if they run on this device."""
    # Not at the top: it imports Triton, which takes longer than all of this package.
    from dualpipe_ext.kernels import persistent_gemm

    return persistent_gemm if persistent_gemm.usable_on(device) else None


def _by_rows(t: Tensor) -> Tensor:
    """With contiguous rows one after the other, as the kernels read them."""
    return t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()


def _readable(t: Tensor) -> Tensor:
    """``t``, or a copy where only its strides keep it from ``torch._grouped_mm``."""
    copied = t.is_cuda and t.dtype == torch.bfloat16 and not _aligned(t)
    return t.contiguous() if copied else t


def _on_device(*operands: Tensor) -> bool:
    """Whether ``torch._grouped_mm`` takes these without reading the offsets on the host."""
    return all(t.is_cuda and t.dtype == torch.bfloat16 and _aligned(t) for t in operands)


def _aligned(t: Tensor) -> bool:
    strides = [stride * t.element_size() for stride in t.stride() if stride != 1]
    unit = len(strides) == t.dim() - 1
    return unit and t.data_ptr() % _ALIGNMENT == 0 and not any(s % _ALIGNMENT for s in strides)
