"""What a rebalancing is reckoned to save and to cost.

Figures of a kind of machine, not of this run: a run that is repeated or resumed must take the same
decisions, and all its ranks must agree, so nothing that is measured may decide. They err toward
staying: experts move in the background, yet the whole transfer counts as cost.
"""

from __future__ import annotations

from dualpipe_ext.eplb import PlacementPlan, Verdict, should_rebalance
from dualpipe_ext.training.config import TrainConfig

# FLOP/s of one rank in the experts' grouped GEMMs. GPU: H200, bfloat16 as measured beside
# communication; float32 and float64 half of the data sheet's peak. CPU: one core.
_FLOPS = {
    "cuda": {"bfloat16": 4.5e14, "float32": 3.3e13, "float64": 3.3e13},
    "cpu": {"bfloat16": 5e9, "float32": 1e10, "float64": 5e9},
}
# Bytes/s that a rank can receive. GPU: a 400 Gbit/s network, the slowest that may join the ranks
# (NVLink is 8 times as fast). CPU: sockets of one machine.
_BYTES_PER_S = {"cuda": 4e10, "cpu": 1e9}


def expert_seconds(config: TrainConfig, device_type: str) -> float:
    """Seconds that a rank spends in its routed experts in a step, if all are perfectly balanced.

    Three matrices per expert, two operations per weight and token, and three passes: forward, and
    backward for inputs and for weights.
    """
    model = config.model
    weights = 3 * model.hidden * model.expert_hidden
    rows = config.batch * config.seq_len * model.top_k / config.ep
    layers = model.num_layers / config.pp
    return rows * layers * weights * 2 * 3 / _FLOPS[device_type][config.dtype]


def judge(
    plan: PlacementPlan, config: TrainConfig, *, expert_bytes: int, device_type: str
) -> Verdict:
    """Whether moving to ``plan`` pays until the next one is asked for.

    Args:
        plan: made with ``current``.
        config: the run.
        expert_bytes: of one expert in one layer: weights and optimizer state.
        device_type: "cuda" or "cpu".
    """
    return should_rebalance(
        plan,
        expert_s=expert_seconds(config, device_type),
        steps=config.rebalance_every,
        expert_bytes=expert_bytes,
        # The plan counts the bytes of all layers; the pipeline's ranks receive theirs side by side.
        bytes_per_s=_BYTES_PER_S[device_type] * config.pp,
    )
