"""The arguments of the dispatch and combine kernels, made from tensors; nothing is launched here.

Shapes: T tokens of this rank, H hidden, R ranks, G experts per rank, K top-k, N or M rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dualpipe_ext.ep.device_arrays import address, rows_on_16_bytes
from dualpipe_ext.ep.fp8 import BLOCK, Quantized, quantize
from dualpipe_ext.ep.peer_handle import PeerHandle
from dualpipe_ext.ep.transport import Rows

if TYPE_CHECKING:
    from dualpipe_ext.ep.peer import PeerTransport
from dualpipe_ext.kernels.backend import accumulator_dtype


@dataclass(slots=True, eq=False)
class DispatchInput:
    """What a dispatch reads, in a form that kernels can."""

    rows: Tensor
    """[T, H], dense."""
    scales: Tensor | None
    """float32 [T, H/128] of rows that are quantised already."""
    weights: Tensor | None
    payload: str
    """What the kernel does with the rows; see csrc/ep/dispatch.h."""
    out_dtype: torch.dtype

    @property
    def num_scales(self) -> int:
        return self.rows.shape[1] // BLOCK if self.out_dtype == torch.float8_e4m3fn else 0

    @property
    def in_bytes(self) -> int:
        return self.rows.shape[1] * self.rows.element_size()

    @property
    def out_bytes(self) -> int:
        return self.rows.shape[1] * self.out_dtype.itemsize


def dispatch_input(
    x: Tensor | Quantized, weights: Tensor | None, fp8: bool, pow2_scales: bool
) -> DispatchInput:
    """Dense tensors; rows that the kernel, which reads bfloat16, cannot quantise are quantised."""
    payload = "as_is"
    if fp8 and isinstance(x, Tensor):
        if x.dtype == torch.bfloat16:
            payload = "quantize_pow2" if pow2_scales else "quantize"
        else:
            x = quantize(x, pow2_scales=pow2_scales)
    rows, scales = x if isinstance(x, Quantized) else (x, None)
    return DispatchInput(
        rows=rows_on_16_bytes(rows),
        scales=None if scales is None else rows_on_16_bytes(scales),
        weights=None if weights is None else rows_on_16_bytes(weights),
        payload=payload,
        out_dtype=torch.float8_e4m3fn if payload != "as_is" else rows.dtype,
    )


@dataclass(slots=True, eq=False)
class DispatchOutput:
    """Where a dispatch writes."""

    rows: Tensor
    """[N or M, H], dense or rows of a slab."""
    scales: Tensor | None
    weights: Tensor | None
    slab: int
    """Where rows of other ranks arrive."""
    in_slab: bool
    """They stay there."""
    pitch: int
    """Bytes from one row to the next."""
    scale_pitch: int
    """Numbers from one row's scales to the next."""

    def as_rows(self) -> Rows:
        return Rows(self.rows, self.scales, self.weights)


def dispatch_output(
    transport: PeerTransport, source: DispatchInput, handle: PeerHandle
) -> DispatchOutput:
    """Allocate the output; rows stay in the communication buffer if asked and if a slab is free."""
    num_rows, hidden = handle.num_rows, source.rows.shape[1]
    rows, dtype, num_scales = source.rows, source.out_dtype, source.num_scales
    weights = None
    if source.weights is not None:
        shape = (num_rows,) if handle.layout == "expert" else (num_rows, source.weights.shape[1])
        weights = source.weights.new_empty(shape)
    keep = handle.zero_copy and transport.capabilities.zero_copy
    keep = keep and hidden == transport.config.hidden
    taken = transport.take_slab(num_rows, dtype, num_scales) if keep else None
    if taken is not None:
        pitch = taken.rows.stride(0) * dtype.itemsize
        scale_pitch = taken.scales.stride(0) if num_scales else 0
        where = {"slab": taken.index, "in_slab": True, "pitch": pitch, "scale_pitch": scale_pitch}
        return DispatchOutput(taken.rows, taken.scales, weights, **where)
    out = rows.new_empty((num_rows, hidden), dtype=dtype)
    scales = None
    if num_scales:
        scales = rows.new_empty((num_rows, num_scales), dtype=torch.float32)
    where = {"slab": 0, "in_slab": False, "pitch": hidden * dtype.itemsize}
    return DispatchOutput(out, scales, weights, **where, scale_pitch=num_scales)


def dispatch_call(
    transport: PeerTransport, source: DispatchInput, handle: PeerHandle, output: DispatchOutput
) -> Any:
    """``DispatchCall`` of csrc/ep/dispatch.h."""
    return handle.arrays.dispatch_call(
        output.slab,
        output.in_slab,
        *transport.delays_ns,
        source.rows.data_ptr(),
        address(source.scales),
        address(source.weights),
        output.rows.data_ptr(),
        address(output.scales),
        address(output.weights),
        handle.num_rows,
        output.pitch,
        output.scale_pitch,
    )


def dispatch_sizes(source: DispatchInput) -> dict[str, Any]:
    """What a launch needs besides the calls; equal on all ranks of it."""
    return {
        "payload": source.payload,
        "in_bytes": source.in_bytes,
        "out_bytes": source.out_bytes,
        "num_scales": source.num_scales,
        "weight_bytes": 0 if source.weights is None else source.weights.element_size(),
    }


@dataclass(slots=True, eq=False)
class CombineInput:
    """What a combine reads, in a form that kernels can."""

    rows: Tensor
    weights: Tensor | None
    bias: Tensor | None
    row_weights: Tensor | None

    @property
    def row_bytes(self) -> int:
        return self.rows.shape[1] * self.rows.element_size()


def combine_input(
    rows: Tensor, weights: Tensor | None, bias: Tensor | None, row_weights: Tensor | None
) -> CombineInput:
    """Dense tensors; factors in the dtype of the sums."""
    if rows.shape[0] == 0:
        # An empty tensor has no address, which kernels would take for an argument not given; and
        # this is a row that they may point at. No sum uses it.
        rows = rows.new_zeros((1, rows.shape[1]))
        if row_weights is not None:
            row_weights = row_weights.new_zeros((1, *row_weights.shape[1:]))
    return CombineInput(
        rows=rows_on_16_bytes(rows),
        weights=None if weights is None else weights.to(accumulator_dtype(rows.dtype)).contiguous(),
        bias=None if bias is None else rows_on_16_bytes(bias),
        row_weights=None if row_weights is None else rows_on_16_bytes(row_weights),
    )


@dataclass(slots=True, eq=False)
class CombineOutput:
    """Where a combine writes."""

    y: Tensor
    """[T, H]"""
    token_weights: Tensor | None
    """[T, K]"""


def combine_output(
    transport: PeerTransport, source: CombineInput, handle: PeerHandle, out: Tensor | None
) -> CombineOutput:
    """Allocate the output, but for ``out``."""
    token_weights = None
    if source.row_weights is not None:
        shape = (handle.num_tokens, transport.config.top_k)
        token_weights = source.row_weights.new_empty(shape)
    if out is None:
        out = source.rows.new_empty((handle.num_tokens, source.rows.shape[1]))
    return CombineOutput(out, token_weights)


def combine_call(
    transport: PeerTransport,
    source: CombineInput,
    handle: PeerHandle,
    output: CombineOutput,
) -> Any:
    """``CombineCall`` of csrc/ep/combine.h."""
    return handle.arrays.combine_call(
        *transport.delays_ns,
        source.rows.data_ptr(),
        source.rows.shape[0],
        address(source.weights),
        address(source.bias),
        address(source.row_weights),
        output.y.data_ptr(),
        address(output.token_weights),
    )


def combine_sizes(source: CombineInput, handle: PeerHandle) -> dict[str, Any]:
    """What a launch needs besides the calls; equal on all ranks of it."""
    return {
        "row_type": str(source.rows.dtype).removeprefix("torch."),
        "expert_layout": handle.layout == "expert",
        "row_bytes": source.row_bytes,
        "weight_bytes": 0 if source.row_weights is None else source.row_weights.element_size(),
    }
