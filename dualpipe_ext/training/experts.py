"""What training does with the experts' placement: routing maps, balancing, replicas, migration.

E logical experts, S slots over all ranks, R expert-parallel ranks, NL layers of the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext.eplb import (
    LoadMonitor,
    Placement,
    balancedness,
    migrate,
    plan_placement,
    reduce_replica_grads,
)
from dualpipe_ext.models import Experts, MoELayer
from dualpipe_ext.training.config import TrainConfig
from dualpipe_ext.training.optimizer import MasterAdamW


@dataclass(frozen=True, slots=True)
class LocalLayer:
    """A MoE layer held by this rank.

    Attributes:
        index: the layer in the whole model.
        name: prefix of its parameters' names in the optimizer.
        module: the layer itself.
    """

    index: int
    name: str
    module: MoELayer

    def expert_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Names (as the optimizer knows them) and parameters of the routed experts."""
        experts: Experts = self.module.experts
        return [(f"{self.name}.experts.{n}", p) for n, p in experts.named_parameters()]


class ExpertBalancer:
    """Keeps the experts of a run balanced.

    Every rank holds the placement of every layer and sees the same loads, so all ranks compute the
    same plan and nothing has to be broadcast.

    Args:
        config: the run.
        layers: the layers on this rank.
        group: the expert-parallel group.
        device: where loads and maps live.
    """

    def __init__(
        self,
        config: TrainConfig,
        layers: list[LocalLayer],
        *,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self._config = config
        self._layers = layers
        self._group = group
        model = config.model
        self.monitor = LoadMonitor(model.num_layers, model.num_experts, device=device)
        # Until loads are known every expert is as loaded as any other.
        uniform = torch.ones(model.num_layers, model.num_experts, device=device)
        # Tokens per expert in the last step, over all ranks.
        self.last_counts = torch.zeros_like(uniform, dtype=torch.int64)
        self.install(self.plan(uniform))

    def plan(self, loads: Tensor, *, current: Placement | None = None) -> Placement:
        """The placement that EPLB chooses for ``loads`` [NL, E], close to the ``current`` one."""
        config = self._config
        return plan_placement(loads, config.num_slots, config.ep, current=current).placement

    def install(self, placement: Placement) -> None:
        """Route by ``placement`` from the next forward on."""
        self.placement = placement
        # On the host too: who exchanges what must be known there.
        self._phy2log: list[list[int]] = placement.phy2log.tolist()
        for layer in self._layers:
            layer.module.log2phy = placement.log2phy[layer.index]
            layer.module.logcnt = placement.logcnt[layer.index]

    def load(self, phy2log: Tensor, monitor: dict[str, Any]) -> None:
        """Restore a saved placement, int64 [NL, S], and the monitor's state."""
        self.install(
            Placement.from_phy2log(
                phy2log.to(self.last_counts.device), self._config.model.num_experts
            )
        )
        self.monitor.load_state_dict(monitor)

    def local_experts(self) -> dict[int, list[int]]:
        """For each layer on this rank, the logical expert in each of its slots."""
        rank, per_rank = dist.get_rank(self._group), self._config.num_slots // self._config.ep
        mine = slice(rank * per_rank, (rank + 1) * per_rank)
        return {layer.index: self._phy2log[layer.index][mine] for layer in self._layers}

    def take_counts(self) -> Tensor:
        """Tokens per expert that this rank routed since the last call, int64 [NL, E]."""
        counts = torch.zeros_like(self.last_counts)
        for layer in self._layers:
            counts[layer.index] += layer.module.counts
            layer.module.counts.zero_()
        return counts

    def observe(self, counts: Tensor) -> None:
        """Learn the loads of a step: ``counts`` int64 [NL, E], summed over all ranks."""
        self.last_counts = counts
        for index in range(counts.shape[0]):
            self.monitor.record(index, counts[index])
        self.monitor.step()
        for layer in self._layers:
            layer.module.router.update_bias(counts[layer.index], rate=self._config.bias_rate)

    def balance(self) -> float:
        """Mean over layers of (mean load of a rank / largest load of a rank) in the last step."""
        return float(balancedness(self.last_counts, self.placement, self._config.ep).mean())

    def reduce_replica_gradients(self) -> None:
        """Give every replica of an expert the sum of its replicas' gradients."""
        for layer in self._layers:
            grads = [p.grad for _, p in layer.expert_parameters() if p.grad is not None]
            reduce_replica_grads(grads, self._phy2log[layer.index], self._group)

    def rebalance(self, optimizer: MasterAdamW) -> int:
        """Plan for the monitored loads, move experts and their optimizer state, switch the maps.

        Called by every rank after the same step. Returns the bytes that moved
        between the ranks of this rank's expert-parallel group.
        """
        new = self.plan(self.monitor.local_loads(), current=self.placement)
        moved = 0
        for layer in self._layers:
            tensors = [
                tensor
                for name, _ in layer.expert_parameters()
                for tensor in optimizer.tensors_of(name)
            ]
            report = migrate(
                tensors,
                self._phy2log[layer.index],
                new.phy2log[layer.index],
                self._group,
                timeout_s=self._config.timeout_s,
            )
            moved += sum(report.bytes_received)
        self.install(new)
        return moved
