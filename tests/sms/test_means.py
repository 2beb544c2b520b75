"""What each means tells whom, and what it says where torch lacks what it needs."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from dualpipe_ext.kernels.grouped_gemm import SHORT_CTAS

from dualpipe_ext.sms import MEANS, means
from dualpipe_ext.sms.means import DEFAULT_MEANS, depends_on_number, has_same_bits, make_means

GPU = torch.device("cuda", 0)
SMS = 132  # of an H200


@pytest.fixture
def carve_out(monkeypatch):
    """torch's private calls, written down."""
    state: list[int | None] = [None]
    calls = (lambda: state[-1], state.append)
    monkeypatch.setattr(means, "_carve_out", lambda: calls)
    return state


def test_the_default_is_one_that_auto_can_take():
    assert DEFAULT_MEANS in MEANS
    assert [name for name in MEANS if has_same_bits(name)] == ["none", "persistent", "yielding"]


def test_none_tells_nobody():
    told = make_means("none", GPU, SMS)
    assert told.grid_limit(24, beside=True) is None
    assert told.left(24) == SMS


def test_persistent_limits_grids_beside_communication_and_gives_a_limit_always():
    told = make_means("persistent", GPU, SMS)
    assert told.grid_limit(24, beside=True) == told.left(24) == 108
    # A limit all the same: without one another kernel would run, with other roundings.
    assert told.grid_limit(24, beside=False) == SMS
    assert told.grid_limit(0, beside=True) == SMS


def test_yielding_makes_room_always():
    told = make_means("yielding", GPU, SMS)
    assert {told.grid_limit(n, beside=b) for n in (0, 24) for b in (True, False)} == {SHORT_CTAS}
    assert told.left(24) == SMS
    names = [name for name in MEANS if depends_on_number(name)]
    assert names == ["persistent", "carve_out", "green_context"]


def test_carve_out_is_set_in_pairs_and_put_back(carve_out):
    told = make_means("carve_out", GPU, SMS)
    with told.step(24):
        assert carve_out[-1] is None
        with told.beside(24):
            assert carve_out[-1] == 24
            with told.beside(24):
                assert carve_out[-1] == 24
            assert carve_out[-1] == 24
        assert carve_out[-1] is None
    with contextlib.suppress(RuntimeError), told.beside(8):
        raise RuntimeError
    assert carve_out[-1] is None
    with told.beside(0):  # copy engines take none
        assert carve_out[-1] is None
    assert told.grid_limit(24, beside=True) is None


@pytest.mark.skipif(not hasattr(torch._C, "_set_sm_carveout_experimental"), reason="no carve-out")
def test_carve_out_with_torch_itself():
    before = torch._C._get_sm_carveout_experimental()
    with make_means("carve_out", GPU, SMS).beside(24):
        assert torch._C._get_sm_carveout_experimental() == 24
    assert torch._C._get_sm_carveout_experimental() == before


def test_what_torch_lacks_is_named(monkeypatch):
    monkeypatch.setattr(means, "_carve_out", lambda: None)
    monkeypatch.setattr(means, "_green_contexts", lambda: None)
    with pytest.raises(ValueError, match=r"got 'carve_out': torch .* has no _set_sm_carveout"):
        make_means("carve_out", GPU, SMS)
    with pytest.raises(ValueError, match=r"got 'green_context': torch .* has no green contexts"):
        make_means("green_context", GPU, SMS)
    with pytest.raises(
        ValueError, match="one of none, persistent, yielding, carve_out, green_context, got"
    ):
        make_means("shouting", GPU, SMS)


def test_private_calls_that_are_gone_are_not_there(monkeypatch):
    monkeypatch.delattr(torch._C, "_set_sm_carveout_experimental", raising=False)
    assert means._carve_out() is None


@pytest.mark.parametrize(
    "module",
    [
        None,
        SimpleNamespace(SUPPORTED=False, GreenContext=SimpleNamespace(create=1, Stream=1)),
        SimpleNamespace(GreenContext=SimpleNamespace(create=1)),  # as in torch 2.10
        SimpleNamespace(),
    ],
)
def test_green_contexts_without_streams_are_none(module, monkeypatch):
    def load(name):
        if module is None:
            raise ImportError(name)
        return module

    monkeypatch.setattr(means.importlib, "import_module", load)
    assert means._green_contexts() is None


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def wait_stream(self, other: Stream) -> None:
        self._log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def green(monkeypatch):
    """Green contexts and streams that write down what happens."""
    log: list[str] = []
    current = [Stream("outer", log)]

    def create(*, num_sms: int, device_id: int) -> SimpleNamespace:
        log.append(f"create {num_sms} on {device_id}")
        return SimpleNamespace(Stream=lambda: Stream(f"green {num_sms}", log))

    @contextlib.contextmanager
    def stream(one: Stream):
        current.append(one)
        yield
        current.pop()

    monkeypatch.setattr(means, "_green_contexts", lambda: SimpleNamespace(create=create))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    means.green_stream.cache_clear()
    yield log, current
    means.green_stream.cache_clear()


def test_a_green_step_runs_on_its_own_stream_in_order(green):
    log, current = green
    told = make_means("green_context", GPU, SMS)
    for _ in range(2):
        with told.step(24):
            assert current[-1].name == "green 104"  # 108, in groups of 8
            with told.beside(24):
                log.append("launch")
        assert current[-1].name == "outer"
    once = ["green 104 waits for outer", "launch", "outer waits for green 104"]
    assert log == ["create 104 on 0", *once, *once]  # one context for ever


def test_a_green_step_that_fails_is_ordered_too(green):
    log, _ = green
    with (
        pytest.raises(RuntimeError, match="broken"),
        make_means("green_context", GPU, SMS).step(8),
    ):
        raise RuntimeError("broken")
    assert log[-1] == "outer waits for green 120"


def test_copy_engines_need_no_green_context(green):
    log, current = green
    told = make_means("green_context", GPU, SMS)
    with told.step(0):
        assert current[-1].name == "outer"
    assert log == []
    assert told.left(0) == SMS
