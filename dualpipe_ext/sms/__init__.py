"""How the SMs of a GPU are divided between communication and the compute beside it.

``SMPartition`` is the setting, which communication buffers, pipelines and layers share;
``SMTuner`` finds the number on the first steps of training. Nothing here knows what communicates
or what computes.
"""

from dualpipe_ext.sms.means import DEFAULT_MEANS, MEANS, check_means
from dualpipe_ext.sms.partition import AUTO, SMPartition, check_comm_sms, set_partition
from dualpipe_ext.sms.tuner import Candidate, SMTuner, Tuning

__all__ = [
    "AUTO",
    "DEFAULT_MEANS",
    "MEANS",
    "Candidate",
    "SMPartition",
    "SMTuner",
    "Tuning",
    "check_comm_sms",
    "check_means",
    "set_partition",
]
