"""Megatron-Core's flex dispatcher over our buffers, against experts computed in one process.

Megatron's MoELayer itself wants a GPU (tests/multi_gpu/test_megatron.py); its dispatchers do not.

Shapes: T tokens of a rank, H hidden, E experts, K top-k.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dualpipe_ext.launch import run_ranks

pytest.importorskip("megatron.core", reason="needs megatron-core")

HIDDEN, EXPERTS, TOP_K, TOKENS = 16, 8, 3, 12
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def start(tp: int, ep: int) -> Any:
    """Megatron's process groups; returns the integration."""
    # Dynamo would compile the dispatcher's preparations, for longer than all the rest takes.
    torch._dynamo.config.disable = True
    from megatron.core import parallel_state

    from dualpipe_ext.integrations import megatron

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        expert_tensor_parallel_size=tp,
        expert_model_parallel_size=ep,
        distributed_timeout_minutes=1,
    )
    return megatron


def make_config(backend: str = "deepep", **changes: Any) -> Any:
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    tp = parallel_state.get_tensor_model_parallel_world_size()
    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOP_K,
        tensor_model_parallel_size=tp,
        expert_tensor_parallel_size=tp,
        sequence_parallel=tp > 1,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        moe_token_dispatcher_type="flex",
        moe_flex_dispatcher_backend=backend,
        add_bias_linear=False,
        use_cpu_initialization=True,
        **changes,
    )


def make_dispatcher(config: Any) -> Any:
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher

    ep = parallel_state.get_expert_model_parallel_world_size()
    first = parallel_state.get_expert_model_parallel_rank() * (EXPERTS // ep)
    return MoEFlexTokenDispatcher(
        EXPERTS // ep,
        list(range(first, first + EXPERTS // ep)),
        config=config,
        pg_collection=get_default_pg_collection(),
    )


def routing(rank: int, tokens: int, drop: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], the map of choices bool [T, E] and their weights [T, E] of a rank, in float64."""
    gen = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(tokens, HIDDEN, dtype=torch.float64, generator=gen)
    scores = torch.rand(tokens, EXPERTS, dtype=torch.float64, generator=gen)
    routed = torch.zeros(tokens, EXPERTS, dtype=torch.bool)
    routed.scatter_(1, scores.topk(TOP_K, dim=1).indices, True)
    if drop:
        routed &= torch.rand(tokens, EXPERTS, generator=gen) < 0.6
    return x, routed, torch.where(routed, scores, 0.0)


def expert_weights() -> Tensor:
    """[E, H, H]: an expert is ``tanh(x @ w) * weight``."""
    gen = torch.Generator().manual_seed(7)
    return torch.randn(EXPERTS, HIDDEN, HIDDEN, dtype=torch.float64, generator=gen) / HIDDEN


def through_dispatcher(
    dispatcher: Any, x: Tensor, routed: Tensor, probs: Tensor, weights: Tensor
) -> Tensor:
    """What MoELayer does with a dispatcher, with experts that ``weights`` [E/R, H, H] make."""
    rows, dispatched = dispatcher.dispatch_preprocess(x, routed, probs)
    return through_experts(dispatcher, rows, dispatched, weights)


def through_experts(dispatcher: Any, rows: Tensor, dispatched: Tensor, weights: Tensor) -> Tensor:
    """What comes after the preparation."""
    rows, dispatched = dispatcher.token_dispatch(rows, dispatched)
    rows, sizes, row_probs = dispatcher.dispatch_postprocess(rows, dispatched)
    assert sizes.device.type == "cpu"
    parts = zip(rows.split(sizes.tolist()), row_probs.split(sizes.tolist()), weights, strict=True)
    outputs = [torch.tanh(part @ w) * p[:, None] for part, p, w in parts]
    combined = torch.cat(outputs).to(rows.dtype)
    y = dispatcher.token_combine(dispatcher.combine_preprocess(combined))
    # Under 1F1B overlap Megatron takes the memory of what a combine was given.
    combined.untyped_storage().resize_(0)
    return dispatcher.combine_postprocess(y)


def expected(x: Tensor, probs: Tensor, weights: Tensor) -> Tensor:
    """Every expert on every token, in one process."""
    return (torch.tanh(torch.einsum("th,ehf->etf", x, weights)) * probs.t()[..., None]).sum(0)


def compare(
    dispatcher: Any,
    tokens: list[int],
    drop: bool = False,
    close: dict[str, float] = CLOSE,
    through: Callable[..., Tensor] = through_dispatcher,
) -> None:
    """Outputs and all gradients of a call equal those of one process."""
    from megatron.core import parallel_state

    rank = dist.get_rank()
    inputs = [routing(r, count, drop) for r, count in enumerate(tokens)]
    x, routed, probs = inputs[rank]
    x, probs = x.clone().requires_grad_(), probs.clone().requires_grad_()
    mine = expert_weights()[dispatcher.local_expert_indices].requires_grad_()
    # With expert tensor parallelism the outputs of the ranks that share an expert are summed.
    tp = parallel_state.get_tensor_model_parallel_world_size()
    y = through(dispatcher, x, routed, probs, mine)
    gen = torch.Generator().manual_seed(1)
    cotangent = torch.randn(max(tokens), HIDDEN, dtype=torch.float64, generator=gen)
    y.backward(cotangent[: len(x)])

    whole = expert_weights().requires_grad_()
    leaves = [(x.clone().requires_grad_(), p.clone().requires_grad_()) for x, _, p in inputs]
    wanted = [expected(x, p, whole) for x, p in leaves]
    for want in wanted:
        want.backward(cotangent[: len(want)])
    want_x, want_probs = leaves[rank]
    torch.testing.assert_close(y, tp * wanted[rank], **close)
    torch.testing.assert_close(x.grad, tp * want_x.grad, **close)
    torch.testing.assert_close(probs.grad, (tp * want_probs.grad) * routed, **close)
    torch.testing.assert_close(mine.grad, whole.grad[dispatcher.local_expert_indices], **close)


def equals_one_process() -> None:
    megatron = start(tp=1, ep=2)
    megatron.install(transport="collective")
    for backend in ("deepep", "hybridep"):
        config = make_config(backend)
        # Two layers, whose calls share a buffer.
        first, second = make_dispatcher(config), make_dispatcher(config)
        compare(first, [TOKENS, TOKENS])
        compare(second, [TOKENS, TOKENS])
        compare(first, [TOKENS, TOKENS], drop=True)
        assert first._comm_manager._buffer is second._comm_manager._buffer
        assert first._comm_manager.handle is None
        # Fewer tokens than in the first call, and none.
        compare(second, [3, TOKENS])
        compare(second, [TOKENS, 0])


def several_at_once() -> None:
    """Micro-batches whose backwards come later, in any order."""
    megatron = start(tp=1, ep=2)
    megatron.install(transport="collective")
    dispatcher = make_dispatcher(make_config())
    weights = expert_weights()
    mine = weights[dispatcher.local_expert_indices]
    results = []
    for tokens in (TOKENS, 5, 9):
        x, routed, probs = routing(dist.get_rank(), tokens)
        leaf = x.clone().requires_grad_()
        y = through_dispatcher(dispatcher, leaf, routed, probs, mine)
        torch.testing.assert_close(y, expected(x, probs, weights), **CLOSE)
        results.append((y, leaf, probs))
    for i in (1, 2, 0):
        y, leaf, probs = results[i]
        y.sum().backward()
        want = leaf.detach().clone().requires_grad_()
        expected(want, probs, weights).sum().backward()
        torch.testing.assert_close(leaf.grad, want.grad, **CLOSE)


def as_megatron_may_call_it() -> None:
    """Checkpoints, evaluation, graphs of the preparation, in-place sums."""
    megatron = start(tp=1, ep=2)
    megatron.install(transport="collective")
    for backend in ("deepep", "hybridep"):
        dispatcher = make_dispatcher(make_config(backend))

        def recomputed(*arguments: Any, reentrant: bool) -> Tensor:
            return checkpoint(through_dispatcher, *arguments, use_reentrant=reentrant)

        for reentrant in (False, True):
            compare(dispatcher, [TOKENS] * 2, through=partial(recomputed, reentrant=reentrant))

        def replayed(d: Any, x: Tensor, routed: Tensor, probs: Tensor, weights: Tensor) -> Tensor:
            # A graph of the preparation hands over what it names; all else is of the capture.
            rows, numbers = d.dispatch_preprocess(x, routed, probs)
            names = [name.removeprefix("_comm_manager.") for name in d.cudagraph_attrs]
            told = {name: getattr(d._comm_manager, name) for name in names}
            d.dispatch_preprocess(x, routed.flip(1), probs.flip(1))
            for name, value in told.items():
                setattr(d._comm_manager, name, value)
            return through_experts(d, rows, numbers, weights)

        compare(dispatcher, [TOKENS] * 2, through=replayed)

        def added_to(*arguments: Any) -> Tensor:
            y = through_dispatcher(*arguments)
            y += 0.0  # as an overlapped shared expert does
            return y

        compare(dispatcher, [TOKENS] * 2, through=added_to)
        x, routed, probs = routing(dist.get_rank(), TOKENS)
        with torch.no_grad():
            mine = expert_weights()[dispatcher.local_expert_indices]
            y = through_dispatcher(dispatcher, x, routed, probs, mine)
        torch.testing.assert_close(y, expected(x, probs, expert_weights()), **CLOSE)


def nothing_is_kept() -> None:
    """Neither handles after a backward, nor buffers of groups that are gone."""
    from megatron.core import parallel_state

    megatron = start(tp=1, ep=2)
    handles: list[Any] = []

    def watched(d: Any, *arguments: Any) -> Tensor:
        combine = d._comm_manager.combine

        def watching(*given: Any) -> Tensor:
            handles.append(weakref.ref(d._comm_manager.handle))
            return combine(*given)

        d._comm_manager.combine = watching
        y = through_dispatcher(d, *arguments)
        d._comm_manager.combine = combine
        return y

    for _ in range(2):
        megatron.install(transport="collective")
        dispatcher = make_dispatcher(make_config())
        compare(dispatcher, [TOKENS] * 2, through=watched)
        gc.collect()
        assert handles.pop()() is None
        (buffers,) = megatron._installed
        assert len(buffers._made) == 1
        megatron.uninstall()
        assert not buffers._made
        parallel_state.destroy_model_parallel()
        start(tp=1, ep=2)


def tensor_parallel_experts() -> None:
    megatron = start(tp=2, ep=2)
    megatron.install(transport="collective")
    compare(make_dispatcher(make_config()), [TOKENS] * 4)


def pads_for_quantised_experts() -> None:
    megatron = start(tp=1, ep=2)
    megatron.install(transport="collective")
    config = make_config()
    config.fp8 = "e4m3"  # the constructor wants Transformer Engine for it
    from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization

    alignment = get_align_size_for_quantization(config)
    assert alignment > 1
    told = []

    def watched(d: Any, *arguments: Any) -> Tensor:
        postprocess = d.dispatch_postprocess

        def watching(*given: Any) -> Any:
            told.append(postprocess(*given))
            return told[-1]

        d.dispatch_postprocess = watching
        return through_dispatcher(d, *arguments)

    compare(make_dispatcher(config), [TOKENS, TOKENS], through=watched)
    ((rows, sizes, numbers),) = told
    assert (sizes % alignment == 0).all()
    assert len(rows) == len(numbers) == sizes.sum() > 0
    assert (numbers == 0).sum() > 0, "padding has no weight"


def low_precision_probs() -> None:
    """Weights in bfloat16 travel as float32, and get their gradients back."""
    megatron = start(tp=1, ep=2)
    megatron.install(transport="collective")
    dispatcher = make_dispatcher(make_config())
    x, routed, probs = routing(dist.get_rank(), TOKENS)
    x, probs = x.bfloat16().requires_grad_(), probs.bfloat16().requires_grad_()
    weights = expert_weights()[dispatcher.local_expert_indices].bfloat16()
    y = through_dispatcher(dispatcher, x, routed, probs, weights)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    want = expected(x.detach().double(), probs.detach().double(), expert_weights())
    torch.testing.assert_close(y.double(), want, rtol=0.03, atol=0.03)
    assert probs.grad.dtype == torch.bfloat16
    leaf = probs.detach().double().requires_grad_()
    expected(x.detach().double(), leaf, expert_weights()).sum().backward()
    largest = float(leaf.grad.abs().max())
    torch.testing.assert_close(
        probs.grad.double(), leaf.grad * routed, rtol=0.0, atol=0.03 * largest
    )


CHECKS: dict[str, tuple[int, Callable[[], None]]] = {
    "equals_one_process": (2, equals_one_process),
    "several_at_once": (2, several_at_once),
    "tensor_parallel_experts": (4, tensor_parallel_experts),
    "pads_for_quantised_experts": (2, pads_for_quantised_experts),
    "low_precision_probs": (2, low_precision_probs),
    "as_megatron_may_call_it": (2, as_megatron_may_call_it),
    "nothing_is_kept": (2, nothing_is_kept),
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_flex_dispatcher(name: str) -> None:
    ranks, check = CHECKS[name]
    run_ranks(check, ranks, backend="gloo", run_timeout_s=200)


def complaints() -> list[str]:
    """What too many tokens and unusable configurations are told, on each rank."""
    megatron = start(tp=1, ep=2)
    megatron.install(transport="collective")
    dispatcher = make_dispatcher(make_config())
    compare(dispatcher, [4, TOKENS])
    told = []
    x, routed, probs = routing(0, TOKENS + 1)
    with pytest.raises(ValueError, match="expected") as failure:
        through_dispatcher(dispatcher, x, routed, probs, expert_weights()[:4])
    told.append(str(failure.value))
    # What was refused took nothing with it.
    compare(dispatcher, [TOKENS, TOKENS])
    megatron.install(max_tokens=TOKENS + 1, transport="collective")
    compare(make_dispatcher(make_config()), [2, TOKENS + 1])
    for name, value in (
        ("moe_pad_expert_input_to_capacity", True),
        ("moe_expert_rank_capacity_factor", 1.5),
    ):
        config = make_config("hybridep")
        setattr(config, name, value)
        with pytest.raises(ValueError, match="expected") as failure:
            make_dispatcher(config)
        told.append(str(failure.value))
    config = make_config("deepep")
    config.overlap_moe_expert_parallel_comm = True
    with pytest.raises(ValueError, match="expected") as failure:
        make_dispatcher(config)
    told.append(str(failure.value))
    config.moe_flex_dispatcher_backend = "hybridep"
    manager = make_dispatcher(config)._comm_manager
    for too_early in (manager.dispatch, manager.combine):
        with pytest.raises(ValueError, match="expected") as failure:
            too_early(x)
        told.append(str(failure.value))
    return told


def test_what_cannot_be_served_is_refused() -> None:
    for told in run_ranks(complaints, 2, backend="gloo", run_timeout_s=200):
        too_many, padded, bounded, overlapped, *too_early = told
        assert too_many == (
            f"expected at most {TOKENS} tokens of a rank in one call, got {TOKENS + 1}: give "
            "megatron.install(max_tokens=) the most there will be"
        )
        assert padded.startswith("expected moe_pad_expert_input_to_capacity to be unset")
        assert padded.endswith("got True")
        assert bounded.startswith("expected moe_expert_rank_capacity_factor to be unset")
        assert bounded.endswith("got 1.5")
        assert overlapped == (
            "expected moe_flex_dispatcher_backend='hybridep' with overlap_moe_expert_parallel_comm "
            "and dualpipe_ext, got 'deepep'"
        )
        assert too_early == [
            "expected setup_metadata before a dispatch, got none",
            "expected a dispatch before every combine, got none",
        ]


def test_uninstall_gives_megatron_its_own_back() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    from dualpipe_ext.integrations import megatron

    names = ("_DeepepManager", "_HybridEPManager")
    before = [getattr(token_dispatcher, name) for name in names]
    megatron.install()
    megatron.install(num_sms=8)
    assert not set(before) & {getattr(token_dispatcher, name) for name in names}
    megatron.uninstall()
    megatron.uninstall()
    assert [getattr(token_dispatcher, name) for name in names] == before


def test_a_bound_on_tokens_is_checked() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    from dualpipe_ext.integrations import megatron

    before = token_dispatcher._DeepepManager
    for most in (-5, 0):
        with pytest.raises(ValueError, match=f"expected max_tokens to be None or .* got {most}"):
            megatron.install(max_tokens=most)
    assert token_dispatcher._DeepepManager is before


def test_another_megatron_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from dualpipe_ext.integrations import megatron

    monkeypatch.setattr(megatron, "token_dispatcher", SimpleNamespace(__name__="other"))
    with pytest.raises(RuntimeError, match="expected megatron-core with _DeepepManager and"):
        megatron.install()
