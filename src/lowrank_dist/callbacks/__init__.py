"""Lightning callbacks."""

from lowrank_dist.callbacks.adapter_checkpoint import AdapterCheckpoint
from lowrank_dist.callbacks.evaluate_tasks import EvaluateTasks
from lowrank_dist.callbacks.health_check import HealthCheck
from lowrank_dist.callbacks.init_report import InitReport
from lowrank_dist.callbacks.loss_history import LossHistory
from lowrank_dist.callbacks.preemption import Preemption
from lowrank_dist.callbacks.step_monitor import StepMonitor

__all__ = [
    "AdapterCheckpoint",
    "EvaluateTasks",
    "HealthCheck",
    "InitReport",
    "LossHistory",
    "Preemption",
    "StepMonitor",
]
