"""A check of the nodes before the model is set up."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lowrank_dist.cluster.allocation import Allocation
from lowrank_dist.cluster.health import HealthError, HealthReport, check_health
from lowrank_dist.distributed.group import ShardGroup

log = logging.getLogger(__name__)


class HealthCheck(Callback):
    """Check devices, memory, network, package versions and the shared file system, and name unfit nodes.

    The check takes seconds and runs before the model is set up. It prints one line per node. Collective.

    Attributes
    ----------
    report : HealthReport or None
        Findings of the check; None before `setup`.

    Raises
    ------
    HealthError
        From `setup`, on every rank, if a node is unfit.

    See Also
    --------
    Preemption : Saves and requeues a job that SLURM stops.

    Examples
    --------
    >>> from lightning import Trainer
    >>> from lowrank_dist import HealthCheck
    >>> trainer = Trainer(accelerator="cpu", logger=False, callbacks=[HealthCheck()])

    ``lowrank-dist submit`` adds the callback to every job.
    """

    def __init__(self) -> None:
        super().__init__()
        self.report: HealthReport | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.report is not None:
            return
        device: Any = trainer.strategy.root_device
        allocation = Allocation.current()
        host = os.uname().nodename if allocation is None else allocation.host
        self.report = check_health(ShardGroup(device=device), device, Path(trainer.default_root_dir), host=host)
        rank_zero_info(self.report.as_table())
        if self.report.problems:
            raise HealthError("nodes that are unfit for the job: " + "; ".join(self.report.problems))
        if trainer.is_global_zero:
            for warning in self.report.warnings:
                log.warning("A slow node: %s", warning)
