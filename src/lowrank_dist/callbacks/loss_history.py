"""The losses of a run as one JSON file."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lowrank_dist.callbacks.run_directory import run_directory
from lowrank_dist.storage.writer import write_report


class Clock:
    """Seconds between starts and stops, added to those of before."""

    def __init__(self, before: float = 0.0) -> None:
        self._before = before
        self._began: float | None = None

    def start(self) -> None:
        """Go on."""
        self.stop()
        self._began = time.monotonic()

    def stop(self) -> None:
        """Stand still."""
        self._before, self._began = self.seconds(), None

    def seconds(self) -> float:
        """Seconds so far."""
        return self._before + (0.0 if self._began is None else time.monotonic() - self._began)


class LossHistory(Callback):
    """Record ``train_loss`` of every step and ``val_loss`` of every validation, including the sanity check.

    Validations of a process that has not trained are not recorded.

    With ``num_sanity_val_steps=-1`` the first validation entry is the loss on the whole validation set before step 1.
    It shows whether the initialisation preserved the model.

    Parameters
    ----------
    path
        JSON file, relative to the directory of the first logger (without one to the trainer's ``default_root_dir``),
        written at the end of every validation and of the fit:
        ``{"train": [{"step", "loss", "seconds"}, ...], "validation": [...]}``. ``seconds`` are those of training so
        far, over all attempts: saves and scores of tasks count, validations do not.

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
        self._clock, self._has_trained = Clock(), False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_trained = True
        self._clock.start()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.stop()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.fit_loop._should_accumulate():  # within a step, `global_step` is still the previous one
            self._record("train", "train_loss", trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        if not fitting and not self._has_trained:  # the record is that of another process, and stays as it is
            return
        self._record("validation", "val_loss", trainer)
        self._write(trainer)
        if fitting and not trainer.sanity_checking:
            self._clock.start()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.stop()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        entries = {part: list(entries) for part, entries in self.history.items()}
        return {"history": entries, "seconds": self._clock.seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]
        self._clock = Clock(state_dict.get("seconds", 0.0))

    def _record(self, part: str, metric: str, trainer: Trainer) -> None:
        value = trainer.callback_metrics.get(metric)
        if value is None:
            return
        entries = self.history[part]
        if entries and entries[-1]["step"] == trainer.global_step:
            entries.pop()
        entries.append({"step": trainer.global_step, "loss": float(value), "seconds": self._clock.seconds()})

    def _write(self, trainer: Trainer) -> None:
        path = run_directory(trainer) / self.path
        if trainer.is_global_zero:
            write_report(path, self.history)
