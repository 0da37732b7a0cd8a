"""Where callbacks write the records of a run."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer


def run_directory(trainer: Trainer) -> Path:
    """The directory of the first logger, where LightningCLI writes the configuration, else ``default_root_dir``.

    Collective: one broadcast.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)
