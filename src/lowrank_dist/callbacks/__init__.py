"""Lightning callbacks."""

from lowrank_dist.callbacks.adapter_checkpoint import AdapterCheckpoint
from lowrank_dist.callbacks.init_report import InitReport
from lowrank_dist.callbacks.loss_history import LossHistory

__all__ = ["AdapterCheckpoint", "InitReport", "LossHistory"]
