"""A logger that keeps what it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger

from lowrank_dist.checkpoints.layout import TrainingCheckpoint
from lowrank_dist.distributed.group import ShardGroup


class RecordingLogger(Logger):
    """Which checkpoints it was told of, each complete at that time, and of which metrics.

    Attributes
    ----------
    told : list of str
        Directory and name of every checkpoint, in order.
    metrics : set of str
        Names.
    """

    name, version, save_dir = "recording", 0, None

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []
        self.metrics: set[str] = set()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= set(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        path = Path(checkpoint_callback._last_checkpoint_saved)
        checkpoint = TrainingCheckpoint(path)
        checkpoint.verify(ShardGroup.single())
        checkpoint.close()
        self.told.append(f"{path.parent.name}/{path.name}")
