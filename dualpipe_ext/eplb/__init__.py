"""Expert placement: loads in, maps out, and weights moved to where the maps say.

``plan`` decides how many replicas each expert gets and where they live, ``planner`` says how good
that is and what it costs, ``loads`` reads or makes up loads to plan for, ``placement`` spreads
tokens over them, ``split`` and ``shares`` do so unevenly, ``monitor`` measures loads, ``migrate``
moves weights and optimizer state at once, ``migrator`` does so in the background, and
``replica_grads`` keeps replicas equal. Nothing here knows of dispatch or of pipelines: the maps are
tensors that a caller hands on.
"""

from dualpipe_ext.eplb.loads import drifting_loads, read_loads, synthetic_loads
from dualpipe_ext.eplb.migrate import migrate, migrate_optimizer, slot_state
from dualpipe_ext.eplb.migrator import Migrator
from dualpipe_ext.eplb.monitor import LoadMonitor, PendingLoads, count_experts
from dualpipe_ext.eplb.move_plan import MigrationReport, Move, plan_moves
from dualpipe_ext.eplb.placement import Placement, balancedness, gpu_loads, select_replicas
from dualpipe_ext.eplb.plan import rebalance_experts
from dualpipe_ext.eplb.planner import PlacementPlan, Verdict, plan_placement, should_rebalance
from dualpipe_ext.eplb.replica_grads import reduce_replica_grads
from dualpipe_ext.eplb.split import ReplicaSplit, split_replicas

__all__ = [
    "LoadMonitor",
    "MigrationReport",
    "Migrator",
    "Move",
    "PendingLoads",
    "Placement",
    "PlacementPlan",
    "ReplicaSplit",
    "Verdict",
    "balancedness",
    "count_experts",
    "drifting_loads",
    "gpu_loads",
    "migrate",
    "migrate_optimizer",
    "plan_moves",
    "plan_placement",
    "read_loads",
    "rebalance_experts",
    "reduce_replica_grads",
    "select_replicas",
    "should_rebalance",
    "slot_state",
    "split_replicas",
    "synthetic_loads",
]
