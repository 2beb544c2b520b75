"""Megatron-Core's MoE layers over this project's dispatch and combine.

>>> from dualpipe_ext.integrations import megatron
>>> megatron.install()  # doctest: +SKIP

What belongs here: :func:`install`, :func:`uninstall`, and the communication manager that Megatron's
flex token dispatcher (``--moe-token-dispatcher-type flex``) gets instead of its own for DeepEP and
HybridEP. Neither of these needs to be installed. Rows come grouped by expert, so Megatron's second
permutation is left out, and the sizes of the groups come with the number of rows, so that the host
waits once a dispatch. Checked with Megatron-Core 0.16 and 0.19.

Megatron has no registry for such managers; its names were read from
https://github.com/NVIDIA/Megatron-LM (``core/transformer/moe/token_dispatcher.py``).

Shapes: T tokens of this rank, H hidden, R ranks of the TP x EP group, E experts (times the size of
the TP group, each of whose ranks is sent all tokens), K top-k (likewise), M rows that arrive.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext.ep import Buffer, Handle
from dualpipe_ext.integrations.shared_buffers import SharedBuffers

try:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
except ImportError as error:
    raise ImportError(
        "expected megatron-core 0.16 or later (pip install megatron-core) for "
        f"dualpipe_ext.integrations.megatron, got: {error}"
    ) from error

# What Megatron makes one of for each layer, by the backend that is configured.
_MANAGERS = ("_DeepepManager", "_HybridEPManager")

_originals: dict[str, Any] = {}
# Of every install() since the last uninstall(), as long as some layer can use it.
_installed: weakref.WeakSet[SharedBuffers] = weakref.WeakSet()


class _Manager:
    """What Megatron's flex dispatcher asks to move the tokens of one layer.

    Its attributes and methods are those that Megatron reads, sets or calls by name.
    """

    def __init__(
        self,
        buffers: SharedBuffers,
        *,
        group: dist.ProcessGroup,
        num_local_experts: int,
        num_experts: int,
        config: Any,
        router_topk: int | None = None,
    ) -> None:
        _check_config(config)
        self._buffers = buffers
        self._buffer: Buffer | None = None
        self.group = group
        self.num_local_experts = num_local_experts
        self.num_experts = num_experts
        # Megatron names every expert once for each rank of the TP group.
        copies = num_experts // config.num_moe_experts
        self.router_topk = router_topk or copies * config.moe_router_topk
        quantized = config.fp8 or getattr(config, "fp4", None)
        self.alignment = moe_utils.get_align_size_for_quantization(config) if quantized else 1
        self.token_indices: Tensor | None = None
        self.token_probs: Tensor | None = None
        self.dispatched_probs: Tensor | None = None
        self.tokens_per_expert: Tensor | None = None
        self.handle: Handle | None = None

    @property
    def routing_map(self) -> Tensor | None:
        """:attr:`token_indices`. Megatron's CUDA graphs carry what is named so beside the weights,
        with the backend "hybridep", from the graph of the preparation to the dispatch."""
        return self.token_indices

    @routing_map.setter
    def routing_map(self, indices: Tensor | None) -> None:
        self.token_indices = indices

    def setup_metadata(self, routing_map: Tensor, probs: Tensor) -> None:
        """Choices of each token from maps over all experts.

        Args:
            routing_map: bool [T, R, E/R], which experts a token goes to, at most K of them.
            probs: [T, R, E/R], their weights, in which gradients flow back.
        """
        routing_map = routing_map.reshape(-1, self.num_experts)
        routed = torch.where(routing_map, probs.reshape(-1, self.num_experts), float("-inf"))
        best, experts = torch.topk(routed, self.router_topk, dim=-1)
        # Fewer than K where the router dropped a choice, for want of capacity.
        missing = torch.isneginf(best)
        self.token_indices = experts.masked_fill(missing, -1)
        self.token_probs = best.masked_fill(missing, 0.0)

    def dispatch(
        self,
        hidden_states: Tensor,
        async_finish: bool = True,
        allocate_on_comm_stream: bool = True,
    ) -> Tensor:
        """Send [T, H] to the experts: [M, H], grouped by local expert.

        The other arguments are DeepEP's. Everything here runs on the current stream, which is the
        one that Megatron has chosen for communication.
        """
        if self.token_probs is None:
            raise ValueError("expected setup_metadata before a dispatch, got none")
        wide = hidden_states.dtype == torch.float64
        numbers = self.token_probs.to(torch.float64 if wide else torch.float32)
        self._buffer = self._buffers.get(
            self.group,
            tokens=hidden_states.shape[0],
            hidden=hidden_states.shape[1],
            num_experts=self.num_experts,
            top_k=self.router_topk,
            dtype=hidden_states.dtype,
            device=hidden_states.device,
        )
        recv, self.handle = self._buffer.dispatch(
            hidden_states,
            self.token_indices,
            numbers,
            layout="expert",
            alignment=self.alignment,
        )
        assert recv.host_counts is not None
        counts = torch.tensor(recv.host_counts)
        self.tokens_per_expert = -(-counts // self.alignment) * self.alignment
        self.dispatched_probs = recv.weights
        return recv.tokens

    def get_permuted_hidden_states_by_experts(
        self, hidden_states: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Rows and their weights, which are grouped by expert as they come."""
        return hidden_states, self.dispatched_probs

    def get_number_of_tokens_per_expert(self) -> Tensor | None:
        """int64 [E/R] on the host: rows of each group, padding included."""
        return self.tokens_per_expert

    def get_restored_hidden_states_by_experts(self, hidden_states: Tensor) -> Tensor:
        """Nothing to undo: a combine takes rows in the order of experts."""
        return hidden_states

    def combine(
        self,
        hidden_states: Tensor,
        async_finish: bool = True,
        allocate_on_comm_stream: bool = True,
    ) -> Tensor:
        """Bring [M, H] back and sum them: [T, H]. Experts have weighted them already."""
        if self._buffer is None or self.handle is None:
            raise ValueError("expected a dispatch before every combine, got none")
        y, _ = self._buffer.combine(hidden_states, self.handle)
        # What the backward needs it has; this would keep it until the next forward.
        self.handle = self.dispatched_probs = self.tokens_per_expert = None
        return y


def _check_config(config: Any) -> None:
    for name in ("moe_pad_expert_input_to_capacity", "moe_expert_rank_capacity_factor"):
        if value := getattr(config, name, None):
            raise ValueError(
                f"expected {name} to be unset with dualpipe_ext, whose experts get the rows that "
                f"there are, got {value!r}"
            )
    backend = config.moe_flex_dispatcher_backend
    if getattr(config, "overlap_moe_expert_parallel_comm", False) and backend != "hybridep":
        # With the other Megatron frees what a dispatch gave: DeepEP's experts have a copy of it,
        # here it is what they have saved.
        raise ValueError(
            "expected moe_flex_dispatcher_backend='hybridep' with overlap_moe_expert_parallel_comm "
            f"and dualpipe_ext, got {backend!r}"
        )


def install(
    *,
    max_tokens: int | None = None,
    transport: str = "auto",
    num_sms: int | None = None,
    timeout_s: float = 600.0,
) -> None:
    """Let Megatron's flex token dispatcher send tokens with this project's ``Buffer``.

    Called on every rank before the model is built, with
    ``TransformerConfig(moe_token_dispatcher_type="flex")`` and the backend "deepep" (Megatron's
    default) or "hybridep" (needed with ``overlap_moe_expert_parallel_comm``). Called again, it
    holds for layers that are built after it. Megatron's own numbers of SMs are meant for its
    backends and not read.

    The first dispatch makes the communication memory, once for all layers of one width (its size
    is logged). Megatron's other dispatchers, alltoall and allgather, are left alone.

    Args:
        max_tokens: most tokens of a rank in one call of a layer; None takes the most of any rank in
            the first one, which is right where sequences have one length. More are an error
            (:class:`~dualpipe_ext.ep.Buffer`).
        transport: see :class:`~dualpipe_ext.ep.Buffer`.
        num_sms: see :class:`~dualpipe_ext.ep.Buffer`; 0 for the copy engines.
        timeout_s: longest wait for another rank, in seconds; the default is that of Megatron's
            process groups.

    Raises:
        ValueError: ``max_tokens`` below 1.
        RuntimeError: this Megatron-Core has no manager that could be replaced.
    """
    missing = [name for name in _MANAGERS if not hasattr(token_dispatcher, name)]
    if missing:
        raise RuntimeError(
            f"expected megatron-core with {' and '.join(missing)} in {token_dispatcher.__name__} "
            "(0.16 and 0.19 have them), got one without"
        )
    buffers = SharedBuffers(
        "give megatron.install(max_tokens=) the most there will be",
        max_tokens=max_tokens,
        options={"transport": transport, "num_sms": num_sms, "timeout_s": timeout_s},
    )
    _installed.add(buffers)

    def make_manager(**arguments: Any) -> _Manager:
        return _Manager(buffers, **arguments)

    for name in _MANAGERS:
        _originals.setdefault(name, getattr(token_dispatcher, name))
        setattr(token_dispatcher, name, make_manager)


def uninstall() -> None:
    """Give Megatron its own managers back, for layers that are built after this.

    The communication memory goes with the last layer that uses it. Called on all ranks; before
    Megatron's process groups are made anew, too.
    """
    for buffers in _installed:
        buffers.clear()
    _installed.clear()
    for name in list(_originals):
        setattr(token_dispatcher, name, _originals.pop(name))
