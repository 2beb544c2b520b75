"""Memory levels of the language model: which gradients change, and what is kept."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dualpipe_ext.ep import Buffer
from dualpipe_ext.launch import run_ranks
from dualpipe_ext.memory import (
    MAX_LEVEL,
    MemoryPlan,
    gradient_errors,
    saved_bytes,
    set_memory_level,
)
from dualpipe_ext.memory.levels import set_memory_plan
from dualpipe_ext.models import LanguageModelStage, ModelConfig, initialize
from dualpipe_ext.models.activations import kept_bytes_per_token
from dualpipe_ext.pipeline.overlap import ChunkGraph, Launcher, run_pair
from dualpipe_ext.pipeline.weight_grad import WeightGradStore, defer_weight_grads

CONFIG = ModelConfig(
    hidden=256,
    num_heads=2,
    num_layers=2,
    num_experts=8,
    top_k=4,
    num_groups=2,
    top_groups=2,
    expert_hidden=128,
    shared_hidden=128,
)
TOKENS = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
FP8_CONFIG = CONFIG.with_overrides(fp8_experts=True)
DOCS = Path(__file__).parents[2] / "docs"
LEVELS = range(MAX_LEVEL + 1)
# Level 1, but for what it recomputes.
KEPT = replace(MemoryPlan.of_level(1), recompute=False)


def build(dtype: torch.dtype, config: ModelConfig = CONFIG) -> LanguageModelStage:
    buffer = Buffer(
        hidden=CONFIG.hidden, num_experts=8, top_k=4, max_tokens=TOKENS.numel(), dtype=dtype
    )
    stage = LanguageModelStage(config, range(2), buffer=buffer).to(dtype)
    for layer in stage.layers.values():
        layer.router.to(torch.promote_types(dtype, torch.float32))
    initialize(stage, config, seed=0, local_experts={0: range(8), 1: range(8)})
    return defer_weight_grads(stage)


def loss_of(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten())


def errors(dtype: torch.dtype, config: ModelConfig = CONFIG) -> dict[int, dict[str, float]]:
    stage = build(dtype, config)
    return {
        level: gradient_errors(stage, lambda: loss_of(stage(TOKENS)), level=level)
        for level in LEVELS
    }


def on_one_rank(fn):
    return run_ranks(fn, 1, run_timeout_s=100)[0]


@pytest.fixture(scope="module")
def double() -> dict[int, dict[str, float]]:
    return on_one_rank(partial(errors, torch.float64))


def test_level_1_only_rounds_elsewhere(double):
    assert set(double[1]) == set(double[0])
    assert max(double[1].values()) < 1e-13


def gradients(stage: LanguageModelStage, plan: MemoryPlan) -> dict[str, Tensor]:
    set_memory_plan(stage, plan)
    stage.zero_grad()
    loss_of(stage(TOKENS)).backward()
    return {name: parameter.grad for name, parameter in stage.named_parameters()}


def changed_by_recomputation(dtype: torch.dtype, config: ModelConfig) -> set[str]:
    """Names of gradients that level 1 would have otherwise if it kept everything."""
    stage = build(dtype, config)
    kept, again = gradients(stage, KEPT), gradients(stage, MemoryPlan.of_level(1))
    return {name for name, grad in kept.items() if not torch.equal(grad, again[name])}


@pytest.mark.parametrize(
    ("dtype", "config"),
    [(torch.float64, CONFIG), (torch.bfloat16, CONFIG), (torch.bfloat16, FP8_CONFIG)],
)
def test_recomputation_changes_no_bit(dtype, config):
    assert on_one_rank(partial(changed_by_recomputation, dtype, config)) == set()


def test_fp8_rows_change_the_gradient_of_what_multiplies_them_only(double):
    for name, error in double[2].items():
        if name.endswith("experts.gate_up"):
            # E4M3's largest relative error; on average it is far smaller.
            assert 0.0 < error < 2.0**-4
        else:
            assert error < 1e-12, name


def test_fp8_everywhere_stays_small(double):
    # All that the backward meets behind a SwiGLU. The router's gradient is a difference of large
    # numbers (weights are normalised), which enlarges its relative error.
    assert max(double[3].values()) < 2 * 2.0**-4
    assert double[3]["head.weight"] < 1e-12
    assert double[3]["layers.1.experts.down"] > 1e-3


def test_level_1_in_bfloat16():
    # The experts' outputs are rounded before they are weighted, or after.
    assert 0.0 < max(on_one_rank(partial(errors, torch.bfloat16))[1].values()) < 2.0**-6


def test_levels_of_experts_that_multiply_in_fp8():
    found = on_one_rank(partial(errors, torch.bfloat16, FP8_CONFIG))
    # Even at level 1: what is weighted before the second product is quantised otherwise.
    for level in (1, 2, 3):
        assert 0.0 < max(found[level].values()) < 2 * 2.0**-4


def saved(dtype: torch.dtype, config: ModelConfig) -> list[int]:
    stage = build(dtype, config)
    found = []
    for level in LEVELS:
        set_memory_level(stage, level)
        # The layers alone: their input would be kept by them, the loss is another matter.
        x = stage.embedding(TOKENS).detach().requires_grad_()

        def forward(x: Tensor = x) -> Tensor:
            for layer in stage.layers.values():
                x = layer(x)
            return x

        found.append(saved_bytes(forward, without=stage.parameters()))
    return found


def unpredicted(dtype: torch.dtype, base: ModelConfig) -> list[tuple[float, int]]:
    """Bytes per token and layer that are kept beyond the prediction, and the prediction."""
    found = []
    for level, count in zip(LEVELS, on_one_rank(partial(saved, dtype, base)), strict=True):
        config = base.with_overrides(memory_level=level)
        predicted = sum(kept_bytes_per_token(config, itemsize=dtype.itemsize).values())
        found.append((count / TOKENS.numel() / CONFIG.num_layers - predicted, predicted))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_is_what_was_predicted(dtype):
    plain = unpredicted(dtype, CONFIG)
    for level, (excess, predicted) in zip(LEVELS, plain, strict=True):
        # Ids and weights beyond it. Below it, the scores that a router keeps inside of a block of
        # ``saved_as``, where they are not counted.
        hidden = CONFIG.num_experts * max(4, dtype.itemsize) if level else 0
        assert 0 <= excess + hidden <= 100, (level, predicted)
    fp8 = unpredicted(dtype, FP8_CONFIG)
    assert [excess for excess, _ in fp8] == [excess for excess, _ in plain]
    assert [predicted for _, predicted in fp8] != [predicted for _, predicted in plain]


def test_level_3_of_deepseek_v3_keeps_less_than_half_and_the_tables_say_so():
    config = ModelConfig(
        hidden=7168, num_heads=56, num_experts=256, top_k=8, num_groups=8, top_groups=4,
        expert_hidden=2048, shared_hidden=2048,
    )  # fmt: skip
    kept = [kept_bytes_per_token(config.with_overrides(memory_level=n)) for n in LEVELS]
    total = [sum(parts.values()) for parts in kept]
    assert total == sorted(total, reverse=True)
    assert total[3] < 0.65 * total[0]  # the target: at least 35% less
    rows = {name: [parts[name] for parts in kept] for name in kept[0]} | {"all": total}
    internals = (DOCS / "internals.md").read_text()
    for name, row in rows.items():
        assert f"| {name} | " + " | ".join(f"{count:,}" for count in row) + " |\n" in internals
    less = [f"{1 - count / total[0]:.0%}" for count in total[1:]]
    assert "| less than level 0 | | " + " | ".join(less) + " |\n" in internals
    guide = (DOCS / "guide.md").read_text()
    for level, count in zip(LEVELS, total, strict=True):
        assert re.search(rf"^\| {level} \|.*\| {count / total[0]:.0%} \|$", guide, re.MULTILINE)


def paired_gradients(plan: MemoryPlan) -> dict[str, Tensor]:
    """Of two chunks, the second's forward interleaved with the first's backward."""
    stage = build(torch.float64)
    set_memory_plan(stage, plan)
    launcher, store = Launcher(torch.device("cpu")), WeightGradStore()
    grad = torch.randn(2, 32, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    graphs = [
        ChunkGraph(stage.phases(), (tokens,), (False,), launcher=launcher, store=store, key=key)
        for key, tokens in enumerate((TOKENS, TOKENS.flip(1)))
    ]
    graphs[0].forward()
    graphs[0].take_outputs()
    graphs[0].start_backward([grad])
    run_pair(graphs[1], graphs[0])
    graphs[1].take_outputs()
    graphs[1].start_backward([grad])
    graphs[1].backward(defer=True)
    graphs[1].weights()
    assert len(store) == 0
    return {name: p.grad for name, p in stage.named_parameters()}


def pairs() -> list[dict[str, Tensor]]:
    """At every level, and at level 1 without recomputation."""
    return [paired_gradients(plan) for plan in (*map(MemoryPlan.of_level, LEVELS), KEPT)]


def test_overlapped_and_deferred_backwards_give_the_same():
    plain, *others, kept = on_one_rank(pairs)
    assert all(torch.equal(others[0][name], grad) for name, grad in kept.items())
    for level, found in enumerate(others, 1):
        largest = 1e-13 if level == 1 else 2 * 2.0**-4
        for name, grad in plain.items():
            assert (found[name] - grad).norm() <= largest * grad.norm(), (level, name)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"memory_level": 4}, "memory_level from 0 to 3, got 4"),
        ({"memory_level": 2, "hidden": 64}, "hidden to be a multiple of 128 .* got 64"),
        ({"memory_level": 3, "expert_hidden": 96}, r"2 \* expert_hidden to be .* got 192"),
        ({"memory_level": 3, "shared_hidden": 32}, r"2 \* shared_hidden to be .* got 64"),
    ],
)
def test_levels_that_do_not_fit_the_model(sizes, message):
    with pytest.raises(ValueError, match=message):
        CONFIG.with_overrides(**sizes)


def test_without_a_shared_expert_any_level_fits():
    assert CONFIG.with_overrides(memory_level=3, shared_hidden=0).memory_level == 3
