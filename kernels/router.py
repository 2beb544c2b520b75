"""Fused group-limited router: logits to chosen experts, weights, counts and slots.

The rules are DeepSeek-V3's (technical report, section 2.1.2): sigmoid scores; a bias that takes
part in the selection only; a group's score is the sum of its two best biased scores, and experts
outside the best groups count as -inf; the scores of the chosen, without bias, are normalised to sum
to one and scaled. :func:`choose_experts` defines the selection in torch operations: ties go to the
lowest index, NaN counts as greater than +inf, and the choices are in falling order. The kernels
choose the same indices, because their scores have the same bits as ``torch.sigmoid``.

One kernel reads the logits, once. Where experts have replicas, a second one reads the choices to
give each use of an expert its slot, as ``dualpipe_ext.eplb.select_replicas`` defines it: that needs
the number of uses before it, hence all counts of the first.

T tokens, E logical experts, K top-k, G groups of E/G experts, X most replicas of one expert, B
blocks of tokens that one program handles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from dualpipe_ext.kernels.backend import runs_triton
from dualpipe_ext.kernels.router_grad import route_grad
from torch import Tensor
from torch.autograd.function import once_differentiable

from dualpipe_ext.eplb.placement import select_replicas
from dualpipe_ext.eplb.shares import SHARE_BITS, share_phase

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:  # not on every platform that torch runs on
    triton = None

# Experts of one token, with groups and their sizes padded to powers of two: a program's registers.
MAX_PADDED_EXPERTS = 4096
MAX_TOP_K = 64

# Scores that 4 warps hold, 16 for each thread, as 64-bit keys: more would spill.
_SCORES = 2048
_MAX_TOKENS = 16
# (token, choice) pairs that one program compares with each other to count the uses of an expert.
_PAIRS = 128


class Routing(NamedTuple):
    """What the router decides.

    Attributes:
        topk_idx: int64 [T, K], logical experts, best first.
        topk_weights: [T, K] in the dtype of the logits, differentiable.
        slot_idx: int64 [T, K], the physical experts; ``topk_idx`` where there are no replicas.
        counts: int64 [E], tokens that chose each logical expert; added to, if given to the call.
    """

    topk_idx: Tensor
    topk_weights: Tensor
    slot_idx: Tensor
    counts: Tensor


class _Rules(NamedTuple):
    num_groups: int
    top_groups: int
    top_k: int
    route_scale: float


class _Maps(NamedTuple):
    log2phy: Tensor
    logcnt: Tensor
    split: Tensor | None
    offset: int


def route(
    logits: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    top_groups: int,
    top_k: int,
    route_scale: float,
    log2phy: Tensor | None = None,
    logcnt: Tensor | None = None,
    replica_offset: int = 0,
    split: Tensor | None = None,
    counts: Tensor | None = None,
) -> Routing:
    """Choose K experts for each token, and a replica of each.

    Kernels for float32 on CUDA, torch operations elsewhere. Nothing is read back from a GPU.

    Args:
        logits: float32 or float64 [T, E], rows contiguous.
        bias: floating [E], added to the scores for the selection.
        num_groups: G, divides E. Padded to powers of two, G times E/G is at most 4096.
        top_groups: groups that a token may choose from.
        top_k: K, at most 64 and at most the experts in ``top_groups`` groups.
        route_scale: what the weights of a token sum to.
        log2phy: int64 [E, X], the slots of each expert, or None: every expert is its own slot.
        logcnt: int64 [E], its replicas, from 1 to X; given together with ``log2phy``.
        replica_offset: where the round robin over replicas starts; at least 0, use the rank.
        split: int32 [E, X], the replicas' shares (``ReplicaSplit.shares``); None for equal ones.
        counts: int64 [E] contiguous, to which the tokens of each expert are added; by default
            zeros. The kernel adds to it anyway: a sum over micro-batches costs no pass of its own.

    Returns:
        The :class:`Routing`. Gradients flow from its weights to the logits.

    Raises:
        ValueError: sizes, dtypes or devices that do not fit together.

    Example: logits [[0, 2, 1, -1], [0, 2, 1, -1]] with bias 0, two groups, one of them chosen, top
    1, scale 2 give experts [[1], [1]] (the groups score 1.38 and 1.00), weights [[2], [2]] and
    counts [0, 2, 0, 0]; if expert 1 has the slots 5 and 6, slots [[5], [6]].
    """
    rules = _Rules(num_groups, top_groups, top_k, route_scale)
    _check_sizes(logits, bias, rules)
    maps = _check_maps(logits, log2phy, logcnt, split, replica_offset)
    if counts is None:
        counts = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
    fits = counts.shape == bias.shape and counts.dtype == torch.int64 and counts.is_contiguous()
    _expect(fits, f"counts int64 {list(bias.shape)} contiguous", counts, logits)
    topk_weights, topk_idx, slot_idx = _Route.apply(logits, bias, rules, maps, counts)
    return Routing(topk_idx, topk_weights, topk_idx if maps is None else slot_idx, counts)


def choose_experts(biased: Tensor, *, num_groups: int, top_groups: int, top_k: int) -> Tensor:
    """The selection, in torch operations: what the kernel's indices must equal.

    Args:
        biased: floating [T, E], scores plus bias.

    Returns:
        int64 [T, K], from the highest biased score to the lowest, ties from the lowest index.
    """
    grouped = biased.unflatten(1, (num_groups, -1))  # [T, G, E/G]
    group_scores = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(dim=2)
    groups = group_scores.sort(dim=1, descending=True, stable=True).indices[:, :top_groups]
    closed = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, groups, False)
    open_scores = grouped.masked_fill(closed.unsqueeze(2), float("-inf")).flatten(1)
    return open_scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k]


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, bias, rules, maps, counts):
        run = _route_triton if runs_triton(logits) else _route_torch
        topk_idx, scores, weights, slot_idx = run(logits, bias, rules, maps, counts)
        ctx.save_for_backward(topk_idx, scores)
        ctx.num_experts, ctx.route_scale = logits.shape[1], rules.route_scale
        if slot_idx is None:  # an output must not be returned twice: route() fills it in
            slot_idx = topk_idx.new_empty(0)
        ctx.mark_non_differentiable(topk_idx, slot_idx)
        return weights, topk_idx, slot_idx

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_weights, *_):
        how = {"num_experts": ctx.num_experts, "route_scale": ctx.route_scale}
        return route_grad(grad_weights, *ctx.saved_tensors, **how), None, None, None, None


def _route_torch(logits, bias, rules, maps, counts):
    num_groups, top_groups, top_k, route_scale = rules
    scores = torch.sigmoid(logits)
    topk_idx = choose_experts(
        scores + bias.to(logits.dtype), num_groups=num_groups, top_groups=top_groups, top_k=top_k
    )
    chosen = scores.gather(1, topk_idx)
    weights = chosen / chosen.sum(dim=1, keepdim=True) * route_scale
    ids = topk_idx.flatten()
    counts.scatter_add_(0, ids, torch.ones_like(ids))
    slot_idx = None
    if maps is not None:
        slot_idx = select_replicas(
            topk_idx, maps.log2phy, maps.logcnt, offset=maps.offset, split=maps.split
        )
    return topk_idx, chosen, weights, slot_idx


def _route_triton(logits, bias, rules, maps, counts):
    num_groups, top_groups, top_k, route_scale = rules
    num_tokens, num_experts = logits.shape
    sizes = _sizes(num_experts, num_groups, top_k)
    num_blocks = triton.cdiv(num_tokens, sizes["TOKENS"])
    topk_idx = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    scores = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    weights = torch.empty_like(scores)
    slot_idx = None if maps is None else torch.empty_like(topk_idx)
    if num_tokens == 0:
        return topk_idx, scores, weights, slot_idx
    block_counts = None
    if maps is not None:
        # By expert: torch sums up along contiguous numbers ten times as fast as across them.
        block_counts = counts.new_empty((num_experts, num_blocks), dtype=torch.int32)
    # Triton launches on the current device, whichever one the tensors are on.
    with torch.cuda.device_of(logits):
        _route_kernel[(num_blocks,)](
            logits,
            bias.to(torch.float32).contiguous(),
            topk_idx,
            scores,
            weights,
            counts,
            block_counts,
            num_tokens,
            logits.stride(0),
            float(route_scale),
            NUM_GROUPS=num_groups,
            TOP_GROUPS=top_groups,
            HAS_REPLICAS=maps is not None,
            LIBDEVICE=logits.is_cuda,
            **sizes,
            num_warps=_num_warps(sizes),
            enable_fp_fusion=False,
        )
        if maps is not None:
            _slot_kernel[(num_blocks,)](
                topk_idx,
                block_counts.cumsum(1),  # int64 [E, B]
                maps.log2phy.contiguous(),
                maps.logcnt.contiguous(),
                None if maps.split is None else maps.split.contiguous(),
                slot_idx,
                num_tokens,
                maps.log2phy.shape[1],
                maps.offset if maps.split is None else share_phase(maps.offset),
                TOKENS=sizes["TOKENS"],
                TOP_K=top_k,
                PAIRS=sizes["TOKENS"] * sizes["TOP_K_PADDED"],
                HAS_SPLIT=maps.split is not None,
                BITS=SHARE_BITS,
            )
    return topk_idx, scores, weights, slot_idx


if triton is not None:
    # Below the key of any float, -inf included.
    _NEVER = tl.constexpr(-(2**63))

    @triton.jit
    def _sigmoid(x, LIBDEVICE: tl.constexpr):  # noqa: N803  Triton's convention for constants
        # As torch computes it on a GPU, to the last bit: Triton's own exp and division are
        # approximations, and rounding must not decide who is chosen. The interpreter has no
        # libdevice.
        exp = libdevice.exp(-x) if LIBDEVICE else tl.exp(-x)
        return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + exp)

    @triton.jit
    def _key(value, index, LAST: tl.constexpr):  # noqa: N803
        # An integer that orders first by value, NaN greatest, then by falling index. Value and
        # index come back out of it. -0, which would sort below +0, is no sum of a sigmoid.
        bits = value.to(tl.int32, bitcast=True)
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        bits = tl.where(value != value, 0x7FFFFFFF, bits)
        return (bits.to(tl.int64) << 32) | (LAST - index).to(tl.int64)

    @triton.jit
    def _value(key):
        bits = (key >> 32).to(tl.int32)
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        return bits.to(tl.float32, bitcast=True)

    @triton.jit
    def _index(key, LAST: tl.constexpr):  # noqa: N803
        return LAST - (key & 0x7FFFFFFF).to(tl.int32)

    @triton.jit
    def _route_kernel(
        logits_ptr,
        bias_ptr,
        topk_idx_ptr,
        scores_ptr,
        weights_ptr,
        counts_ptr,
        block_counts_ptr,
        num_tokens,
        logits_stride,
        route_scale,
        NUM_GROUPS: tl.constexpr,  # noqa: N803
        GROUP_SIZE: tl.constexpr,  # noqa: N803
        TOP_GROUPS: tl.constexpr,  # noqa: N803
        TOP_K: tl.constexpr,  # noqa: N803
        HAS_REPLICAS: tl.constexpr,  # noqa: N803
        LIBDEVICE: tl.constexpr,  # noqa: N803
        TOKENS: tl.constexpr,  # noqa: N803
        GROUPS_PADDED: tl.constexpr,  # noqa: N803
        SIZE_PADDED: tl.constexpr,  # noqa: N803
        TOP_K_PADDED: tl.constexpr,  # noqa: N803
    ):
        LAST: tl.constexpr = NUM_GROUPS * GROUP_SIZE - 1  # noqa: N806
        block = tl.program_id(0).to(tl.int64)
        token = block * TOKENS + tl.arange(0, TOKENS)
        group = tl.arange(0, GROUPS_PADDED)
        member = tl.arange(0, SIZE_PADDED)
        expert = group[:, None] * GROUP_SIZE + member[None, :]
        real = (group[:, None] < NUM_GROUPS) & (member[None, :] < GROUP_SIZE)
        inside = (token < num_tokens)[:, None, None] & real[None, :, :]
        row = token * logits_stride

        logits = tl.load(
            logits_ptr + row[:, None, None] + expert[None, :, :], inside, other=0.0
        )  # [TOKENS, GROUPS_PADDED, SIZE_PADDED]
        bias = tl.load(bias_ptr + expert, real, other=0.0)
        key = _key(_sigmoid(logits, LIBDEVICE) + bias[None, :, :], expert[None, :, :], LAST)
        key = tl.where(real[None, :, :], key, _NEVER)

        best = tl.max(key, axis=2)
        group_score = _value(best)
        if GROUP_SIZE > 1:
            others = tl.where(key == best[:, :, None], _NEVER, key)
            group_score += _value(tl.max(others, axis=2))
        group_key = _key(group_score, group[None, :], NUM_GROUPS - 1)
        group_key = tl.where((group < NUM_GROUPS)[None, :], group_key, _NEVER)
        for _ in range(TOP_GROUPS):
            top = tl.max(group_key, axis=1)
            group_key = tl.where(group_key == top[:, None], _NEVER, group_key)
        # Taken groups are marked like the padding, whose experts have no keys to lose.
        closed = (group_key != _NEVER)[:, :, None] & real[None, :, :]
        worst = tl.full([GROUPS_PADDED, SIZE_PADDED], float("-inf"), tl.float32)
        key = tl.where(closed, _key(worst, expert, LAST)[None, :, :], key)

        choice = tl.arange(0, TOP_K_PADDED)
        topk_idx = tl.zeros([TOKENS, TOP_K_PADDED], dtype=tl.int32)
        for k in range(TOP_K):
            top = tl.max(tl.max(key, axis=2), axis=1)
            key = tl.where(key == top[:, None, None], _NEVER, key)
            topk_idx = tl.where((choice == k)[None, :], _index(top, LAST)[:, None], topk_idx)

        # The logits of the chosen are read again, now from the cache: cheaper than to search.
        wanted = (token < num_tokens)[:, None] & (choice < TOP_K)[None, :]
        logits = tl.load(logits_ptr + row[:, None] + topk_idx, wanted, other=0.0)
        scores = tl.where(wanted, _sigmoid(logits, LIBDEVICE), 0.0)
        total = tl.where(token < num_tokens, tl.sum(scores, axis=1), 1.0)
        total = tl.broadcast_to(total[:, None], [TOKENS, TOP_K_PADDED])
        out = token[:, None] * TOP_K + choice[None, :]
        tl.store(topk_idx_ptr + out, topk_idx.to(tl.int64), wanted)
        tl.store(scores_ptr + out, scores, wanted)
        tl.store(weights_ptr + out, tl.div_rn(scores, total) * route_scale, wanted)

        chosen = tl.sum(((key == _NEVER) & inside).to(tl.int32), axis=0)
        # Integers: the sum is the same in any order.
        tl.atomic_add(counts_ptr + expert, chosen.to(tl.int64), real & (chosen > 0), sem="relaxed")
        if HAS_REPLICAS:
            tl.store(block_counts_ptr + expert * tl.num_programs(0) + block, chosen, real)

    @triton.jit
    def _slot_kernel(
        topk_idx_ptr,
        up_to_block_ptr,
        log2phy_ptr,
        logcnt_ptr,
        split_ptr,
        slot_idx_ptr,
        num_tokens,
        max_replicas,
        start,  # the offset of the round robin, or the phase of a split
        TOKENS: tl.constexpr,  # noqa: N803
        TOP_K: tl.constexpr,  # noqa: N803
        PAIRS: tl.constexpr,  # noqa: N803
        HAS_SPLIT: tl.constexpr,  # noqa: N803
        BITS: tl.constexpr,  # noqa: N803
    ):
        block = tl.program_id(0).to(tl.int64)
        pair = tl.arange(0, PAIRS)
        position = block * TOKENS * TOP_K + pair
        inside = (pair < TOKENS * TOP_K) & (position // TOP_K < num_tokens)
        expert = tl.load(topk_idx_ptr + position, inside, other=-1)
        # Read again rather than transposed: a second layout of 128 values is a load away.
        earlier = tl.load(topk_idx_ptr + position, inside, other=-2)
        same = (expert[:, None] == earlier[None, :]) & (pair[None, :] < pair[:, None])
        nth = tl.sum(same.to(tl.int32), axis=1)
        before = up_to_block_ptr + expert * tl.num_programs(0) + block - 1
        nth += tl.load(before, inside & (position >= TOKENS * TOP_K), other=0)
        # Wrong maps must give wrong slots, not reads out of bounds.
        if HAS_SPLIT:  # as dualpipe_ext.eplb.shares.pick_replica
            left = nth.to(tl.int64)
            replica = tl.full([PAIRS], -1, tl.int64)
            for x in range(max_replicas):
                share = tl.load(split_ptr + expert * max_replicas + x, inside, other=0).to(tl.int64)
                taken = (left * share + start) >> BITS
                takes = (((left + 1) * share + start) >> BITS) > taken
                replica = tl.where((replica < 0) & takes, x, replica)
                left -= taken
            replica = tl.maximum(replica, 0)
        else:
            replicas = tl.load(logcnt_ptr + expert, inside, other=1)
            replicas = tl.minimum(tl.maximum(replicas, 1), max_replicas)
            replica = (nth + start) % replicas
        slot = tl.load(log2phy_ptr + expert * max_replicas + replica, inside)
        tl.store(slot_idx_ptr + position, slot, inside)


def _sizes(num_experts: int, num_groups: int, top_k: int) -> dict[str, int]:
    """The kernel's constants that follow from the sizes."""
    group_size = num_experts // num_groups
    groups_padded, size_padded = _power_of_2(num_groups), _power_of_2(group_size)
    top_k_padded = _power_of_2(top_k)
    most = min(_SCORES // (groups_padded * size_padded), _PAIRS // top_k_padded, _MAX_TOKENS)
    return {
        "GROUP_SIZE": group_size,
        "TOP_K": top_k,
        "TOKENS": max(1, most),
        "GROUPS_PADDED": groups_padded,
        "SIZE_PADDED": size_padded,
        "TOP_K_PADDED": top_k_padded,
    }


def _num_warps(sizes: dict[str, int]) -> int:
    return 4 * max(1, sizes["GROUPS_PADDED"] * sizes["SIZE_PADDED"] // _SCORES)


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _check_sizes(logits: Tensor, bias: Tensor, rules: _Rules) -> None:
    allowed = [torch.float32, torch.float64]
    if logits.dim() != 2 or logits.dtype not in allowed or logits.shape[1] == 0:
        raise ValueError(
            f"expected logits [T, E] in one of {allowed}, got {logits.dtype} {list(logits.shape)}"
        )
    num_experts = logits.shape[1]
    if num_experts > 1 and logits.stride(1) != 1:
        raise ValueError(f"expected logits with contiguous rows, got strides {logits.stride()}")
    if bias.shape != (num_experts,) or not bias.is_floating_point() or bias.device != logits.device:
        raise ValueError(
            f"expected a floating bias [{num_experts}] on {logits.device}, "
            f"got {bias.dtype} {list(bias.shape)} on {bias.device}"
        )
    num_groups, top_groups, top_k, _ = rules
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"expected num_groups to divide {num_experts} experts, got {num_groups}")
    if not 1 <= top_groups <= num_groups:
        raise ValueError(f"expected top_groups from 1 to {num_groups}, got {top_groups}")
    group_size = num_experts // num_groups
    most = min(MAX_TOP_K, top_groups * group_size)
    if not 1 <= top_k <= most:
        raise ValueError(f"expected top_k from 1 to {most}, got {top_k}")
    padded = _power_of_2(num_groups) * _power_of_2(group_size)
    if padded > MAX_PADDED_EXPERTS:
        raise ValueError(
            f"expected at most {MAX_PADDED_EXPERTS} experts with groups and their sizes padded to "
            f"powers of two, got {padded}"
        )


def _check_maps(
    logits: Tensor,
    log2phy: Tensor | None,
    logcnt: Tensor | None,
    split: Tensor | None,
    replica_offset: int,
) -> _Maps | None:
    if log2phy is None and logcnt is None and split is None:
        return None
    if log2phy is None or logcnt is None:
        raise ValueError("expected log2phy and logcnt together, got one of them or a split alone")
    if replica_offset < 0:
        raise ValueError(f"expected a replica_offset of at least 0, got {replica_offset}")
    num_experts = logits.shape[1]
    for name, tensor, num_dims in (("log2phy", log2phy, 2), ("logcnt", logcnt, 1)):
        fits = tensor.dim() == num_dims and len(tensor) == num_experts and tensor.numel() > 0
        shape = f"[{num_experts}, X]" if num_dims == 2 else f"[{num_experts}]"
        _expect(fits and tensor.dtype == torch.int64, f"{name} int64 {shape}", tensor, logits)
    if split is not None:
        fits = split.shape == log2phy.shape and split.dtype == torch.int32
        _expect(fits, f"split int32 {list(log2phy.shape)}", split, logits)
    return _Maps(log2phy, logcnt, split, replica_offset)


def _expect(fits: bool, want: str, got: Tensor, logits: Tensor) -> None:
    if not fits or got.device != logits.device:
        raise ValueError(
            f"expected {want} on {logits.device}, got {got.dtype} {list(got.shape)} on {got.device}"
        )
