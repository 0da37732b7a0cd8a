"""Saves of a running training: snapshots between two steps, files in the background."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lowrank_dist.checkpoints.background import BackgroundJobs
from lowrank_dist.checkpoints.writer import CheckpointWriter
from lowrank_dist.comm import ShardGroup
from lowrank_dist.directories import remove_directory
from lowrank_dist.zero3_optimizer import ShardedOptimizer

log = logging.getLogger(__name__)


class Saver:
    """Saves checkpoints one after the other, in order with the removal of old ones.

    Parameters
    ----------
    writer
        Of the model.
    timeout
        After which a rank no longer waits for the others while files are written.

    Notes
    -----
    Files are written over a gloo group of their own, so that its collectives never meet those of training.
    Construction, `save` and `wait` are collective; a failed save is raised by the next `wait`, on every rank.
    """

    def __init__(self, writer: CheckpointWriter, timeout: timedelta) -> None:
        group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        self._writer, self._group, self._jobs = writer, ShardGroup(group), BackgroundJobs()

    def save(
        self,
        directory: Path,
        optimizer: ShardedOptimizer | None,
        *,
        state: tuple[Any, dict[str, Tensor]] | None,
        facts: Mapping[str, Any],
    ) -> None:
        """Take a snapshot and begin to write it; see `CheckpointWriter`. Waits for the save before, if need be."""
        self.wait()
        taken = self._writer.snapshot(optimizer, state=state, facts=facts)
        self._jobs.submit(f"save {directory}", lambda: self._writer.write(taken, directory, self._group))

    def remove(self, directory: Path) -> None:
        """Remove a checkpoint once the saves before have ended, unless the last of them failed. One rank calls it."""

        def remove() -> None:
            with _warned(f"{directory} could not be removed"):
                remove_directory(directory)

        self._jobs.submit(f"remove {directory}", remove, needs_success=True)

    def link(self, directory: Path, link: Path) -> None:
        """Make `link` a symbolic link to `directory`, likewise."""

        def make() -> None:
            with _warned(f"{link} could not be made"):
                fresh = link.with_name(f".{link.name}.link")
                fresh.unlink(missing_ok=True)
                fresh.symlink_to(os.path.relpath(directory, link.parent))
                if link.exists() and not link.is_symlink():
                    remove_directory(link)
                fresh.replace(link)

        self._jobs.submit(f"link {link}", make, needs_success=True)

    @property
    def busy(self) -> bool:
        """Whether something is still being written on this rank."""
        return self._jobs.busy

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises
        ------
        OSError, InputError
            Of the first save that failed since the last call; the checkpoints before it are intact.
        """
        self._jobs.wait()
        for job in self._jobs.finished():
            if job.error is not None:
                raise job.error

    def close(self) -> None:
        """Wait, and end the thread."""
        self._jobs.close()


@contextmanager
def _warned(what: str) -> Iterator[None]:
    """Other ranks know nothing of it: an error here must not end one rank alone."""
    try:
        yield
    except OSError as error:
        log.warning("%s: %s", what, error)
