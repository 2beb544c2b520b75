"""Megatron-Core's MoELayer, forward and backward: over our buffers as over its own all-to-all."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor

from dualpipe_ext.launch import run_ranks
from tests.multi_gpu import RANKS

pytest.importorskip("megatron.core", reason="needs megatron-core")

HIDDEN, EXPERTS, TOP_K = 256, 4 * RANKS, 3
SEQUENCE, BATCH = 64, 2
OURS = ("nvlink", "copy_engine", "collective")


def make_layer(dispatcher: str, dtype: torch.dtype, **changes: Any) -> Any:
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=128,
        moe_router_topk=TOP_K,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        expert_model_parallel_size=RANKS,
        moe_token_dispatcher_type=dispatcher,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **changes,
    )
    model_parallel_cuda_manual_seed(5)
    spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
    # Megatron-Core 0.16 describes the layer; later ones give what makes it.
    layer = MoELayer(config, spec.submodules) if hasattr(spec, "submodules") else spec(config)
    return layer.cuda()


def run_layer(layer: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients of three calls, the first two of which are under way together."""
    rank = torch.distributed.get_rank()
    found = {}
    gen = torch.Generator().manual_seed(rank)
    shape = (SEQUENCE, BATCH, HIDDEN)
    inputs = [torch.randn(shape, generator=gen).to("cuda", dtype).requires_grad_() for _ in "abc"]
    first, second = layer(inputs[0])[0], layer(inputs[1])[0]
    first.float().square().sum().backward()
    second.float().square().sum().backward()
    third = layer(inputs[2])[0]
    third.float().square().sum().backward()
    for i, (x, y) in enumerate(zip(inputs, (first, second, third), strict=True)):
        found |= {f"y{i}": y, f"x{i}": x.grad}
    found |= {name: p.grad for name, p in layer.named_parameters()}
    assert all(grad is not None for grad in found.values())
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def of_every_dispatcher(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    from megatron.core import parallel_state

    from dualpipe_ext.integrations import megatron

    parallel_state.initialize_model_parallel(expert_model_parallel_size=RANKS)
    reference = make_layer("alltoall", dtype, **changes)
    parameters = {name: p.detach().clone() for name, p in reference.named_parameters()}
    want = run_layer(reference, dtype)
    found = {}
    for transport in OURS:
        megatron.install(transport=transport)
        layer = make_layer("flex", dtype, **changes)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter.copy_(parameters[name])
        found[transport] = run_layer(layer, dtype)
        manager = layer.token_dispatcher._comm_manager
        assert manager._buffer.transport == transport
    megatron.uninstall()
    # Sums of a token's experts are rounded in another order; the largest value sets the scale.
    close = 1e-5 if dtype == torch.float32 else 0.03
    for name, tensor in found["nvlink"].items():
        error = (tensor.double() - want[name].double()).abs().max()
        assert error <= close * want[name].double().abs().max(), f"{name}: {error:.3g}"
        for transport in OURS[1:]:
            assert torch.equal(tensor, found[transport][name]), f"{name} over {transport}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe_shared_expert_intermediate_size": 128},
        {"moe_shared_expert_intermediate_size": 128, "moe_shared_expert_overlap": True},
        {"moe_expert_capacity_factor": 0.7},
    ],
    ids=["plain", "shared", "shared-overlap", "capacity"],
)
def test_a_layer_computes_what_it_does_over_alltoall(
    dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    if "moe_shared_expert_overlap" in changes and version("megatron-core") < "0.19":
        pytest.skip("Megatron-Core before 0.19 overlaps shared experts with alltoall only")
    run_ranks(of_every_dispatcher, RANKS, dtype, changes, run_timeout_s=200)
