"""What training does with the experts' placement: routing maps, balancing, replicas, migration.

E logical experts, S slots over all ranks, R expert-parallel ranks, NL layers of the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext.eplb import (
    LoadMonitor,
    Migrator,
    Placement,
    ReplicaSplit,
    Verdict,
    balancedness,
    plan_moves,
    plan_placement,
    reduce_replica_grads,
    split_replicas,
)
from dualpipe_ext.eplb.exchange import message_bytes, on_device, row_bytes
from dualpipe_ext.eplb.transfer import layers_that_fit, spare_bytes_of
from dualpipe_ext.models import Experts, MoELayer
from dualpipe_ext.training.config import TrainConfig
from dualpipe_ext.training.costs import judge
from dualpipe_ext.training.optimizer import MasterAdamW

# Of ``split_replicas``, in every step: 3 ms of the host for 8 layers of 64 experts, 40 ms for 58 of
# 256. What they leave is small beside what loads change from step to step.
_SPLIT_ITERATIONS = 16


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
    same plan; whether it pays is rank 0's word, which is broadcast. Experts move while the next
    steps run, in waves that fit into the spare memory; a wave's layers switch at one step on all
    ranks of the run. Loads and maps are kept on the CPU, where they are planned with: the host
    waits for the device only for that word, in :meth:`plan`, and for a wave that has not arrived.

    Args:
        config: the run.
        layers: the layers on this rank.
        group: the expert-parallel group.
        device: where the layers are.

    Attributes:
        layers: those on this rank, ascending.
        group: the expert-parallel group.
        placement: in force.
        split: how replicas share their expert's tokens under it, for the loads of the last step;
            ``None``: evenly.
        target: where experts are on their way to, or ``None``.
        replicas: for each layer on this rank, how many replicas the expert in each of its slots
            has, int64 [S/R] on the device.
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
        self.layers = sorted(layers, key=lambda layer: layer.index)
        self.group, self._device = group, device
        rank, per_rank = dist.get_rank(group), config.num_slots // config.ep
        self._mine = slice(rank * per_rank, (rank + 1) * per_rank)
        self._layers_of_ranks = config.layers_of_ranks
        self._migrator: Migrator | None = None
        self._optimizer: MasterAdamW | None = None
        self._wave: tuple[int, ...] = ()  # layers of the whole model that switch next
        self.target: Placement | None = None
        self.replicas: dict[int, Tensor] = {}
        model = config.model
        self.monitor = LoadMonitor(model.num_layers, model.num_experts)
        # Until loads are known every expert is as loaded as any other.
        uniform = torch.ones(model.num_layers, model.num_experts)
        # Tokens per expert in the last step, over all ranks, and where they went.
        self.last_counts = torch.zeros_like(uniform, dtype=torch.int64)
        self.install(plan_placement(uniform, config.num_slots, config.ep).placement)
        self._routed_by = self.placement, self.split

    def prepare_moves(self, optimizer: MasterAdamW) -> None:
        """Make what moving needs, if experts are ever to move; a collective call.

        Args:
            optimizer: whose state moves with the experts.
        """
        if not self._config.rebalance_every:
            return
        self._optimizer = optimizer
        layout = self._expert_layout()
        one_layer = self._config.num_slots // self._config.ep * message_bytes(layout, 1)
        self._migrator = Migrator(
            self.group,
            device=self._device,
            timeout_s=self._config.timeout_s,
            spare_bytes=max(self._config.spare_bytes, one_layer),
        )

    def install(self, placement: Placement) -> None:
        """Route by ``placement`` from the next forward on."""
        self.placement = placement
        self._phy2log: list[list[int]] = placement.phy2log.tolist()
        for layer in self.layers:
            counts = placement.logcnt[layer.index]
            layer.module.log2phy = on_device(placement.log2phy[layer.index], self._device)
            layer.module.logcnt = on_device(counts, self._device)
            mine = placement.phy2log[layer.index, self._mine]
            self.replicas[layer.index] = on_device(counts[mine], self._device)
        self._share_out(None)  # shares belong to maps

    def weigh_replicas(self) -> None:
        """Weigh the replicas for the last step's loads, if asked to, from the next forward on."""
        if self._weighs and bool(self.last_counts.any()):
            counts, ranks = self.last_counts, self._config.ep
            self._share_out(
                split_replicas(counts, self.placement, ranks, iterations=_SPLIT_ITERATIONS)
            )

    @property
    def _weighs(self) -> bool:
        """Whether weights are wanted, and can differ: not with one rank, or one replica of each
        expert."""
        several = self._config.ep > 1 and self.placement.log2phy.shape[2] > 1
        return self._config.uneven_replicas and several

    def _share_out(self, split: ReplicaSplit | None) -> None:
        self.split = split
        for layer in self.layers:
            layer.module.replica_split = (
                None if split is None else on_device(split.shares[layer.index], self._device)
            )

    def state_dict(self) -> dict[str, Any]:
        """Placement in force, target and loads. What is in flight has not changed anything yet:
        it is the way to the target, and :meth:`start_moves` goes it again."""
        return {
            "phy2log": self.placement.phy2log,
            "last_counts": self.last_counts,
            "target": None if self.target is None else self.target.phy2log,
            "monitor": self.monitor.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; on all ranks together."""
        if self._migrator is not None:
            self._migrator.drop()
        self._wave = ()
        num_experts = self._config.model.num_experts
        target = state["target"] if self._migrator is not None else None
        self.target = None if target is None else Placement.from_phy2log(target, num_experts)
        # What an earlier version has written has none: replicas share evenly for a step.
        self.last_counts = state.get("last_counts", torch.zeros_like(self.last_counts))
        self.install(Placement.from_phy2log(state["phy2log"], num_experts))
        self.weigh_replicas()
        self._routed_by = self.placement, self.split
        self.monitor.load_state_dict(state["monitor"])

    def local_experts(self) -> dict[int, list[int]]:
        """For each layer on this rank, the logical expert in each of its slots."""
        return {layer.index: self._phy2log[layer.index][self._mine] for layer in self.layers}

    def take_counts(self) -> Tensor:
        """Tokens per expert that this rank routed since the last call, int64 [NL, E] on the
        device."""
        counts = torch.zeros(self.last_counts.shape, dtype=torch.int64, device=self._device)
        for layer in self.layers:
            counts[layer.index] += layer.module.counts
            layer.module.counts.zero_()
        return counts

    def observe(self, counts: Tensor, on_host: Tensor) -> None:
        """Learn the loads of a step, int64 [NL, E], summed over all ranks.

        Args:
            counts: on the device.
            on_host: the same on the CPU, where they have come with the loss.
        """
        self.last_counts = on_host
        for index in range(on_host.shape[0]):
            self.monitor.record(index, on_host[index])
        self.monitor.step()
        for layer in self.layers:
            layer.module.router.update_bias(counts[layer.index], rate=self._config.bias_rate)

    def balance(self) -> float:
        """Mean over layers of (mean load of a rank / largest load of a rank) in the last step."""
        placement, split = self._routed_by
        weights = None if split is None else split.weights
        of_layers = balancedness(self.last_counts, placement, self._config.ep, weights=weights)
        return float(of_layers.mean())

    def plan(self) -> Verdict | None:
        """Plan for the monitored loads; if it pays, experts will move there.

        Returns:
            What speaks for the plan; ``None`` while an earlier one is still being carried out.
        """
        if self.target is not None:
            return None
        config = self._config
        loads = self.monitor.local_loads()
        plan = plan_placement(loads, config.num_slots, config.ep, current=self.placement)
        if self._weighs:  # then that is how either placement is used
            before, after = (
                split_replicas(loads, placement, config.ep).after
                for placement in (self.placement, plan.placement)
            )
            plan = replace(plan, before=before, after=after)
        verdict = judge(
            plan,
            config,
            expert_bytes=sum(row_bytes(t) for t in self._expert_layout()),
            device_type=self._device.type,
        )
        # Maps are the same everywhere, times that follow from shares only on CPUs of one kind, and
        # the ranks must agree.
        times = [verdict.saved_s, verdict.cost_s, verdict.steps_to_pay]
        said = torch.tensor(times, dtype=torch.float64, device=self._device)
        dist.broadcast(said, src=0)
        verdict = Verdict(*said.tolist())
        if verdict.pays:
            self.target = plan.placement
        return verdict

    def start_moves(self) -> None:
        """Begin with the next wave toward the target; returns at once. After an optimizer step."""
        if self.target is None:
            return
        assert self._migrator is not None
        assert self._optimizer is not None
        self._wave = self._next_wave()
        new = self.target.phy2log.tolist()
        tensors = {
            layer.index: [
                tensor
                for name, _ in layer.expert_parameters()
                for tensor in self._optimizer.tensors_of(name)
            ]
            for layer in self.layers
            if layer.index in self._wave
        }
        old = {index: self._phy2log[index] for index in tensors}
        self._migrator.start(tensors, old, {index: new[index] for index in tensors})

    @property
    def switching(self) -> bool:
        """Whether :meth:`finish_moves` will switch layers of this rank."""
        return any(layer.index in self._wave for layer in self.layers)

    def wait_for_moves(self) -> None:
        """Wait, with a bound, until the wave has arrived on every rank; nothing changes yet."""
        if self._migrator is not None:
            self._migrator.wait()

    def finish_moves(self) -> int:
        """Reduce gradients over replicas, and switch to what has arrived; before the optimizer.

        Every replica gets the sum of its expert's gradients, those that take over a slot now too.
        Where the reduction fails, weights, optimizer state and maps are still the old ones.

        Returns:
            Bytes that moved between the ranks of this rank's expert-parallel group.
        """
        self._routed_by = self.placement, self.split
        arrived = () if self._migrator is None else self._migrator.wait()
        assert set(arrived) == {layer.index for layer in self.layers} & set(self._wave)
        phy2log = self.placement.phy2log.clone()
        if self._wave:
            assert self.target is not None
            phy2log[list(self._wave)] = self.target.phy2log[list(self._wave)]
        onto = phy2log.tolist()
        for layer in self.layers:
            grads = [p.grad for _, p in layer.expert_parameters() if p.grad is not None]
            reduce_replica_grads(
                grads, self._phy2log[layer.index], self.group, onto=onto[layer.index]
            )
        if not self._wave:
            return 0
        assert self._migrator is not None
        reports = self._migrator.commit()
        self.install(Placement.from_phy2log(phy2log, self._config.model.num_experts))
        self._wave = ()
        if torch.equal(phy2log, self.target.phy2log):
            self.target = None
        return sum(sum(report.bytes_received) for report in reports.values())

    def close(self) -> None:
        """Drop what is on its way."""
        if self._migrator is not None:
            self._migrator.close()

    def _next_wave(self) -> tuple[int, ...]:
        """Layers that switch next, over all pipeline ranks: each takes what it has room for.

        All layers have the same sizes, so this rank's tell how much every other rank takes.
        """
        assert self.target is not None
        ep, layout, new = self._config.ep, self._expert_layout(), self.target.phy2log.tolist()
        per_rank = self._config.num_slots // ep
        need = {
            index: spare_bytes_of(layout, plan_moves(old, new[index], ep), per_rank, ep)
            for index, old in enumerate(self._phy2log)
            if old != new[index]
        }
        wave: set[int] = set()
        for layers in self._layers_of_ranks:
            left = {index: need[index] for index in layers if index in need}
            if left:
                # At least the first one, whatever the user allows.
                room = max(self._config.spare_bytes, next(iter(left.values())))
                wave.update(layers_that_fit(left, room))
        return tuple(sorted(wave))

    def _expert_layout(self) -> list[Tensor]:
        """Shapes and dtypes of what belongs to one layer's slots on this rank."""
        assert self._optimizer is not None
        names = [name for name, _ in self.layers[0].expert_parameters()]
        return [tensor for name in names for tensor in self._optimizer.layout_of(name)]
