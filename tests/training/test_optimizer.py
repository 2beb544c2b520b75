import itertools

import pytest
import torch
from torch import nn

from dualpipe_ext.eplb.exchange import as_integers
from dualpipe_ext.training.optimizer import MasterAdamW, learning_rate


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {
        "w": nn.Parameter(torch.randn(6, 5, dtype=dtype)),
        "norm": nn.Parameter(torch.ones(5, dtype=dtype)),
    }


def set_grads(params: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def test_equals_adamw_on_float32():
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = MasterAdamW(ours, weight_decay=0.1)
    reference = torch.optim.AdamW(
        [
            {"params": [theirs["w"]], "weight_decay": 0.1},
            {"params": [theirs["norm"]], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        lr=0.01,
    )
    for step in range(4):
        set_grads(ours, step)
        set_grads(theirs, step)
        for p in theirs.values():
            p.grad *= 0.5
        optimizer.step(0.01, grad_scale=torch.tensor(0.5))
        reference.step()
        assert all(p.grad is None for p in ours.values())
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_bfloat16_parameters_follow_float32_masters():
    low = parameters(torch.bfloat16)
    full = {name: nn.Parameter(p.detach().float()) for name, p in low.items()}
    optimizer, reference = MasterAdamW(low, weight_decay=0.0), MasterAdamW(full, weight_decay=0.0)
    # Steps far below bfloat16's resolution must add up all the same.
    for _ in range(20):
        set_grads(low, 0)
        for name, p in full.items():
            p.grad = low[name].grad.float()
        for each in (optimizer, reference):
            each.step(1e-4, grad_scale=torch.tensor(1.0))
    for name, p in low.items():
        assert torch.equal(optimizer.masters[name], full[name])
        assert torch.equal(p, full[name].to(torch.bfloat16))


def test_a_restored_optimizer_goes_on_bit_for_bit():
    params = parameters(torch.bfloat16)
    optimizer = MasterAdamW(params, weight_decay=0.1)
    for step in range(3):
        set_grads(params, step)
        optimizer.step(0.01, grad_scale=torch.tensor(1.0))
    copy = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
    restored = MasterAdamW(copy, weight_decay=0.1)
    restored.load_state_dict(optimizer.state_dict())
    for each, named in ((optimizer, params), (restored, copy)):
        set_grads(named, 9)
        each.step(0.01, grad_scale=torch.tensor(1.0))
    assert all(torch.equal(params[name], copy[name]) for name in params)
    assert all(torch.equal(optimizer.masters[n], restored.masters[n]) for n in params)


def test_tensors_of_lists_all_state_of_the_parameters_shape():
    params = parameters(torch.bfloat16)
    optimizer = MasterAdamW(params, weight_decay=0.1)
    assert len(optimizer.tensors_of("w")) == 2
    set_grads(params, 0)
    optimizer.step(0.01, grad_scale=torch.tensor(1.0))
    tensors = optimizer.tensors_of("w")
    assert [t.shape for t in tensors] == [(6, 5)] * 4
    assert [t.dtype for t in tensors] == [torch.bfloat16] + [torch.float32] * 3


def test_learning_rate_warms_up_and_decays_to_a_tenth():
    rates = [learning_rate(s, peak=2.0, warmup=10, steps=100) for s in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0.2)
    assert learning_rate(500, peak=2.0, warmup=10, steps=100) == pytest.approx(0.2)


def test_hooks_run_around_a_step():
    params = parameters(torch.bfloat16)
    optimizer = MasterAdamW(params, weight_decay=0.0)
    seen = []

    def note(what):
        return lambda opt, args, kwargs: seen.append((what, params["w"].detach().clone()))

    handles = [
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
    ]
    start = params["w"].detach().clone()
    set_grads(params, 0)
    optimizer.step(0.1, grad_scale=torch.tensor(1.0))
    assert [what for what, _ in seen] == ["before", "after"]
    assert torch.equal(seen[0][1], start)
    # After the masters have been rounded into the parameters.
    assert torch.equal(seen[1][1], params["w"])
    assert not torch.equal(params["w"], start)
    for handle in handles:
        handle.remove()
    set_grads(params, 1)
    optimizer.step(0.1, grad_scale=torch.tensor(1.0))
    assert len(seen) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_migration_writes_counts_as_a_change(dtype):
    """Whoever keeps something made of a parameter, as FP8 experts do, looks at its version."""
    params = parameters(dtype)
    optimizer = MasterAdamW(params, weight_decay=0.0)
    set_grads(params, 0)
    optimizer.step(0.01, grad_scale=torch.tensor(1.0))
    before = params["w"]._version
    rows = as_integers(optimizer.tensors_of("w")[0])
    rows.index_copy_(0, torch.tensor([2]), torch.zeros(1, 5, dtype=rows.dtype))
    assert not params["w"][2].any()
    assert params["w"]._version > before
    before = params["w"]._version
    set_grads(params, 1)
    optimizer.step(0.01, grad_scale=torch.tensor(1.0))
    assert params["w"]._version > before
