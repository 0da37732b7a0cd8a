"""The report of the initialisation, on the screen and as JSON."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lowrank_dist.callbacks.run_directory import run_directory
from lowrank_dist.decomposition.report import as_table
from lowrank_dist.storage.writer import write_report


class InitReport(Callback):
    """Print a table of the initialisation per layer type once the model is set up, and write it as JSON.

    Parameters
    ----------
    path
        JSON file to write, with one entry per matrix; relative to the directory of the first logger (without one to the
        trainer's ``default_root_dir``). None: only print.

    See Also
    --------
    LossHistory : Writes the losses of a run.

    Examples
    --------
    >>> from lowrank_dist import InitReport
    >>> InitReport("init_report.json").path
    'init_report.json'

    Pass it to ``Trainer(callbacks=[...])`` beside a `lowrank_dist.PiSSAStrategy`. Under other strategies it does
    nothing.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        self.path = path
        self._reported: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        report = getattr(trainer.strategy, "init_report", None)
        if report is None or report is self._reported:
            return
        self._reported = report
        rank_zero_info(as_table(report.matrices))
        if self.path is None:
            return
        path = run_directory(trainer) / self.path
        if trainer.is_global_zero:
            write_report(path, report.as_dict())
