"""A `ModelCheckpoint` that writes adapters and training state, in the background."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from weakref import proxy

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lowrank_dist.checkpoints.layout import newest_checkpoint
from lowrank_dist.errors import InputError
from lowrank_dist.storage.atomic import restore_replaced, sweep
from lowrank_dist.training.strategy import PiSSAStrategy

#: What `ModelCheckpoint` knows of saved checkpoints, and says before they are complete.
_KNOWN = (
    "best_k_models",
    "best_model_path",
    "best_model_score",
    "current_score",
    "kth_best_model_path",
    "kth_value",
    "last_model_path",
    "_last_checkpoint_saved",
    "_last_global_step_saved",
)

log = logging.getLogger(__name__)


class AdapterCheckpoint(ModelCheckpoint):
    """Write the adapter, the LoRA it converts to and the state of training; nothing of the frozen base.

    Every checkpoint is a directory, complete or absent, of safetensors and JSON:

    - ``adapter/``: the trained factors, a PEFT adapter for the *residual*;
    - ``adapter_init/``: the factors before training;
    - ``lora/``: the converted LoRA, of rank 2r, a PEFT adapter for the *original* model;
    - ``optimizer.safetensors``, ``state.json``, ``state.safetensors``: what training goes on from (not with
      ``save_weights_only``);
    - ``lowrank_dist.json``: settings, step, per matrix what quantization left over, hashes.

    ``trainer.fit(..., ckpt_path=DIR)`` resumes on any number of ranks; ``ckpt_path="last"`` takes the newest complete
    one in `dirpath`. The last step of a fit is saved too, whatever the interval (unless ``save_top_k=0`` or a
    ``monitor`` decides). Where gradients are accumulated, saves wait for the end of the step. With
    ``save_on_exception``, an exception that not all ranks raise is saved nothing on: the others cannot take part.

    Takes the arguments of `lightning.pytorch.callbacks.ModelCheckpoint` (``dirpath``, ``every_n_train_steps``,
    ``monitor``, ``save_top_k``, ``save_last``, ...) with the same meaning, and two more.

    Parameters
    ----------
    background
        Write files while training goes on; a step is held up only while the state is copied. Old checkpoints are
        removed, links made and loggers told once the new one is complete.
    on_save_error
        A save that fails (a full disk) leaves the checkpoints before it intact. ``"stop"``: training ends with the
        error, at the next save or at the end. ``"continue"``: it goes on with a warning. Either way the callback knows
        only checkpoints that are complete (``best_model_path``, ...), and none is removed in favour of a failed one.

    Raises
    ------
    MisconfigurationException
        At set-up, where the trainer's strategy is not `PiSSAStrategy`.
    """

    FILE_EXTENSION = ""

    def __init__(
        self, *args: Any, background: bool = True, on_save_error: Literal["stop", "continue"] = "stop", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if on_save_error not in ("stop", "continue"):
            raise MisconfigurationException(f"on_save_error={on_save_error!r} is none of 'stop', 'continue'")
        self.background, self.on_save_error = background, on_save_error
        #: Seconds from the snapshot to the complete checkpoint, of the last save; None before.
        self.save_seconds: float | None = None
        self._save: Future[None] | None = None
        self._untold = False
        self._before: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy, PiSSAStrategy):
            raise MisconfigurationException(
                f"AdapterCheckpoint writes the adapters of a PiSSAStrategy, but the strategy is "
                f"{type(trainer.strategy).__name__}; use lightning's ModelCheckpoint with it"
            )
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and self.dirpath is not None:
            sweep(Path(self.dirpath))

    # -- when ---------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if not trainer.fit_loop._should_accumulate():  # gradients of an unfinished step would be lost
            super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        if self._save is not None and self._save.done() and self._save.exception() is None:
            self._tell_loggers(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.monitor is None and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._settle(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        try:
            if self._save is not None:
                self._settle(trainer)
            if self._should_save_on_exception(trainer):
                _saver(trainer).meet(trainer.global_step)  # before metrics are brought together, too
                super().on_exception(trainer, pl_module, exception)
                self._settle(trainer)
        except (OSError, InputError) as error:  # `exception` is what the user must see
            log.warning("No checkpoint was saved after the %s: %s", type(exception).__name__, error)

    def save_now(self, trainer: Trainer) -> None:
        """Save this step, whatever the interval, and wait until it is complete. At the end of a step; collective.

        Where a ``monitor`` or ``save_top_k=0`` decides what is kept, it is written beside those, as ``preempted``.
        """
        if self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            if self.monitor is None and self.save_top_k != 0:
                self._save_topk_checkpoint(trainer, candidates)
            else:
                with self._undone_if_failed(trainer):
                    self._save_checkpoint(trainer, os.path.join(self.dirpath or "", "preempted"))
            self._save_last_checkpoint(trainer, candidates)
        self._settle(trainer)

    # -- how ----------------------------------------------------------------------------------------------------

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        with self._undone_if_failed(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if not self.save_last:
            return
        if self.save_last == "link" and self._last_checkpoint_saved and self.save_top_k != 0:
            super()._save_last_checkpoint(trainer, monitor_candidates)  # made when what it leads to is complete
            return
        with self._undone_if_failed(trainer):
            super()._save_last_checkpoint(trainer, monitor_candidates)

    @contextmanager
    def _undone_if_failed(self, trainer: Trainer) -> Iterator[None]:
        """What is on disk must be known before Lightning chooses names and what to remove."""
        self._settle(trainer)
        self._before = {name: getattr(self, name) for name in _KNOWN}
        self._before["best_k_models"] = dict(self.best_k_models)
        try:
            yield
            if not self.background:
                self._settle(trainer)
        except (OSError, InputError) as error:
            self._failed(error)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        strategy: Any = trainer.strategy
        began = time.monotonic()
        with strategy.background_saves() as saves:
            trainer.save_checkpoint(filepath, self.save_weights_only)
        (self._save,) = saves
        self._save.add_done_callback(lambda _: setattr(self, "save_seconds", time.monotonic() - began))
        self._untold = True
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath

    def _settle(self, trainer: Trainer) -> None:
        """Wait for what is being written; then loggers are told, or the error, the same on all ranks, is dealt with."""
        if self._save is None:
            return
        save, self._save = self._save, None
        _saver(trainer).wait()
        try:
            save.result()
        except (OSError, InputError) as error:
            self._failed(error)
        else:
            self._tell_loggers(trainer)

    def _failed(self, error: Exception) -> None:
        vars(self).update(self._before)
        self._untold = False
        if self.on_save_error == "stop":
            raise error
        log.warning("A checkpoint could not be saved, training goes on: %s", error)

    def _tell_loggers(self, trainer: Trainer) -> None:
        if self._untold and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))
        self._untold = False

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero:
            _saver(trainer).link(Path(filepath), Path(linkpath))

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if trainer.is_global_zero:
            _saver(trainer).remove(Path(filepath))

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        directory = Path(self._ModelCheckpoint__resolve_ckpt_dir(trainer))  # type: ignore[attr-defined]
        restore_replaced(directory)
        newest = newest_checkpoint(directory)
        return set() if newest is None else {str(newest)}


def _saver(trainer: Trainer) -> Any:
    strategy: Any = trainer.strategy
    return strategy.saver
