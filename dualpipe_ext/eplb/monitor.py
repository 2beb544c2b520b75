"""How much each expert is used: counts per layer and their moving average, on the device.

Here belongs the gathering of loads. What to do about them is ``plan.py``.

Shapes: L layers, E logical experts, T tokens, K top-k.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext.errors import CommTimeoutError, DualPipeError

_POLL_S = 2e-4


def count_experts(topk_idx: Tensor, num_experts: int) -> Tensor:
    """Tokens per logical expert, without waiting for the device.

    Args:
        topk_idx: [T, K] integer expert ids; ids outside [0, num_experts), such as -1, do not
            count.

    Returns:
        [num_experts] int64.
    """
    expert = topk_idx.flatten().long()
    bins = expert.where((expert >= 0) & (expert < num_experts), num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=topk_idx.device)
    return counts.scatter_add_(0, bins, torch.ones_like(bins))[:num_experts]


class LoadMonitor:
    """Exponential moving average of expert loads, in tokens per step.

    ``record`` adds counts to the current step, as often as there are micro-batches; ``step`` closes
    it. After steps with counts c_1 ... c_n the load is their weighted mean in which c_i weighs
    ``decay ** (n - i)``: the first step counts in full, and nothing has to warm up. Neither call
    waits for the device.

    Args:
        num_layers: L, layers with experts on this rank.
        num_experts: E, logical experts.
        decay: weight of a step relative to the next one, in [0, 1]. 0 keeps the last step only,
            1 is the plain mean of all steps.
        device: where counts are kept; that of the router.
        group: ranks over which :meth:`loads` sums, by default the world.

    Raises:
        ValueError: sizes below 1 or a decay outside [0, 1].
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        *,
        decay: float = 0.95,
        device: torch.device | str | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if num_layers < 1 or num_experts < 1:
            raise ValueError(
                f"expected at least one layer and one expert, got {num_layers} and {num_experts}"
            )
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"expected a decay from 0 to 1, got {decay}")
        self.decay = decay
        self.group = group
        self._current = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        # float64: the sums stay exact over any number of steps, and the tensor is tiny.
        self._sums = torch.zeros_like(self._current, dtype=torch.float64)
        self._weight = 0.0  # sum of the weights of all closed steps

    @torch.no_grad()
    def record(self, layer: int, counts: Tensor) -> None:
        """Add the tokens of one micro-batch.

        Call it once per micro-batch: where a layer is recomputed in the backward pass, outside of
        the recomputed part.

        Args:
            layer: index of the layer, in [0, L).
            counts: [E] integers on the monitor's device, tokens per logical expert on this rank
                (:func:`count_experts`).
        """
        num_layers, num_experts = self._current.shape
        if not 0 <= layer < num_layers:
            raise ValueError(f"expected a layer from 0 to {num_layers - 1}, got {layer}")
        if counts.shape != (num_experts,) or counts.is_floating_point():
            raise ValueError(
                f"expected counts as integers [{num_experts}], "
                f"got {counts.dtype} {list(counts.shape)}"
            )
        self._current[layer] += counts

    @torch.no_grad()
    def step(self) -> None:
        """Close the current step: fold its counts into the average."""
        self._sums.mul_(self.decay).add_(self._current)
        self._weight = self._weight * self.decay + 1.0
        self._current.zero_()

    def local_loads(self) -> Tensor:
        """[L, E] float32, tokens per step on this rank; zeros before the first ``step``."""
        return self._mean().float()

    def loads(self, *, group: dist.ProcessGroup | None = None, timeout_s: float = 60.0) -> Tensor:
        """Tokens per step, summed over the group: :meth:`start_loads`, waited for at once.

        Args:
            group: ranks to sum over, by default the monitor's.
            timeout_s: longest wait for the other ranks, in seconds.

        Returns:
            [L, E] float32 on the monitor's device.

        Raises:
            as :meth:`PendingLoads.wait`.
        """
        return self.start_loads(group=group).wait(timeout_s)

    @torch.no_grad()
    def start_loads(self, *, group: dist.ProcessGroup | None = None) -> PendingLoads:
        """Begin to sum tokens per step over the group: a collective call that does not wait.

        Call it after a step and take the result after the next one, say: the exchange then is not
        on anybody's way. What is recorded meanwhile does not count.

        Args:
            group: ranks to sum over, by default the monitor's. A group that nobody else uses, or
                what is called on it next waits behind this.
        """
        mean = self._mean()
        if not dist.is_initialized():
            return PendingLoads(mean[None], None, 0)
        group = self.group if group is None else group
        everyone = mean.new_empty(dist.get_world_size(group), *mean.shape)
        work = dist.all_gather_into_tensor(
            everyone.view(-1, mean.shape[1]), mean, group=group, async_op=True
        )
        return PendingLoads(everyone, work, dist.get_rank(group), keep=mean)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on with the same bits."""
        return {
            "current": self._current.clone(),
            "sums": self._sums.clone(),
            "weight": self._weight,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ValueError: the state belongs to a monitor of another size, or is none; then this one
                is unchanged.
        """
        missing = {"current", "sums", "weight"} - state.keys()
        if missing:
            raise ValueError(f"expected a LoadMonitor's state, got one without {sorted(missing)}")
        for name in ("current", "sums"):
            if state[name].shape != self._current.shape:
                raise ValueError(
                    f"expected the state of a monitor of {list(self._current.shape)} "
                    f"layers x experts, got {list(state[name].shape)}"
                )
        self._current.copy_(state["current"])
        self._sums.copy_(state["sums"])
        self._weight = float(state["weight"])

    def _mean(self) -> Tensor:
        return self._sums / self._weight if self._weight else self._sums.clone()


class PendingLoads:
    """Loads that are being summed over ranks; made by :meth:`LoadMonitor.start_loads`.

    Shapes: R ranks, L layers, E experts.
    """

    def __init__(
        self, everyone: Tensor, work: dist.Work | None, rank: int, *, keep: Tensor | None = None
    ) -> None:
        """``everyone`` [R, L, E] is filled by ``work``; ``keep`` is what that reads."""
        self._everyone, self._work, self._rank, self._keep = everyone, work, rank, keep

    def done(self) -> bool:
        """Whether :meth:`wait` would return at once."""
        return self._work is None or self._work.is_completed()

    @torch.no_grad()
    def wait(self, timeout_s: float = 60.0) -> Tensor:
        """The sum. May be called again.

        It is taken in rank order on every rank, so all of them get the same bits and, from them,
        the same plan.

        Args:
            timeout_s: longest wait for the other ranks, in seconds.

        Returns:
            [L, E] float32, tokens per step over all ranks, on the monitor's device.

        Raises:
            CommTimeoutError: not all ranks have taken part in time.
            DualPipeError: a rank has gone away.
        """
        if self._work is not None:
            self._finish(self._work, timeout_s)
            self._work = self._keep = None
        total = torch.zeros_like(self._everyone[0])
        for part in self._everyone:
            total += part
        return total.float()

    def _finish(self, work: dist.Work, timeout_s: float) -> None:
        expected = f"rank {self._rank}: expected the loads of all ranks"
        deadline = time.monotonic() + timeout_s
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise CommTimeoutError(f"{expected} within {timeout_s:g} s, got no answer")
            time.sleep(_POLL_S)
        try:
            work.wait()  # it has ended: orders the current stream, raises what went wrong
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise DualPipeError(f"{expected}, got a lost connection ({reason})") from error
