"""Migration in one call: experts' weights and optimizer state move to where a new map wants them.

Here belongs what a caller who can wait uses. The protocol is ``transfer.py``; ``migrator.py`` does
the same in the background. Summing replica gradients is ``replica_grads.py``.

Shapes: S slots in all, R ranks; rank r holds slots from ``r * S / R``. Tensors are [S/R, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext.eplb.move_plan import MigrationReport
from dualpipe_ext.eplb.transfer import LayerChange, PointToPoint, carry


def migrate(
    tensors: Sequence[Tensor],
    old_phy2log: Tensor | Sequence[int],
    new_phy2log: Tensor | Sequence[int],
    group: dist.ProcessGroup | None = None,
    *,
    timeout_s: float = 60.0,
) -> MigrationReport:
    """Move the rows of slot tensors to where a new map wants them: in place, all or nothing.

    A collective call, between steps: no gradient or activation may depend on the old contents. All
    replicas of an expert must hold the same bits (as :func:`reduce_replica_grads` keeps them), for
    any of them may serve as the source.

    Args:
        tensors: [S/R, ...] each, any dtype, all on one device: what belongs to the slots of this
            rank. Same number, shapes and dtypes on every rank.
        old_phy2log: [S] the expert in every slot now.
        new_phy2log: [S] the expert wanted in every slot.
        group: the R ranks that hold the slots, by default the world.
        timeout_s: longest wait for a peer in one of the steps, in seconds.

    Returns:
        Bytes moved, for every rank.

    Raises:
        ValueError: maps or tensors that do not fit, on this rank or another, or that differ between
            ranks. The same message on every rank; the group stays usable.
        CommTimeoutError: a peer did not answer; it is named.
        DualPipeError: another rank failed or has gone away.
    """
    return _migrate(lambda: tensors, old_phy2log, new_phy2log, group, timeout_s)


def migrate_optimizer(
    optimizer: torch.optim.Optimizer,
    params: Sequence[Tensor],
    old_phy2log: Tensor | Sequence[int],
    new_phy2log: Tensor | Sequence[int],
    group: dist.ProcessGroup | None = None,
    *,
    timeout_s: float = 60.0,
) -> MigrationReport:
    """Move parameters together with their optimizer state: :func:`migrate` on both, as one.

    Args:
        optimizer: the optimizer that updates ``params``.
        params: [S/R, ...] each, parameters whose first dimension is the slots of this rank. Their
            ``.grad`` does not move: call this after ``zero_grad``.
        old_phy2log, new_phy2log, group, timeout_s: as in :func:`migrate`.

    Raises:
        ValueError: also on state that is neither a scalar nor of its parameter's shape.
    """
    return _migrate(
        lambda: [*params, *slot_state(optimizer, params)],
        old_phy2log,
        new_phy2log,
        group,
        timeout_s,
    )


def slot_state(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    """The optimizer's tensors that belong to slots (``exp_avg``, ...), in the order of their names.

    Scalars such as ``step`` are the same for every slot of a parameter and stay where they are. A
    parameter that has not been stepped yet has no state.

    Raises:
        ValueError: a state tensor that is neither a scalar nor of its parameter's shape: nobody
            could say which part of it belongs to a slot.
    """
    found = []
    for param in params:
        for name, value in sorted(optimizer.state.get(param, {}).items()):
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if value.shape != param.shape:
                raise ValueError(
                    f"expected optimizer state '{name}' of its parameter's shape "
                    f"{list(param.shape)}, got {list(value.shape)}"
                )
            found.append(value)
    return found


def _migrate(
    collect: Callable[[], Sequence[Tensor]],
    old_phy2log: Tensor | Sequence[int],
    new_phy2log: Tensor | Sequence[int],
    group: dist.ProcessGroup | None,
    timeout_s: float,
) -> MigrationReport:
    staged = carry(
        lambda: {0: LayerChange(collect(), old_phy2log, new_phy2log)},
        PointToPoint(group),
        group,
        timeout_s=timeout_s,
    )
    staged[0].commit()
    return staged[0].report
