"""The losses of a run as one JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lowrank_dist.storage.writer import write_report


class LossHistory(Callback):
    """Record ``train_loss`` of every step and ``val_loss`` of every validation, including the sanity check.

    With ``num_sanity_val_steps=-1`` the first validation entry is the loss on the whole validation set before step 1.
    It shows whether the initialisation preserved the model.

    Parameters
    ----------
    path
        JSON file, relative to the trainer's ``default_root_dir``, written at the end of every validation and of the
        fit: ``{"train": [{"step", "loss"}, ...], "validation": [...]}``.

    Attributes
    ----------
    history : dict
        The same, in memory. A resumed run continues the curve of the checkpoint.

    See Also
    --------
    InitReport : Writes the report of the initialisation.

    Examples
    --------
    >>> from lightning import Trainer
    >>> from lowrank_dist import LossHistory
    >>> losses = LossHistory("history.json")
    >>> trainer = Trainer(accelerator="cpu", logger=False, num_sanity_val_steps=-1, callbacks=[losses])
    >>> losses.history
    {'train': [], 'validation': []}
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.history: dict[str, list[dict[str, float]]] = {"train": [], "validation": []}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.fit_loop._should_accumulate():  # within a step, `global_step` is still the previous one
            self._record("train", "train_loss", trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record("validation", "val_loss", trainer)
        self._write(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"history": {part: list(entries) for part, entries in self.history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]

    def _record(self, part: str, metric: str, trainer: Trainer) -> None:
        value = trainer.callback_metrics.get(metric)
        if value is None:
            return
        entries = self.history[part]
        if entries and entries[-1]["step"] == trainer.global_step:
            entries.pop()
        entries.append({"step": trainer.global_step, "loss": float(value)})

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir, self.path)
            write_report(path, self.history)
