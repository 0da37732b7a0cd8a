"""A `ModelCheckpoint` that writes adapters only."""

from __future__ import annotations

from typing import Any
from weakref import proxy

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lowrank_dist.strategy import PiSSAStrategy


class AdapterCheckpoint(ModelCheckpoint):
    """Write the adapter and the LoRA it converts to, at every checkpoint; nothing of the frozen base.

    Every checkpoint is a directory, complete or absent:

    - ``adapter/``: the trained factors, a PEFT adapter for the *residual*;
    - ``adapter_init/``: the factors before training (not for LoRA and QLoRA, whose adapter starts at zero);
    - ``lora/``: the converted LoRA, of rank 2r, a PEFT adapter for the *original* model;
    - ``lowrank_dist.json``: base, method, and per matrix what quantization left over.

    The last step of a fit is saved too, whatever the interval (unless ``save_top_k=0`` or a ``monitor`` decides).

    Takes the arguments of `lightning.pytorch.callbacks.ModelCheckpoint` (``dirpath``, ``every_n_train_steps``,
    ``monitor``, ``save_top_k``, ``save_last``, ...) with the same meaning.

    Raises
    ------
    MisconfigurationException
        At set-up, where the trainer's strategy is not `PiSSAStrategy`.
    """

    FILE_EXTENSION = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy, PiSSAStrategy):
            raise MisconfigurationException(
                f"AdapterCheckpoint writes the adapters of a PiSSAStrategy, but the strategy is "
                f"{type(trainer.strategy).__name__}; use lightning's ModelCheckpoint with it"
            )
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.monitor is None and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        strategy: Any = trainer.strategy
        strategy.save_adapter(filepath)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))
