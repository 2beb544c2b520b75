"""Memory that crosses between the caller's stream and the side stream of ``async_op=True``.

Without a GPU: streams that note what they wait for, and tensors that note how they were let go of.
Memory may be let go of once its home is ordered after the last use elsewhere, or once it is
recorded on the stream of that use.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dualpipe_ext.ep import Buffer
from dualpipe_ext.ep import event as event_file
from dualpipe_ext.ep.event import CommStream, Event


class Stream:
    def __init__(self, _device: object = None) -> None:
        self.waited: list[object] = []

    def wait_stream(self, stream: Stream) -> None:
        self.waited.append(stream)

    def wait_event(self, event: object) -> None:
        self.waited.append(event)

    def record_event(self) -> object:
        return ("event of", self)


class Memory:
    """A tensor of one stream that another one uses."""

    is_cuda, device = True, "cuda:0"

    def __init__(self, home: Stream | None, let_go: dict[Memory, list[Any]], name: str) -> None:
        self.home, self.name, self.recorded = home, name, []
        self._let_go = let_go

    def record_stream(self, stream: Stream) -> None:
        self.recorded.append(stream)

    def __del__(self) -> None:
        waited = [] if self.home is None else list(self.home.waited)
        self._let_go[self.name] = (waited, self.recorded)


class Device:
    """What torch.cuda is to ``event.py``."""

    Stream = Stream

    def __init__(self) -> None:
        self.caller, self.other = Stream(), Stream()
        self._current = [self.caller]

    def current_stream(self) -> Stream:
        return self._current[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._current.append(stream)
        yield
        self._current.pop()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    fake = SimpleNamespace(cuda=device, is_grad_enabled=torch.is_grad_enabled)
    monkeypatch.setattr(event_file, "torch", fake)
    return device


class Call:
    """An asynchronous call, of which the caller has kept the event and the output alone."""

    def __init__(self, device: Device, *, grad: bool) -> None:
        self.let_go: dict[str, Any] = {}
        comm = CommStream()
        x, array = (Memory(device.caller, self.let_go, name) for name in ("x", "array"))
        with torch.set_grad_enabled(grad):
            with comm.run(True, x):
                self.side = device.current_stream()
                self.output = Memory(self.side, self.let_go, "output")
            handle = SimpleNamespace(tensors=lambda held=array: iter([held]))
            self.event: Event | None = comm.event(
                True, handle, inputs=(x, None), outputs=(self.output, None)
            )
        assert device.current_stream() is device.caller
        assert device.caller not in self.side.waited[1:], "the call is after its caller once"
        del x, array, handle

    @property
    def done(self) -> object:
        return self.side.record_event()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("waits", ["caller", "other", "nobody"])
def test_what_the_side_stream_reads_outlives_its_use(
    device: Device, waits: str, grad: bool
) -> None:
    call = Call(device, grad=grad)
    assert grad or not call.let_go, "nothing orders the streams yet"
    if waits != "nobody":
        with device.stream(getattr(device, waits)):
            call.event.wait()
    else:
        call.event = None
    gc.collect()
    for name in ("x", "array"):
        waited, recorded = call.let_go[name]
        assert call.done in waited or call.side in recorded, name
        # With an order of the streams the allocator has nothing to watch; a backward comes after.
        assert recorded == ([] if waits == "caller" and not grad else [call.side]), name


def test_outputs_are_for_the_caller_and_for_who_waits(device: Device) -> None:
    call = Call(device, grad=False)
    assert call.output.recorded == [device.caller]
    with device.stream(device.other):
        call.event.wait()
    assert call.output.recorded == [device.caller, device.other]
    call.output = None
    assert "output" in call.let_go, "an event that was waited for keeps nothing"
    call.event.wait()
    assert device.caller.waited == device.other.waited == [call.done]


@pytest.mark.parametrize("layout", ["token", "expert"])
def test_a_handle_lists_its_tensors(layout: str) -> None:
    buffer = Buffer(hidden=4, num_experts=2, top_k=2, max_tokens=8, transport="collective")
    _, handle = buffer.dispatch(torch.ones(2, 4), torch.tensor([[1, -1], [0, 1]]), layout=layout)
    found = {id(tensor) for tensor in handle.tensors()}
    mine = [handle.counts, handle.send_index, handle.local_idx]
    if layout == "token":
        mine.append(handle.topk_idx)
    else:
        mine += [handle.offsets, handle.expert_map.row, handle.expert_map.position]
    assert found.issuperset(id(tensor) for tensor in mine)


def test_buffers_hand_over_all_that_a_call_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Any, ...]] = []

    def event(_: CommStream, async_op: bool, handle: Any, **tensors: Any) -> Event:
        told.append((handle, tensors["inputs"], tensors["outputs"]))
        return Event()

    monkeypatch.setattr(CommStream, "event", event)
    buffer = Buffer(hidden=4, num_experts=2, top_k=2, max_tokens=8, transport="collective")
    x, idx, weights = torch.ones(2, 4), torch.tensor([[1, -1], [0, 1]]), torch.ones(2, 2)
    recv, handle = buffer.dispatch(x, idx, weights, layout="expert", async_op=True)
    y, _ = buffer.combine(recv.tokens, handle, weights=recv.weights, bias=x, async_op=True)
    late, _ = buffer.dispatch_weights(weights, handle, async_op=True)
    out = torch.empty_like(x)
    with torch.no_grad():
        buffer.combine(recv.tokens, handle, out=out, async_op=True)
    handles, inputs, outputs = zip(*told, strict=True)
    assert all(one is handle for one in handles)
    for got, want in (
        (inputs[0], (x, None, weights)),
        (outputs[0][:3], (recv.tokens, None, recv.weights)),
        (inputs[1], (recv.tokens, recv.weights, x, None)),
        (outputs[1], (y,)),
        (inputs[2][1:], (weights,)),  # before them the rows that go with them
        (outputs[2], (late,)),
        (inputs[3], (recv.tokens, None, None, out)),
        (outputs[3], (out,)),
    ):
        assert all(a is b for a, b in zip(got, want, strict=True))
