"""AdamW with a learning-rate schedule, and float32 master weights for bfloat16 parameters."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dualpipe_ext.eplb import slot_state


def learning_rate(step: int, *, peak: float, warmup: int, steps: int) -> float:
    """Linear warm-up to ``peak`` over ``warmup`` steps, then a cosine to a tenth at ``steps``.

    >>> [round(learning_rate(s, peak=1.0, warmup=2, steps=4), 3) for s in range(4)]
    [0.5, 1.0, 1.0, 0.55]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


Hook = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]


class MasterAdamW:
    """AdamW over named parameters; those in low precision are updated in float32 and rounded once.

    Attributes:
        masters: for each name the tensor AdamW updates: the parameter itself, or its float32 copy.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, weight_decay: float) -> None:
        self._parameters = dict(parameters)
        self.masters: dict[str, Tensor] = {
            name: p if p.dtype in (torch.float32, torch.float64) else p.detach().float()
            for name, p in self._parameters.items()
        }
        matrices = [m for m in self.masters.values() if m.ndim >= 2]
        vectors = [m for m in self.masters.values() if m.ndim < 2]
        self._adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
            eps=1e-8,
        )
        self._before: OrderedDict[int, Hook] = OrderedDict()
        self._after: OrderedDict[int, Hook] = OrderedDict()

    def register_step_pre_hook(self, hook: Hook) -> RemovableHandle:
        """Call ``hook(optimizer, args, kwargs)`` before a step, as torch's optimizers do."""
        return _register(self._before, hook)

    def register_step_post_hook(self, hook: Hook) -> RemovableHandle:
        """Call ``hook(optimizer, args, kwargs)`` once a step has changed the parameters."""
        return _register(self._after, hook)

    @torch.no_grad()
    def step(self, lr: float, *, grad_scale: Tensor) -> None:
        """One update with every gradient times ``grad_scale`` (a scalar tensor); gradients are
        dropped afterwards."""
        for hook in tuple(self._before.values()):
            hook(self, (lr,), {"grad_scale": grad_scale})
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            master = self.masters[name]
            master.grad = parameter.grad.to(master.dtype).mul_(grad_scale.to(master.dtype))
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        for name, parameter in self._parameters.items():
            master = self.masters[name]
            if master is not parameter:
                parameter.copy_(master)
            master.grad = parameter.grad = None
        for hook in tuple(self._after.values()):
            hook(self, (lr,), {"grad_scale": grad_scale})

    @torch.no_grad()
    def reset_masters(self) -> None:
        """Take the parameters as they are now; without it a step goes on from the masters."""
        for name, master in self.masters.items():
            if master is not self._parameters[name]:
                master.copy_(self._parameters[name])

    def tensors_of(self, name: str) -> list[Tensor]:
        """Everything of the parameter's shape that belongs to it: itself, its master, its moments.

        What a migration of experts has to move, in an order that is the same on every rank.
        """
        parameter, master = self._parameters[name], self.masters[name]
        masters = [] if master is parameter else [master]
        # Not .data: writing to it would leave the parameter's version as it was, and copies made of
        # the parameter (in FP8) would not be seen to be old.
        return [parameter.detach(), *masters, *slot_state(self._adamw, [master])]

    def layout_of(self, name: str) -> list[Tensor]:
        """Shapes and dtypes of :meth:`tensors_of` once a step has been taken, as meta tensors."""
        parameter, master = self._parameters[name], self.masters[name]
        masters = [] if master is parameter else [master]
        return [torch.empty_like(t, device="meta") for t in (parameter, *masters, master, master)]

    def state_dict(self) -> dict[str, Any]:
        """Masters and moments by parameter name."""
        return {
            name: {
                "master": None if master is self._parameters[name] else master,
                "state": dict(self._adamw.state.get(master, {})),
            }
            for name, master in self.masters.items()
        }

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned for the same parameters."""
        for name, master in self.masters.items():
            if saved[name]["master"] is not None:
                master.copy_(saved[name]["master"])
            self._adamw.state[master] = {
                # Scalars (the step count) stay on the CPU, where AdamW keeps them.
                key: value.to(master.device if value.ndim else "cpu", copy=True)
                for key, value in saved[name]["state"].items()
            }


def _register(hooks: OrderedDict[int, Hook], hook: Hook) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle
