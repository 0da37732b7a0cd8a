"""Preemption and time limits: save between two steps, requeue, exit."""

from __future__ import annotations

import logging
import time
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lowrank_dist.callbacks.adapter_checkpoint import AdapterCheckpoint
from lowrank_dist.cluster.allocation import Allocation
from lowrank_dist.cluster.attempts import AttemptLog
from lowrank_dist.cluster.signals import Request
from lowrank_dist.training.stopping import StopAtStep

log = logging.getLogger(__name__)


class Preemption(StopAtStep):
    """Save and requeue the job when SLURM announces preemption or the end of its time.

    SIGUSR2 (``#SBATCH --signal=USR2@SECONDS``) sets a flag on the ranks that receive it. After every optimizer step
    all ranks agree on the flag (one all-reduce of an integer over gloo). If any rank has set it, all ranks save through
    `AdapterCheckpoint`, rank 0 requeues the job, and all exit. SIGTERM also saves, but requeues only if SLURM is
    preempting the job: after ``scancel`` the job stays cancelled. The requeued job resumes with ``ckpt_path="last"``.

    Parameters
    ----------
    grace_seconds
        Seconds between the signal and the end of the job (the ``SECONDS`` above, or the partition's ``GraceTime``). A
        warning is logged if the longest step and the last save together took longer. None: no check.
    attempts
        Folder of the job's logs, where its attempts are recorded. None: no record.

    Raises
    ------
    MisconfigurationException
        At set-up, if Lightning would requeue too (``SLURMEnvironment(auto_requeue=True)``, its default under SLURM),
        if the callbacks contain no `AdapterCheckpoint`, or if that has ``save_weights_only=True``.

    See Also
    --------
    AdapterCheckpoint : Writes the checkpoints.
    HealthCheck : Checks the nodes before training.

    Notes
    -----
    During a validation between two steps the ranks agree after every batch; the resumed job repeats the validation.
    They agree after the next step if the validation's number of batches is not known or not the same on all ranks.
    Nothing is saved before the first step: SIGUSR2 then takes effect at its end. SIGTERM ends the job at once, which is
    started again unless it was cancelled.

    Examples
    --------
    >>> from lightning.pytorch.plugins.environments import SLURMEnvironment
    >>> from lowrank_dist import AdapterCheckpoint, Preemption
    >>> plugin = SLURMEnvironment(auto_requeue=False)
    >>> callbacks = [AdapterCheckpoint(every_n_train_steps=200), Preemption(grace_seconds=300)]

    Pass them to ``Trainer(strategy=PiSSAStrategy(...), plugins=plugin, callbacks=callbacks)`` and call
    ``trainer.fit(..., ckpt_path="last")``. ``lowrank-dist submit`` adds the plugin, this callback and ``ckpt_path`` to
    every job.
    """

    def __init__(self, *, grace_seconds: float | None = None, attempts: str | None = None) -> None:
        super().__init__()
        self.grace_seconds = grace_seconds
        self._folder = attempts
        self._attempts: AttemptLog | None = None
        self._step_began = 0.0
        self._longest_step = 0.0
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            super().setup(trainer, pl_module, stage)
            return
        environment: Any = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            raise MisconfigurationException(
                "Preemption and Lightning's auto_requeue would both requeue the job, and Lightning saves inside its "
                "signal handler; pass Trainer(plugins=SLURMEnvironment(auto_requeue=False)), or leave Preemption out"
            )
        if self._checkpoint(trainer).save_weights_only:
            raise MisconfigurationException(
                "Preemption: AdapterCheckpoint(save_weights_only=True) saves nothing to resume from; leave it out"
            )
        super().setup(trainer, pl_module, stage)
        allocation = Allocation.current()
        if self._folder is not None and allocation is not None and trainer.is_global_zero:
            self._attempts = AttemptLog(self._folder, allocation.job_id)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step_began = self._step_began or time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        self._longest_step = max(self._longest_step, time.monotonic() - self._step_began)
        self._step_began = 0.0
        if self._attempts is not None:
            self._attempts.progress(trainer.global_step)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._check_grace(trainer)

    def leave(self, trainer: Trainer, request: Request) -> None:
        """Save, requeue and exit, all ranks at the same step. Collective."""
        self._checkpoint(trainer).save_now(trainer)
        allocation, status = Allocation.current(), 0
        with self._group.shared_errors():
            if trainer.is_global_zero and allocation is not None:
                requeues = request is Request.REQUEUE or allocation.is_preempted()
                if self._attempts is not None:
                    self._attempts.end("requeued" if requeues else "stopped")
                if requeues:
                    status = allocation.requeue()
                log.warning(
                    "Saved after step %d and %s.", trainer.global_step, "requeued" if requeues else "stopped by SIGTERM"
                )
        raise SystemExit(self._group.broadcast_object(status))

    def _check_grace(self, trainer: Trainer) -> None:
        saving = self._checkpoint(trainer).save_seconds
        if self._warned or self.grace_seconds is None or saving is None or not trainer.is_global_zero:
            return
        needed = self._longest_step + saving
        if needed > self.grace_seconds:
            self._warned = True
            log.warning(
                "The grace period of %.0f s is too short: a step took %.1f s and a save %.1f s. Training since the "
                "last checkpoint would be lost; ask for a longer one, for example with `submit --grace %d`.",
                self.grace_seconds,
                self._longest_step,
                saving,
                2 * round(needed + 0.5),
            )

    @staticmethod
    def _checkpoint(trainer: Trainer) -> AdapterCheckpoint:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, AdapterCheckpoint):
                return callback
        raise MisconfigurationException("Preemption saves through AdapterCheckpoint; add one to the callbacks")
