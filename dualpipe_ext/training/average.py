"""The average of the parameters in training: it follows experts that change their slots.

What belongs here: what a run does around :class:`~dualpipe_ext.memory.ParameterEMA`. R
expert-parallel ranks, S slots over all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

from dualpipe_ext.eplb import migrate
from dualpipe_ext.memory import ParameterEMA
from dualpipe_ext.training.config import EMA_DTYPES, TrainConfig
from dualpipe_ext.training.experts import ExpertBalancer, LocalLayer
from dualpipe_ext.training.optimizer import MasterAdamW


class TrainingAverage:
    """Keeps the average of this rank's parameters on the CPU, updated beside the steps.

    Args:
        config: the run; its ``ema`` is the decay.
        stages: this rank's, whose parameters are averaged under the names the optimizer knows.
        optimizer: updates them.
        layers: those on this rank.
        group: the expert-parallel group.
    """

    def __init__(
        self,
        config: TrainConfig,
        stages: nn.ModuleList,
        optimizer: MasterAdamW,
        layers: list[LocalLayer],
        *,
        group: dist.ProcessGroup,
    ) -> None:
        self._layers = layers
        self._group = group
        self._timeout_s = config.timeout_s
        self.ema = ParameterEMA(
            stages,
            config.ema,
            dtype=EMA_DTYPES[config.ema_dtype],
            # Rounding errors of the ranks should have nothing in common.
            seed=config.seed * dist.get_world_size() + dist.get_rank(),
            timeout_s=config.timeout_s,
        )
        self.ema.attach(optimizer)

    @contextmanager
    def following(self, balancer: ExpertBalancer) -> Iterator[None]:
        """Around whatever puts experts into other slots: their averages move there too.

        Waits for the update under way, and so may be used rarely only. That wait is also what keeps
        the parameters as they are until the update has copied them.
        """
        # Before anything moves: a step that was skipped is added with parameters in their places.
        self.ema.flush()
        old = balancer.placement.phy2log.tolist()
        yield
        new = balancer.placement.phy2log.tolist()
        averages = self.ema.averages()
        for layer in self._layers:
            if old[layer.index] == new[layer.index]:
                continue
            named = layer.expert_parameters()
            # Where the parameters are, for that is what the group's backend can send.
            moved = [averages[name].to(parameter.device) for name, parameter in named]
            migrate(
                moved, old[layer.index], new[layer.index], self._group, timeout_s=self._timeout_s
            )
            for (name, _), tensor in zip(named, moved, strict=True):
                averages[name].copy_(tensor)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes on the same rank of an equal run."""
        return self.ema.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict``, bit for bit."""
        self.ema.load_state_dict(state)

    def close(self) -> None:
        """End the update under way."""
        self.ema.close()
