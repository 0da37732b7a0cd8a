"""What ``lowrank-dist fit`` leaves in the directory of its logger: the configuration, and metrics over all attempts."""

from __future__ import annotations

import csv
import os
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

#: The file of `CSVLogger`.
METRICS = "metrics.csv"


class RunRecords(SaveConfigCallback):
    """Save the configuration of a fit once it is known that the run may write there, and go on in its metrics.

    Lightning saves it earlier, and for evaluations as well, so that it would no longer be that of the run.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing yet: another run may hold the directory."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in _csv_loggers(trainer):
            try:
                _cut_to(logger, trainer.global_step)
            except (OSError, ValueError, csv.Error) as error:  # raised on one rank, it would leave the others waiting
                rank_zero_warn(f"{logger.log_dir}/{METRICS} keeps the rows of lost steps: {error}")


@rank_zero_only
def keep_metrics(trainer: Trainer) -> None:
    """Let the `CSVLogger` of `trainer` append to the ``metrics.csv`` that is there, on rank 0; before ``fit``.

    It removes the file as soon as it is used: that of an earlier attempt, or of a run that still writes it.
    """
    for logger in _csv_loggers(trainer):
        path = Path(logger.log_dir) / METRICS
        if not path.is_file():
            continue
        aside = path.with_name(f".{METRICS}.{os.getpid()}")
        path.rename(aside)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Experiment logs directory")
                writer = logger.experiment
        finally:
            aside.rename(path)
        writer.metrics_keys = _table(path)[0]


def _cut_to(logger: CSVLogger, steps: int) -> None:
    """Leave the rows of the first `steps` steps, which are those that the run has done."""
    path, writer = Path(logger.log_dir) / METRICS, logger.experiment
    if not path.is_file():
        return
    names, rows = _table(path)
    kept = [row for row in rows if row.get("step", "").isdecimal() and int(row["step"]) < steps]
    if not kept:
        path.unlink()
        writer.metrics_keys = []
    elif len(kept) < len(rows):
        part = path.with_name(f".{METRICS}.{os.getpid()}")
        with part.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, fieldnames=names, extrasaction="ignore")
            table.writeheader()
            table.writerows(kept)
        part.replace(path)


def _table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Names of the columns, and rows."""
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        return list(table.fieldnames or []), list(table)


def _csv_loggers(trainer: Trainer) -> list[CSVLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]


def beside_the_fit(logger: Any, subcommand: str) -> None:
    """Let the `CSVLogger` that `logger`, the settings of a logger, names write below its directory, for an evaluation.

    It would otherwise remove the metrics of the fit.
    """
    options = logger.get("init_args", {}) if str(logger.get("class_path", "")).endswith("CSVLogger") else {}
    if isinstance(options.get("version"), str):
        options["version"] = os.path.join(options["version"], subcommand)
