"""Training a MoE language model with every part of the package; what ``dualpipe train`` runs."""

from dualpipe_ext.training.config import TrainConfig
from dualpipe_ext.training.run import RunOptions, run
from dualpipe_ext.training.trainer import StepReport, Trainer

__all__ = ["RunOptions", "StepReport", "TrainConfig", "Trainer", "run"]
