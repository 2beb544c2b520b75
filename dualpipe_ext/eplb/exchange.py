"""Point-to-point exchange of whole slots between ranks, with a bound on every wait.

Here belongs what migration and replica gradients share: packing rows of several tensors into one
message per peer, and sending and receiving those messages. It knows nothing of experts.

Shapes: S/R slots per rank, N bytes of a message, n rows. Tensors are [S/R, ...], any dtype.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext.errors import CommTimeoutError, DualPipeError
from dualpipe_ext.timeouts import wait_for_event

# Each section of a message starts on this many bytes, so that it can be viewed in its own dtype.
_ALIGNMENT = 16
# index_select and index_copy_ do not exist for every dtype (FP8, say); for integers they do, and
# integers keep every bit of what they stand for.
_SAME_SIZE_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(tensor: Tensor) -> Tensor:
    """The same storage as integers of the same size.

    Raises:
        ValueError: a dtype that no integer matches (complex128).
    """
    dtype = _SAME_SIZE_INTEGER.get(tensor.element_size())
    if dtype is None:
        raise ValueError(f"expected a dtype of 1, 2, 4 or 8 bytes, got {tensor.dtype}")
    return tensor.detach().view(dtype)


def row_bytes(tensor: Tensor) -> int:
    """Bytes of one slot of a [S/R, ...] tensor."""
    return math.prod(tensor.shape[1:]) * tensor.element_size()


def new_message(tensors: Sequence[Tensor], num_rows: int, device: torch.device) -> Tensor:
    """A buffer [N] uint8 for ``num_rows`` rows of every tensor."""
    return torch.empty(message_bytes(tensors, num_rows), dtype=torch.uint8, device=device)


def message_bytes(tensors: Sequence[Tensor], num_rows: int) -> int:
    """N: what ``num_rows`` rows of every tensor take in a message, a multiple of 16."""
    return sum(_section_sizes(tensors, num_rows))


def index_on(values: Sequence[int], device: torch.device) -> Tensor:
    """``values`` as int64 on ``device``, without waiting for its stream."""
    return on_device(torch.tensor(values, dtype=torch.int64), device)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small CPU tensor on ``device``. A copy from pageable memory would wait for the stream."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def sections(message: Tensor, tensors: Sequence[Tensor], num_rows: int) -> list[Tensor]:
    """Views into a message: for every tensor its [n, ...] rows, in the tensor's dtype."""
    views, start = [], 0
    for tensor, size in zip(tensors, _section_sizes(tensors, num_rows), strict=True):
        data = message[start : start + num_rows * row_bytes(tensor)].view(tensor.dtype)
        views.append(data.view(num_rows, *tensor.shape[1:]))
        start += size
    return views


def pack(tensors: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Copy the given rows of every tensor into a new message on the tensors' device."""
    device = tensors[0].device
    message = new_message(tensors, len(rows), device)
    index = index_on(rows, device)
    for tensor, section in zip(tensors, sections(message, tensors, len(rows)), strict=True):
        as_integers(section).copy_(as_integers(tensor).index_select(0, index))
    return message


def _section_sizes(tensors: Sequence[Tensor], num_rows: int) -> list[int]:
    return [-(-num_rows * row_bytes(t) // _ALIGNMENT) * _ALIGNMENT for t in tensors]


def control_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where small messages travel: the CPU if the group can, else the current GPU."""
    if "cpu" in _backends(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def data_device(group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """Where messages of tensors on ``device`` travel: there if NCCL does it, else on the CPU.

    Raises:
        ValueError: CPU tensors in a group that only has NCCL.
    """
    backends = _backends(group)
    if device.type == "cuda" and backends.get("cuda") != "nccl":
        return torch.device("cpu")
    if device.type not in backends:
        raise ValueError(
            f"expected tensors on {' or '.join(sorted(backends))}, which the group's backend "
            f"can carry, got them on {device}"
        )
    return device


def _backends(group: dist.ProcessGroup | None) -> dict[str, str]:
    """Backend by device type: {"cpu": "gloo", "cuda": "nccl"}."""
    if not dist.is_initialized():
        return {"cpu": "", "cuda": ""}
    pairs = dist.get_backend_config(group).split(",")
    return dict(pair.split(":", 1) for pair in pairs)


# Groups that have made a collective call on a GPU.
_joined: WeakSet[dist.ProcessGroup] = WeakSet()


def join(group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Let every rank take part in a group's first NCCL call, as NCCL requires.

    A later exchange may then involve any subset of the ranks. Does nothing on the CPU and after the
    first time.
    """
    if device.type != "cuda":
        return
    group = dist.group.WORLD if group is None else group
    if group not in _joined:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        _joined.add(group)


def exchange(
    sends: Mapping[int, Tensor],
    receives: Mapping[int, Tensor],
    group: dist.ProcessGroup | None,
    *,
    timeout_s: float,
    what: str,
    tag: int,
    wait_on_host: bool = True,
) -> None:
    """Send to and receive from several peers at once.

    Args:
        sends: message per destination, a rank within the group. All on one device.
        receives: buffer per source; filled in place. A peer that sends to this rank must appear
            here with a buffer of the size that it sends, and the reverse.
        group: process group, gloo for CPU messages or NCCL for CUDA ones.
        timeout_s: longest wait for all of it, in seconds.
        what: for the error message, what is being exchanged.
        tag: tells exchanges apart where the backend knows tags (gloo).
        wait_on_host: ``False`` lets CUDA messages complete in stream order, with nothing but the
            process group's own time-out to bound them.

    Raises:
        CommTimeoutError: a peer did not answer in time. It is named.
        DualPipeError: a peer has gone away, or its connection has been closed after a time-out.
            After either error the group cannot be used any more.
    """
    ops = [
        dist.P2POp(call, message, group=group, group_peer=peer, tag=tag)
        # Receives first, so that it is a silent peer that is waited for and named.
        for call, messages in ((dist.irecv, receives), (dist.isend, sends))
        for peer, message in sorted(messages.items())
        if message.numel()
    ]
    if not ops:
        return
    deadline = time.monotonic() + timeout_s
    try:
        works = dist.batch_isend_irecv(ops)
    except RuntimeError as error:
        raise DualPipeError(
            f"rank {dist.get_rank(group)}: expected to exchange {what} with ranks "
            f"{sorted({op.group_peer for op in ops})}, got a lost connection ({_first_line(error)})"
        ) from error
    if ops[0].tensor.is_cuda:
        for work in works:
            work.wait()  # orders the current stream behind the transfer; the host goes on
        if wait_on_host:
            _wait_for_stream(deadline, ops, group, timeout_s, what)
        return
    failure: DualPipeError | None = None
    for op, work in zip(ops, works, strict=True):
        # Once one has failed the rest is only collected: nothing may stay in flight.
        left = 0.0 if failure else deadline - time.monotonic()
        error = _wait(work, left)
        if error and not failure:
            late = time.monotonic() >= deadline
            failure = _failure(op, group, timeout_s, what, None if late else error)
            failure.__cause__ = error
    if failure:
        raise failure


def _wait(work: dist.Work, left_s: float) -> RuntimeError | None:
    try:
        work.wait(timedelta(seconds=max(left_s, 0.01)))  # gloo reads 0 as "no limit"
    except RuntimeError as error:
        return error
    return None


def _failure(
    op: dist.P2POp,
    group: dist.ProcessGroup | None,
    timeout_s: float,
    what: str,
    error: RuntimeError | None,
) -> DualPipeError:
    """The exception for an exchange that was late (no ``error``) or was cut off."""
    peer, sending = op.group_peer, op.op is dist.isend
    wish = f"rank {peer} to take {what}" if sending else f"{what} from rank {peer}"
    start = f"rank {dist.get_rank(group)}: expected {wish}"
    if error is None:
        return CommTimeoutError(f"{start} within {timeout_s:g} s, got no answer")
    return DualPipeError(f"{start}, got a lost connection ({_first_line(error)})")


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().partition("\n")[0]


def _wait_for_stream(
    deadline: float,
    ops: Sequence[dist.P2POp],
    group: dist.ProcessGroup | None,
    timeout_s: float,
    what: str,
) -> None:
    peers = sorted({op.group_peer for op in ops})
    done = torch.cuda.Event()
    done.record()
    wait_for_event(
        done,
        deadline - time.monotonic(),
        f"rank {dist.get_rank(group)}: expected to exchange {what} with ranks {peers} "
        f"within {timeout_s:g} s, got no answer from at least one of them",
    )
