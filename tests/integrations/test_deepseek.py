"""A script in the manner of deepseek-ai/DualPipe's own examples, with only the import changed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dualpipe_ext.integrations.deepseek import (
    DualPipe,
    DualPipeV,
    WeightGradStore,
    run_backward,
    set_p2p_tensor_dtype,
    set_p2p_tensor_shapes,
)
from dualpipe_ext.launch import run_ranks

HIDDEN, ROWS, MICRO = 16, 5, 3


class ScaledMatmul(torch.autograd.Function):
    """A user's own layer that knows the store."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)

        def weight_gradient():
            weight.grad += grad.flatten(0, -2).t() @ x.flatten(0, -2)

        if WeightGradStore.enabled:
            Stage.deferred += 1
            WeightGradStore.put(weight_gradient)
        else:
            weight_gradient()
        return grad @ weight, None


class StoreLinear(nn.Linear):
    def forward(self, x):
        return ScaledMatmul.apply(x, self.weight)


class Stage(nn.Module):
    deferred = 0
    overlapped = 0

    def __init__(self):
        super().__init__()
        self.wide = StoreLinear(HIDDEN, 2 * HIDDEN, bias=False)
        self.narrow = StoreLinear(2 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x):
        return self.narrow(F.gelu(self.wide(x)))

    @classmethod
    def overlapped_forward_backward(
        cls,
        module0,
        inputs0,
        criterion0,
        labels0,
        module1,
        loss1,
        outputs1,
        output_grads1,
    ):
        cls.overlapped += 1
        outputs0 = module0(*inputs0)
        outputs0 = [outputs0] if isinstance(outputs0, torch.Tensor) else outputs0
        loss0 = None if criterion0 is None else criterion0(*outputs0, *labels0)
        if loss1 is not None:
            assert loss1.dim() == 0
            assert not outputs1
            loss1.backward()
            loss1.detach_()
        else:
            assert all(o.shape == g.shape for o, g in zip(outputs1, output_grads1, strict=True))
            run_backward(outputs1, output_grads1)
        return outputs0, loss0


def mse(output, target):
    return F.mse_loss(output, target).clone()


def _reference(x, labels, model, chunks):
    losses, outputs = [], []
    for micro_x, micro_l in zip(x.chunk(chunks), labels.chunk(chunks), strict=True):
        y = model(micro_x)
        loss = mse(y, micro_l)
        loss.backward()
        outputs.append(y.detach())
        losses.append(loss.detach())
    return torch.stack(losses), torch.cat(outputs)


def _setup(num_stages, chunks):
    torch.manual_seed(233)
    set_p2p_tensor_shapes([(MICRO, ROWS, HIDDEN)])
    set_p2p_tensor_dtype(torch.float64)
    model = nn.Sequential(*(Stage() for _ in range(num_stages))).double()
    x, labels = (torch.randn(chunks * MICRO, ROWS, HIDDEN).double() for _ in range(2))
    return model, x, labels, *_reference(x, labels, model, chunks)


def _local(model, *indices):
    modules = nn.Sequential(*(Stage().double() for _ in indices))
    for module, index in zip(modules, indices, strict=True):
        module.load_state_dict(model[index].state_dict())
    return modules


def _assert_grads(modules, model, indices):
    for module, index in zip(modules, indices, strict=True):
        for p, q in zip(module.parameters(), model[index].parameters(), strict=True):
            assert not p.grad.requires_grad
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)


def _bidirectional():
    rank, size, chunks = dist.get_rank(), dist.get_world_size(), 20
    first, last = rank == 0, rank == size - 1
    model, full_x, full_l, loss_ref, out_ref = _setup(size, chunks)
    indices = (rank, size - 1 - rank)
    modules = _local(model, *indices)
    pipe = DualPipe(modules)
    assert (pipe.is_first_rank, pipe.is_last_rank) == (first, last)
    assert set(pipe.state_dict()) == {f"module.{k}" for k in modules.state_dict()}

    x = labels = None
    if first:
        x, labels = full_x.chunk(2)[0], full_l.chunk(2)[1]
    elif last:
        x, labels = full_x.chunk(2)[1], full_l.chunk(2)[0]
    loss, outputs = pipe.step(x, num_chunks=chunks, criterion=mse, labels=(labels,))
    assert outputs is None
    if first or last:
        assert torch.equal(loss, loss_ref.chunk(2)[1 if first else 0])
    else:
        assert loss is None
    # As there, the caller sums the gradients of mirrored stages.
    for p0, p1 in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        all0, all1 = ([torch.empty_like(p) for _ in range(size)] for p in (p0, p1))
        dist.all_gather(all0, p0.grad)
        dist.all_gather(all1, p1.grad)
        p0.grad += all1[size - 1 - rank]
        p1.grad += all0[size - 1 - rank]
    _assert_grads(modules, model, indices)
    assert Stage.overlapped > 0
    assert Stage.deferred > 0
    pipe.zero_grad()
    assert modules[0].wide.weight.grad is None

    with torch.no_grad():
        loss, outputs = pipe.step(
            x, num_chunks=chunks, criterion=mse, labels=(labels,), return_outputs=True
        )
    if first or last:
        half = 1 if first else 0
        assert torch.equal(loss, loss_ref.chunk(2)[half])
        assert torch.equal(outputs, out_ref.chunk(2)[half])
    else:
        assert (loss, outputs) == (None, None)
    return True


def _v_shaped(reverse):
    size, chunks = dist.get_world_size(), 9
    mapping = [size - 1 - r if reverse else r for r in range(size)]
    rank = mapping[dist.get_rank()]
    model, x, labels, loss_ref, out_ref = _setup(2 * size, chunks)
    indices = (rank, 2 * size - 1 - rank)
    modules = _local(model, *indices)
    group = dist.new_group(list(range(size)))
    pipe = DualPipeV(modules, process_group=group, rank_mapping=mapping)
    assert pipe.rank == rank
    given = (x, labels) if rank == 0 else (None, None)
    loss, outputs = pipe.step(
        given[0], num_chunks=chunks, criterion=mse, labels=(given[1],), return_outputs=True
    )
    if rank == 0:
        assert torch.equal(loss, loss_ref)
        assert torch.equal(outputs, out_ref)
    else:
        assert (loss, outputs) == (None, None)
    _assert_grads(modules, model, indices)
    return True


def _undeclared():
    pipe = DualPipeV(_local(nn.Sequential(Stage(), Stage()), 0, 1))
    with pytest.raises(ValueError, match="expected set_p2p_tensor_shapes and set_p2p_tensor_dtype"):
        pipe.step(torch.randn(2, HIDDEN), num_chunks=2, criterion=mse, labels=(None,))
    return True


@pytest.mark.parametrize("ranks", [2, 4])
def test_bidirectional_script(ranks):
    assert all(run_ranks(_bidirectional, ranks, run_timeout_s=60))


@pytest.mark.parametrize(("ranks", "reverse"), [(1, False), (3, False), (2, True)])
def test_v_shaped_script(ranks, reverse):
    assert all(run_ranks(_v_shaped, ranks, reverse, run_timeout_s=60))


def test_shapes_must_be_declared():
    assert all(run_ranks(_undeclared, 1, run_timeout_s=60))


def test_store_interface():
    WeightGradStore.clear()
    done = []
    WeightGradStore.put(lambda: done.append(1))
    WeightGradStore.put(lambda: done.append(2))
    WeightGradStore.flush()
    WeightGradStore.put(lambda: done.append(3))
    WeightGradStore.flush()
    WeightGradStore.pop()
    assert done == [1, 2]
    WeightGradStore.clear()
    assert WeightGradStore.funcs_queue.empty()
