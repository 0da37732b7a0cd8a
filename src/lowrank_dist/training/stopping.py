"""A signal that stops a run: all ranks save the same step, and end."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from lowrank_dist.cluster.signals import SIGNALS, Request
from lowrank_dist.distributed.group import ShardGroup

log = logging.getLogger(__name__)

#: Exit status of a run that SIGTERM stopped, as of a process that it ended.
TERMINATED = 128 + 15


class StopAtStep(Callback):
    """Save and end after the step, or the batch of a validation, in which any rank has received SIGTERM (or SIGUSR2).

    After every optimizer step, and every batch of a validation between steps, all ranks agree on what they have
    received: one all-reduce of an integer over gloo. A validation whose number of batches differs between ranks, or is
    not known, is not interrupted: the ranks agree after the next step. A run that is resumed repeats the interrupted
    validation. Outside of training SIGTERM does what it did before the run, by default end the process; `PeerWatch`
    then ends the other ranks.

    `PiSSAStrategy` adds one to the Trainer unless its callbacks have one, such as `lowrank_dist.Preemption`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._group = ShardGroup.single()
        self._interruptible = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        SIGNALS.arm(training=False)
        if stage == "fit" and dist.is_initialized():
            self._group = ShardGroup(
                dist.new_group(backend="gloo", timeout=getattr(trainer.strategy, "_timeout", None))
            )

    # Lightning sets a handler of its own before it runs a stage, which broadcasts from within.
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        SIGNALS.arm(training=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        SIGNALS.arm()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            SIGNALS.arm(training=False)
            return
        # gradients of a step that is not complete would be lost
        between_steps = not trainer.sanity_checking and not trainer.fit_loop._should_accumulate()
        self._interruptible = between_steps and self._is_same_on_all_ranks(sum(trainer.num_val_batches))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if self._interruptible:
            self._leave_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._interruptible = False

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        SIGNALS.arm(training=False)

    on_predict_start = on_test_start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.fit_loop._should_accumulate():
            self._leave_if_asked(trainer)

    def _leave_if_asked(self, trainer: Trainer) -> None:
        request = Request(int(self._group.max(torch.tensor([int(SIGNALS.request)]))))
        if request is not Request.NONE:
            self.leave(trainer, request)

    def _is_same_on_all_ranks(self, number: float) -> bool:
        highest, negative = self._group.max(torch.tensor([number, -number], dtype=torch.float64)).tolist()
        return math.isfinite(highest) and highest == -negative

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, SystemExit):
            SIGNALS.disarm()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not trainer.interrupted:
            SIGNALS.disarm()

    def leave(self, trainer: Trainer, request: Request) -> None:
        """Save and exit, all ranks at the same step. Collective."""
        saved = save_now(trainer)
        if trainer.is_global_zero:
            end = "saved" if saved else "no checkpoint callback to save with"
            log.warning("Stopped by a signal after step %d: %s.", trainer.global_step, end)
        raise SystemExit(TERMINATED)


def save_now(trainer: Trainer) -> bool:
    """Save this step through the first checkpoint callback that can; whether there is one. Collective."""
    for callback in trainer.checkpoint_callbacks:
        if hasattr(callback, "save_now"):  # AdapterCheckpoint
            callback.save_now(trainer)
            return True
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            name = callback.format_checkpoint_name({}, callback.CHECKPOINT_NAME_LAST)
            trainer.save_checkpoint(os.path.join(callback.dirpath, os.path.basename(name)), callback.save_weights_only)
            return True
    return False


class TellOthers(Callback):
    """Tell the other ranks of an exception before anything else is done about it."""

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        super().__init__()
        self.failed = failed

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.failed(exception)


def add_to(trainer: Any, *, failed: Callable[[BaseException], None]) -> None:
    """Add both callbacks to `trainer`: `TellOthers`, which calls `failed`, and `StopAtStep` unless there is one."""
    callbacks: list[Callback] = trainer.callbacks
    callbacks[:] = [TellOthers(failed), *(one for one in callbacks if not isinstance(one, TellOthers))]
    if not any(isinstance(callback, StopAtStep) for callback in callbacks):
        first = next((i for i, one in enumerate(callbacks) if isinstance(one, Checkpoint)), len(callbacks))
        callbacks.insert(first, StopAtStep())
