"""The average on the CPU: equal to its formula, whatever is skipped, saved or swapped."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from dualpipe_ext.errors import DualPipeError
from dualpipe_ext.memory import ParameterEMA
from dualpipe_ext.memory.ema import round_randomly


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).to(dtype)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def change(model: nn.Module) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape).to(parameter.dtype))
    return values(model)


def average(ema: ParameterEMA) -> dict[str, torch.Tensor]:
    return ema.state_dict()["average"]


def assert_is(got, history, decay: float, steps: list[int]) -> None:
    """``got`` is the closed formula over ``history``, of which entry i counts as steps[i] steps."""
    after = [sum(steps[i + 1 :]) for i in range(len(steps))]
    for name, tensor in got.items():
        start, *rest = (values[name].double() for values in history)
        expected = decay ** sum(steps) * start
        for value, k, later in zip(rest, steps, after, strict=True):
            expected += decay**later * (1 - decay**k) * value
        # Each update rounds its difference, product and sum (2^-24 of the largest value each).
        largest = max(values[name].abs().max().item() for values in history)
        bound = 4 * 2.0**-24 * largest * len(steps)
        assert (tensor.double() - expected).abs().max().item() <= bound


class Gate:
    """Holds the worker before its update until opened."""

    def __init__(self, ema: ParameterEMA, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        add = ema._add

        def held(*args):
            assert self.opened.wait(30)
            add(*args)

        monkeypatch.setattr(ema, "_add", held)


def test_equals_the_closed_formula():
    model = make_model()
    history = [values(model)]
    with ParameterEMA(model, 0.9) as ema:
        for _ in range(30):
            history.append(change(model))
            assert ema.update()
            ema.flush()
        assert (ema.steps, ema.skipped) == (30, 0)
        assert_is(average(ema), history, 0.9, [1] * 30)


def test_skipped_updates_count_in_the_next(monkeypatch):
    model = make_model()
    history = [values(model)]
    with ParameterEMA(model, 0.7) as ema:
        gate = Gate(ema, monkeypatch)
        history.append(change(model))
        assert ema.update()
        for _ in range(3):
            change(model)
            assert not ema.update()
        gate.opened.set()
        ema._wait()
        history.append(change(model))
        assert ema.update()
        assert (ema.steps, ema.skipped) == (5, 3)
        assert_is(average(ema), history, 0.7, [1, 4])


def test_flush_adds_what_was_skipped(monkeypatch):
    model = make_model()
    history = [values(model)]
    with ParameterEMA(model, 0.7) as ema:
        gate = Gate(ema, monkeypatch)
        history.append(change(model))
        ema.update()
        history.append(change(model))
        assert not ema.update()
        gate.opened.set()
        ema.flush()
        assert_is(average(ema), history, 0.7, [1, 1])


def test_update_sees_the_parameters_of_its_step(monkeypatch):
    model = make_model()
    history = [values(model)]
    with ParameterEMA(model, 0.5) as ema:
        gate = Gate(ema, monkeypatch)
        history.append(change(model))
        ema.update()
        change(model)
        gate.opened.set()
        assert_is(average(ema), history, 0.5, [1])


def test_attached_to_an_optimizer():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = [values(model)]
    ema = ParameterEMA(model, 0.9)
    ema.attach(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(2, 7)).square().sum().backward()
        optimizer.step()
        ema.flush()
        history.append(values(model))
    assert_is(average(ema), history, 0.9, [1] * 4)
    with pytest.raises(ValueError, match="expected one optimizer"):
        ema.attach(optimizer)
    with ema.swap_in(), pytest.raises(ValueError, match="swapped in"):
        optimizer.step()
    ema.close()
    optimizer.step()
    assert ema.steps == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_restart_goes_on_with_the_same_bits(dtype):
    model = make_model()
    with ParameterEMA(model, 0.9, dtype=dtype) as ema:
        for _ in range(3):
            change(model)
            ema.update()
            ema.flush()
        state = ema.state_dict()
        # Another model, decay and seed: all of them come from the state.
        other = make_model(seed=1)
        other.load_state_dict(model.state_dict())
        with ParameterEMA(other, 0.5, dtype=dtype, seed=9) as restarted:
            restarted.load_state_dict(state)
            assert (restarted.steps, restarted.decay) == (3, 0.9)
            change(model)
            other.load_state_dict(model.state_dict())
            ema.update()
            restarted.update()
            first, second = average(ema), average(restarted)
            assert all(torch.equal(first[name], second[name]) for name in first)
            # A state is a copy.
            assert any(not torch.equal(first[name], state["average"][name]) for name in first)


def test_swap_in_and_back():
    model = make_model()
    with ParameterEMA(model, 0.9) as ema:
        own = change(model)
        ema.update()
        expected = average(ema)
        addresses = [p.data_ptr() for p in model.parameters()]
        with ema.swap_in() as swapped:
            assert swapped is model
            assert all(torch.equal(t, expected[n]) for n, t in values(model).items())
            assert [p.data_ptr() for p in model.parameters()] == addresses
            with pytest.raises(ValueError, match="swapped in"):
                ema.update()
            with pytest.raises(ValueError, match="swapped in"), ema.swap_in():
                pass
        assert all(torch.equal(t, own[n]) for n, t in values(model).items())
        with pytest.raises(KeyError), ema.swap_in():
            raise KeyError
        assert all(torch.equal(t, own[n]) for n, t in values(model).items())
        other = make_model(seed=1)
        with ema.swap_in(other):
            assert all(torch.equal(t, expected[n]) for n, t in values(other).items())
        assert ema.update()


def test_bfloat16_parameters():
    model = make_model(dtype=torch.bfloat16)
    history = [values(model)]
    with ParameterEMA(model, 0.9) as ema:
        for _ in range(3):
            history.append(change(model))
            ema.update()
            ema.flush()
        assert_is(average(ema), history, 0.9, [1] * 3)


def test_bfloat16_average_moves():
    model = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.75)
    with ParameterEMA(model, 0.999, dtype=torch.bfloat16) as ema:
        with torch.no_grad():
            model.weight.fill_(0.8)
        for _ in range(1000):
            ema.update()
            ema.flush()
        got = average(ema)["weight"]
    assert got.dtype == torch.bfloat16
    expected = 0.8 - 0.05 * 0.999**1000
    # Noise as in the docstring, for the largest distance, over 4096 elements, five deviations.
    noise = (0.05 * 2.0**-8 / 2) ** 0.5
    assert abs(got.double().mean().item() - expected) < 5 * noise / 4096**0.5
    assert got.double().std().item() < 2 * noise


def test_random_rounding_is_right_on_average():
    generator = torch.Generator().manual_seed(0)
    unit = 2.0**-7  # of bfloat16 in [1, 2)
    x = torch.full((10000,), -(1 + 0.25 * unit))
    rounded = round_randomly(x, generator).double()
    assert set(rounded.tolist()) == {-1.0, -(1 + unit)}
    # A coin of 1/4: standard deviation sqrt(3)/4 of a unit, over 10000 throws; five of them.
    assert abs(rounded.mean().item() - x[0].item()) < 5 * unit * 3**0.5 / 4 / 100
    exact = torch.tensor([0.0, -0.0, 1.5, float("inf"), -float("inf"), float("nan")])
    kept = round_randomly(exact, generator).float()
    torch.testing.assert_close(kept, exact, rtol=0, atol=0, equal_nan=True)


def test_a_failed_update_is_reported(monkeypatch):
    ema = ParameterEMA(make_model())

    def fail(*_):
        raise MemoryError("no memory")

    monkeypatch.setattr(ema, "_add", fail)
    ema.update()
    for _ in range(2):
        with pytest.raises(DualPipeError, match="failed: no memory"):
            ema.flush()
    with pytest.raises(DualPipeError, match="failed: no memory"):
        ema.update()
    with pytest.raises(DualPipeError, match="failed: no memory"):
        ema.close()


def test_waiting_is_bounded(monkeypatch):
    ema = ParameterEMA(make_model(), timeout_s=0.05)
    gate = Gate(ema, monkeypatch)
    ema.update()
    with pytest.raises(DualPipeError, match=r"not done after 0.05 s"):
        ema.flush()
    gate.opened.set()
    ema._update.result(30)
    ema.close()


def test_a_copy_that_never_ends():
    class Never:
        def query(self) -> bool:
            return False

    with ParameterEMA(make_model(), timeout_s=0.05) as ema:
        before = average(ema)
        with pytest.raises(TimeoutError, match=r"copy to the host not done after 0.05 s"):
            ema._add({}, Never(), 1)
        assert all(torch.equal(t, before[name]) for name, t in average(ema).items())


def test_closed():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters())
    ema = ParameterEMA(model)
    state = ema.state_dict()
    ema.close()
    ema.close()
    uses = [ema.update, ema.flush, ema.state_dict, lambda: ema.load_state_dict(state)]
    uses += [lambda: ema.swap_in().__enter__(), lambda: ema.attach(optimizer)]
    for use in uses:
        with pytest.raises(ValueError, match="one that is closed"):
            use()


@pytest.mark.parametrize("decay", [0, 1, -0.1, 1.5, float("nan"), "0.9", None])
def test_decay_must_be_a_fraction(decay):
    with pytest.raises(ValueError, match="expected decay above 0 and below 1"):
        ParameterEMA(make_model(), decay)


def test_changed_parameters():
    model = make_model()
    with ParameterEMA(model) as ema:
        state = ema.state_dict()
        model[1] = nn.Linear(5, 4)
        with pytest.raises(ValueError, match=r"expected 1.weight \[3, 5\] .*, got \[4, 5\]"):
            ema.update()
        model[1] = nn.Linear(5, 3, bias=False)
        with pytest.raises(ValueError, match=r"difference in \['1.bias'\]"):
            ema.update()
        with pytest.raises(ValueError, match=r"difference in \['1.bias'\]"), ema.swap_in():
            pass
        model[1] = nn.Linear(5, 3).double()
        with pytest.raises(ValueError, match=r"float32, got .*float64"):
            ema.update()
        assert ema.steps == 0
        state["average"]["1.weight"] = torch.zeros(4, 5)
        with pytest.raises(ValueError, match=r"expected 1.weight \[3, 5\] .*, got \[4, 5\]"):
            ema.load_state_dict(state)
        good = ema.state_dict()
        before = average(ema)
        with pytest.raises(ValueError, match="expected the state of a CPU generator"):
            ema.load_state_dict({**good, "generator": torch.zeros(3)})
        assert all(torch.equal(t, before[name]) for name, t in average(ema).items())
        with pytest.raises(ValueError, match="expected a state with"):
            ema.load_state_dict({"average": {}})


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"expected dtype .*, got torch.float16"):
        ParameterEMA(make_model(), dtype=torch.float16)
    with pytest.raises(ValueError, match="expected timeout_s"):
        ParameterEMA(make_model(), timeout_s=0)
    with pytest.raises(ValueError, match="expected parameters on one device"):
        ParameterEMA(nn.ReLU())
    with pytest.raises(ValueError, match="expected floating-point parameters"):
        ParameterEMA(nn.ParameterList([nn.Parameter(torch.ones(2).long(), requires_grad=False)]))
