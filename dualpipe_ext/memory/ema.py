"""Exponential moving average of a model's parameters, kept on the host, updated beside training.

After an optimizer step a copy of the parameters leaves the GPU on a stream of its own, and a worker
thread adds it to the average. At most one copy is under way. A step that would have to wait for it
is skipped, and the next one that is not counts for it too: with k steps since the last update

    average = decay ** k * average + (1 - decay ** k) * parameters

which is the plain average over a history in which the skipped steps had today's parameters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dualpipe_ext.errors import DualPipeError
from dualpipe_ext.timeouts import check_timeout

_POLL_S = 1e-3  # between two looks at a copy's event: far below the milliseconds a copy takes


class StepHooks(Protocol):
    """What :meth:`ParameterEMA.attach` needs of an optimizer; see ``torch.optim.Optimizer``."""

    def register_step_pre_hook(self, hook: Callable[..., None]) -> Any: ...

    def register_step_post_hook(self, hook: Callable[..., None]) -> Any: ...


class ParameterEMA:
    """The average of all parameters of a model; buffers are not averaged.

    It starts as the parameters that the model has now. Use one instance from one thread, and close
    it, or use it as a context manager.

    In bfloat16 the average takes half the memory, and is rounded up or down at random so that it is
    right on average: rounded to nearest, it would never move, as a step of (1 - decay) is below
    half a unit in the last place. Its noise has a standard deviation of about
    ``sqrt(|parameter - average| * unit / 2)``, where a unit in the last place is 1/256 to 1/128 of
    the value.

    Args:
        model: its parameters are floating point and on one device, CUDA or CPU. Kept, not copied.
        decay: of the average in one step; above 0 and below 1.
        dtype: of the average, ``torch.float32`` or ``torch.bfloat16``. Arithmetic is float32.
        seed: of the random rounding.
        timeout_s: how long any method, or the worker, waits for a copy or for the host.

    Raises:
        ValueError: an argument is not as above.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.999,
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        timeout_s: float = 300.0,
    ) -> None:
        check_decay(decay)
        check_timeout(timeout_s)
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"expected dtype torch.float32 or torch.bfloat16, got {dtype}")
        self.decay = float(decay)
        self.dtype = dtype
        self.timeout_s = float(timeout_s)
        self._model = model
        parameters = dict(model.named_parameters())
        self._device = _device_of(parameters)
        pinned = self._device.type == "cuda"
        self._average: dict[str, Tensor] = {}
        self._staged: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            shape, staged_dtype = parameter.shape, parameter.dtype
            self._staged[name] = torch.empty(shape, dtype=staged_dtype, pin_memory=pinned)
            self._average[name] = torch.empty(shape, dtype=dtype)
            self._average[name].copy_(parameter.detach())
        self._generator = torch.Generator().manual_seed(seed)
        self._stream = torch.cuda.Stream(self._device) if pinned else None
        self._copied: torch.cuda.Event | None = None  # that the parameters may change again
        self._hooks: list[Any] = []
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self._update: Future[None] | None = None
        self._pending = 0  # steps that no update has counted
        self._steps = 0
        self._skipped = 0
        self._swapped = False
        self._closed = False

    @property
    def steps(self) -> int:
        """Steps counted so far, skipped ones included."""
        return self._steps

    @property
    def skipped(self) -> int:
        """Steps on which the last update was still under way."""
        return self._skipped

    def attach(self, optimizer: StepHooks) -> None:
        """Update after each of the optimizer's steps, from hooks, until ``close``.

        Takes a ``torch.optim.Optimizer``, or whatever else has its hooks around a step.

        The next step waits on the GPU, never on the host, until the copy has left: it has the whole
        forward and backward for that. Nothing but the optimizer may change the parameters.
        """
        self._check_usable()
        if self._hooks:
            raise ValueError("expected one optimizer, got a second one")
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self.update()),
        ]

    def update(self) -> bool:
        """Count one step, and begin an update unless the last one is still under way.

        The host does not wait. Unless attached to an optimizer, the current stream waits for the
        copy, so that whatever comes next may change the parameters.

        Returns:
            Whether an update was begun; False means that this step was skipped.

        Raises:
            ValueError: closed, swapped in, or the parameters are no longer those of the start.
            DualPipeError: an earlier update failed.
        """
        self._check_usable()
        parameters = self._parameters_of(self._model)
        if not self._idle():
            self._steps += 1
            self._pending += 1
            self._skipped += 1
            return False
        self._begin(parameters, self._pending + 1)
        self._steps += 1
        self._pending = 0
        if self._copied is not None and not self._hooks:
            self._before_step()
        return True

    def flush(self) -> None:
        """Wait until every step so far is in the average.

        Steps that were skipped since the last update are added with the parameters of now.

        Raises:
            ValueError: closed or swapped in.
            DualPipeError: not done within the time-out, or an update failed.
        """
        self._check_usable()
        self._wait()
        if self._pending:
            self._begin(self._parameters_of(self._model), self._pending)
            self._pending = 0
            self._wait()

    @contextmanager
    def swap_in(self, model: nn.Module | None = None) -> Iterator[nn.Module]:
        """Give the model the average for the time of a ``with`` block, then its own values again.

        In place, so views, CUDA graphs and optimizers keep seeing the parameters. A second copy of
        them lies on their device meanwhile. No step may be taken inside.

        Args:
            model: one with parameters of the same names, shapes and dtypes; by default the one
                that is averaged.

        Raises:
            ValueError: closed, swapped in already, or other parameters.
            DualPipeError: as ``flush``, which it begins with.
        """
        model = self._model if model is None else model
        parameters = self._parameters_of(model)
        self.flush()
        own = {name: p.detach().clone() for name, p in parameters.items()}
        self._swapped = True
        try:
            _copy_into(parameters, self._average)
            yield model
        finally:
            _copy_into(parameters, own)
            self._swapped = False

    def averages(self) -> dict[str, Tensor]:
        """The average itself, by parameter name, after ``flush``.

        Not a copy: until the next update it may be changed, as when parameters change their places.

        Raises:
            ValueError, DualPipeError: as ``flush``.
        """
        self.flush()
        return self._average

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on from, after ``flush``: decay, steps, average, random state. Copies.

        Raises:
            ValueError, DualPipeError: as ``flush``.
        """
        self.flush()
        return {
            "decay": self.decay,
            "steps": self._steps,
            "skipped": self._skipped,
            "average": {name: t.clone() for name, t in self._average.items()},
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict``. Its average may be of the other dtype; its decay counts.

        Raises:
            ValueError: closed, swapped in, or not the state of such a model; nothing has changed.
            DualPipeError: an update under way did not end within the time-out.
        """
        self._check_usable()
        expected = {"decay", "steps", "skipped", "average", "generator"}
        if set(state) != expected:
            raise ValueError(f"expected a state with {sorted(expected)}, got {sorted(state)}")
        check_decay(state["decay"])
        _check_same(self._average, state["average"], dtypes=False)
        self._wait()
        try:
            self._generator.set_state(state["generator"].cpu())
        except (AttributeError, TypeError, RuntimeError) as error:
            raise ValueError(f"expected the state of a CPU generator, got {error}") from error
        _copy_into(self._average, state["average"])
        self.decay = float(state["decay"])
        self._steps, self._skipped = state["steps"], state["skipped"]
        self._pending = 0

    def close(self) -> None:
        """End the update under way and the worker, and leave the optimizer. Again does nothing.

        Raises:
            DualPipeError: not done within the time-out, or an update failed.
        """
        if self._closed:
            return
        self._closed = True
        for hook in self._hooks:
            hook.remove()
        self._worker.shutdown(wait=False)
        # Parameters that change after this must not change under the copy.
        self._before_step(check=False)
        self._wait()

    def __enter__(self) -> ParameterEMA:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, parameters: dict[str, Tensor], steps: int) -> None:
        """Copy the parameters to the host and have the worker add them, as ``steps`` steps."""
        if self._stream is None:
            _copy_into(self._staged, parameters)
        else:
            # No record_stream: the worker's job holds the parameters until the copy has ended.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                _copy_into(self._staged, parameters, non_blocking=True)
                self._copied = self._stream.record_event()
        self._update = self._worker.submit(self._add, parameters, self._copied, steps)

    def _add(self, source: dict[str, Tensor], copied: torch.cuda.Event | None, steps: int) -> None:
        """On the worker: wait for the copy of ``source``, then update the average."""
        deadline = time.monotonic() + self.timeout_s
        while copied is not None and not copied.query():
            if time.monotonic() > deadline:
                raise TimeoutError(f"copy to the host not done after {self.timeout_s:g} s")
            time.sleep(_POLL_S)
        # 1 - decay ** steps without the cancellation that a decay near 1 would bring.
        share = -math.expm1(steps * math.log(self.decay))
        with torch.no_grad():
            for name, average in self._average.items():
                new = self._staged[name].float()
                if self.dtype == torch.float32:
                    average.lerp_(new, share)
                else:
                    exact = average.float().lerp_(new, share)
                    average.copy_(round_randomly(exact, self._generator))

    def _idle(self) -> bool:
        """Whether nothing is under way; raises what the last update raised."""
        if self._update is None:
            return True
        if not self._update.done():
            return False
        self._wait()
        return True

    def _wait(self) -> None:
        if self._update is None:
            return
        # Not result(timeout): an update may raise a TimeoutError of its own.
        if not wait_for([self._update], self.timeout_s).done:
            raise DualPipeError(f"update of the average not done after {self.timeout_s:g} s")
        if (error := self._update.exception()) is not None:
            raise DualPipeError(f"update of the average failed: {error}") from error

    def _before_step(self, *, check: bool = True) -> None:
        if check:
            self._check_usable()
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def _check_usable(self) -> None:
        if self._closed:
            raise ValueError("expected an open average, got one that is closed")
        if self._swapped:
            raise ValueError("expected no update or swap while the average is swapped in, got one")

    def _parameters_of(self, model: nn.Module) -> dict[str, Tensor]:
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        _check_same(self._staged, parameters, dtypes=True)
        if model is self._model and _device_of(parameters) != self._device:
            raise ValueError(f"expected parameters on {self._device}, got {_device_of(parameters)}")
        return parameters


def check_decay(decay: object) -> None:
    """Refuse with ``ValueError`` what is no decay."""
    if not isinstance(decay, (int, float)) or not 0 < decay < 1:
        raise ValueError(f"expected decay above 0 and below 1, got {decay!r}")


def round_randomly(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up with a probability equal to the part of a unit that is cut off.

    The expected value of the result is x. What bfloat16 has stays as it is, and so does what is not
    finite; a value within one unit of the largest finite one may become infinite.
    """
    # The low 16 bits are what bfloat16 lacks; noise over their whole range carries into the rest.
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, generator=generator)
    rounded = (x.view(torch.int32) + noise) & -(1 << 16)
    return torch.where(x.isfinite(), rounded.view(torch.float32), x).bfloat16()


def _copy_into(
    targets: dict[str, Tensor], sources: dict[str, Tensor], *, non_blocking: bool = False
) -> None:
    for name, target in targets.items():
        target.detach().copy_(sources[name], non_blocking=non_blocking)


def _device_of(parameters: dict[str, Tensor]) -> torch.device:
    devices = {p.device for p in parameters.values()}
    if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        found = sorted(map(str, devices))
        raise ValueError(f"expected parameters on one device, CUDA or CPU, got {found}")
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise ValueError(f"expected floating-point parameters, got {name} {parameter.dtype}")
    return devices.pop()


def _check_same(expected: dict[str, Tensor], got: dict[str, Tensor], *, dtypes: bool) -> None:
    if expected.keys() != got.keys():
        different = sorted(expected.keys() ^ got.keys())
        raise ValueError(f"expected the parameters of the start, got a difference in {different}")
    for name, tensor in expected.items():
        other = got[name]
        if other.shape != tensor.shape or (dtypes and other.dtype != tensor.dtype):
            raise ValueError(
                f"expected {name} {list(tensor.shape)} {tensor.dtype}, "
                f"got {list(other.shape)} {other.dtype}"
            )
