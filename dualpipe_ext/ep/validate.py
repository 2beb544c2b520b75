"""User mistakes that can be seen without looking at the data: one line of ``ValueError`` each.

Shapes: T tokens, H hidden, E experts, R ranks, K top-k, N or M rows as the handle's layout says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualpipe_ext.ep.fp8 import BLOCK
from dualpipe_ext.ep.handle import LAYOUTS, Handle
from dualpipe_ext.ep.transport import RouteOptions, Transport, TransportConfig
from dualpipe_ext.timeouts import check_timeout

MAX_TOP_K = 32
# Rows are moved in units of this many bytes by every transport that is not made of messages.
ROW_BYTES = 16
ROW_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Offsets are int32.
MAX_ROWS = 2**31 - 1
# Made once: these checks are a good part of what a call costs the host.
_FP8 = frozenset({torch.float8_e4m3fn})
_FLOAT32 = frozenset({torch.float32})
_INT64 = frozenset({torch.int64})
_NUMBERS = frozenset({torch.float32, torch.float64})


def check_config(config: TransportConfig) -> None:
    """Refuse numbers that no transport can work with."""
    for name in ("hidden", "num_experts", "top_k"):
        _expect_int(name, getattr(config, name), least=1)
    _expect_int("max_tokens", config.max_tokens, least=0)
    _expect_int("num_slabs", config.num_slabs, least=0)
    if config.num_sms is not None:
        check_num_sms(config.num_sms)
    if config.dtype not in ROW_DTYPES:
        names = ", ".join(str(dtype) for dtype in ROW_DTYPES)
        raise ValueError(f"expected dtype to be one of {names}, got {config.dtype}")
    if config.top_k > MAX_TOP_K:
        raise ValueError(f"expected top_k of at most {MAX_TOP_K}, got {config.top_k}")
    if config.num_experts % config.num_ranks:
        raise ValueError(
            f"expected num_experts to be a multiple of the {config.num_ranks} ranks of the group, "
            f"got {config.num_experts}"
        )
    check_timeout(config.timeout_s)


def check_num_sms(num_sms: object) -> None:
    """Refuse what is no number of SMs."""
    _expect_int("num_sms", num_sms, least=0)


def check_x(x: Tensor, scales: Tensor | None, fp8: bool, transport: Transport) -> None:
    """Check what is to be dispatched: a tensor, or FP8 values with their scales."""
    config = transport.config
    if fp8 and config.hidden % BLOCK:
        raise ValueError(
            f"expected hidden to be a multiple of {BLOCK} for fp8=True, got {config.hidden}"
        )
    if scales is None:
        check_rows("x", x, transport)
    elif not fp8:
        raise ValueError("expected fp8=True with x given as (values, scales), got fp8=False")
    else:
        num_tokens = _num_rows(x)
        _expect_tensor("x[0]", x, (num_tokens, config.hidden), _FP8)
        _expect_tensor("x[1]", scales, (num_tokens, config.hidden // BLOCK), _FLOAT32)
        _expect_device("x[1]", scales, x.device)
    if x.shape[0] > config.max_tokens:
        raise ValueError(
            f"expected x of at most max_tokens={config.max_tokens} rows, got {x.shape[0]}"
        )


def check_rows(name: str, rows: Tensor, transport: Transport, num_rows: int | None = None) -> None:
    """Check a [rows, H] tensor that will move; ``num_rows=None``: any number."""
    num_rows = _num_rows(rows) if num_rows is None else num_rows
    hidden = transport.config.hidden
    _expect_tensor(name, rows, (num_rows, hidden), transport.capabilities.dtypes)
    if hidden * rows.element_size() % ROW_BYTES:
        raise ValueError(
            f"expected rows of {name} to be a multiple of {ROW_BYTES} bytes, got {hidden} x "
            f"{rows.dtype} = {hidden * rows.element_size()} bytes"
        )


def check_topk_idx(
    topk_idx: Tensor, num_tokens: int, device: torch.device, config: TransportConfig
) -> None:
    """Check shape, dtype and device; the ids themselves are checked by the transport."""
    _expect_tensor("topk_idx", topk_idx, (num_tokens, config.top_k), _INT64)
    _expect_device("topk_idx", topk_idx, device)


def check_topk_weights(
    topk_weights: Tensor, num_tokens: int, device: torch.device, config: TransportConfig
) -> None:
    """float32, or float64 for models that are float64 throughout."""
    _expect_tensor("topk_weights", topk_weights, (num_tokens, config.top_k), _NUMBERS)
    _expect_number_bytes("topk_weights", topk_weights, config)
    _expect_device("topk_weights", topk_weights, device)


def check_handle(handle: object, transport: Transport) -> None:
    """Only the buffer that made a handle can use it."""
    if not isinstance(handle, Handle):
        raise ValueError(f"expected a Handle from Buffer.dispatch, got {type(handle).__name__}")
    if handle.owner is not transport:
        raise ValueError("expected a handle that this Buffer's dispatch returned, got another's")


def check_options(options: RouteOptions) -> None:
    """Check how the output of a dispatch is asked for."""
    layout, alignment = options.layout, options.alignment
    if layout not in LAYOUTS:
        raise ValueError(f"expected layout to be one of {', '.join(LAYOUTS)}, got {layout!r}")
    _expect_int("alignment", alignment, least=1, most=MAX_ROWS)
    if layout == "token" and alignment != 1:
        raise ValueError(f"expected alignment=1 with layout='token', got {alignment}")
    if layout == "expert" and options.zero_copy:
        raise ValueError("expected zero_copy=False with layout='expert', got True")
    if options.max_recv_tokens is not None:
        _expect_int("max_recv_tokens", options.max_recv_tokens, least=0, most=MAX_ROWS)


def check_rows_per_expert(
    rows_per_expert: int, options: RouteOptions, config: TransportConfig
) -> None:
    """Check groups of fixed size, before their rows are counted."""
    most = MAX_ROWS // config.num_local_experts
    _expect_int("rows_per_expert", rows_per_expert, least=1, most=most)
    if options.layout != "expert":
        raise ValueError(f"expected layout='expert' with rows_per_expert, got {options.layout!r}")
    if options.alignment != 1 or options.max_recv_tokens is not None:
        raise ValueError(
            "expected neither alignment nor max_recv_tokens with rows_per_expert, got "
            f"alignment={options.alignment} and max_recv_tokens={options.max_recv_tokens}"
        )


def check_same_route(
    handle: Handle, topk_idx: Tensor | None, max_recv_tokens: int | None, asked: dict[str, object]
) -> None:
    """A cached dispatch cannot ask for another output than the handle describes.

    Args:
        asked: names of the handle's fields, and what was given for them, None if nothing.
    """
    if topk_idx is not None or max_recv_tokens is not None:
        raise ValueError(
            "expected no topk_idx and no max_recv_tokens with a handle, which has its own"
        )
    for name, value in asked.items():
        own = getattr(handle, name)
        if value is not None and value != own:
            raise ValueError(f"expected the handle's {name}={own!r}, got {value!r}")


def check_combine(rows: Tensor, handle: Handle, transport: Transport) -> None:
    """Check what every combine takes."""
    check_handle(handle, transport)
    check_rows("rows", rows, transport, handle.num_rows)
    _expect_device("rows", rows, handle.counts.device)


def check_combine_extras(
    rows: Tensor, handle: Handle, weights: Tensor | None, bias: Tensor | None
) -> None:
    """Check ``weights`` and ``bias`` against rows already checked."""
    if weights is not None:
        if handle.layout == "token":
            raise ValueError(
                "expected weights=None with layout='token' (weight the rows before), got a tensor"
            )
        _expect_tensor("weights", weights, (handle.num_rows,), _NUMBERS)
        _expect_device("weights", weights, rows.device)
    if bias is not None:
        _expect_tensor("bias", bias, (handle.num_tokens, rows.shape[1]), frozenset((rows.dtype,)))
        _expect_device("bias", bias, rows.device)


def check_out(out: Tensor, rows: Tensor, handle: Handle) -> None:
    """Check where the sums of rows already checked shall be."""
    shape = (handle.num_tokens, rows.shape[1])
    _expect_tensor("out", out, shape, frozenset((rows.dtype,)))
    _expect_device("out", out, rows.device)
    if torch.is_grad_enabled():
        raise ValueError("expected out=None where gradients are recorded, got a tensor")
    if torch.compiler.is_compiling():
        return  # sums are copied there
    if not out.is_contiguous() or out.data_ptr() % ROW_BYTES:
        raise ValueError(
            f"expected out to be contiguous and on {ROW_BYTES} bytes, got strides "
            f"{list(out.stride())} from address {out.data_ptr()}"
        )


def check_row_weights(
    row_weights: Tensor, rows: Tensor, handle: Handle, config: TransportConfig
) -> None:
    """Check numbers that go back with rows already checked."""
    choices = (config.top_k,) if handle.layout == "token" else ()
    _expect_tensor("row_weights", row_weights, (handle.num_rows, *choices), _NUMBERS)
    _expect_number_bytes("row_weights", row_weights, config)
    _expect_device("row_weights", row_weights, rows.device)


def check_capture(x: Tensor, max_recv_tokens: int | None, transport: Transport) -> None:
    """A CUDA graph can hold a new routing only if nothing waits for it on the host."""
    syncs_host = transport.capabilities.syncs_host
    if not x.is_cuda or not (syncs_host or max_recv_tokens is None):
        return
    if torch.cuda.is_current_stream_capturing():
        wanted = "a handle"
        if not syncs_host:
            wanted = "a handle, max_recv_tokens or rows_per_expert"
        raise ValueError(
            f"expected {wanted} while a CUDA graph is captured: transport {transport.name!r} "
            "waits for counts on the host"
        )


def _num_rows(tensor: object) -> int:
    return tensor.shape[0] if isinstance(tensor, Tensor) and tensor.dim() else 0


def _expect_int(name: str, value: object, *, least: int, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"expected {name} to be an integer of at least {least}, got {value!r}")
    if most is not None and value > most:
        raise ValueError(f"expected {name} of at most {most}, got {value}")


def _expect_tensor(
    name: str, tensor: object, shape: tuple[int, ...], dtypes: frozenset[torch.dtype]
) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"expected {name} to be a tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise ValueError(f"expected {name} to be a dense tensor, got {tensor.layout}")
    if tensor.shape != shape:
        raise ValueError(f"expected {name} of shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        names = " or ".join(sorted(str(d) for d in dtypes))
        raise ValueError(f"expected {name} of dtype {names}, got {tensor.dtype}")


def _expect_number_bytes(name: str, numbers: Tensor, config: TransportConfig) -> None:
    """Peer memory has room for float64 numbers only beside float64 rows. Every transport refuses
    them: code that runs on a laptop shall run on GPUs."""
    if numbers.dtype == torch.float64 and config.dtype != torch.float64:
        raise ValueError(
            f"expected {name} of 4 bytes a value with a Buffer of {config.dtype}, got "
            f"{numbers.dtype}"
        )


def _expect_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"expected {name} on {device}, got {tensor.device}")
