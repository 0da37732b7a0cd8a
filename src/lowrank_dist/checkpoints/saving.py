"""Saves of a running training: snapshots between two steps, files in the background."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lowrank_dist.checkpoints.writer import CheckpointWriter
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError
from lowrank_dist.storage.atomic import remove_directory
from lowrank_dist.zero3.optimizer import ShardedOptimizer

#: How long a rank that failed waits for the others to fail too, before it gives up saving.
MEETING = timedelta(seconds=30)

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
    Construction and `save` are collective. Whether a save succeeded its future tells, the same on every rank.
    """

    def __init__(self, writer: CheckpointWriter, timeout: timedelta) -> None:
        group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        # a timeout belongs to a group: every operation of this one gives up early
        meeting = dist.new_group(backend="gloo", timeout=MEETING) if dist.is_initialized() else None
        self._writer, self._jobs = writer, BackgroundJobs()
        self._group, self._meeting = ShardGroup(group), ShardGroup(meeting)

    def save(
        self,
        directory: Path,
        optimizer: ShardedOptimizer | None,
        *,
        state: tuple[Any, dict[str, Tensor]] | None,
        facts: Mapping[str, Any],
    ) -> Future[None]:
        """Take a snapshot and begin to write it; see `CheckpointWriter`. Waits for the save before, if need be.

        Returns
        -------
        Future
            Done once the checkpoint is complete, or is not to be: ``result()`` then raises the OSError or InputError.
        """
        self.wait()
        taken = self._writer.snapshot(optimizer, state=state, facts=facts)
        return self._jobs.submit(lambda: self._writer.write(taken, directory, self._group))

    def remove(self, directory: Path) -> None:
        """Remove a checkpoint once the saves before have ended, unless the last of them failed. One rank calls it."""

        def remove() -> None:
            with _warned(f"{directory} could not be removed"):
                remove_directory(directory)

        self._jobs.submit(remove, needs_success=True)

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

        self._jobs.submit(make, needs_success=True)

    def wait(self) -> None:
        """Wait until nothing is being written, removed or linked any more."""
        self._jobs.wait()

    def meet(self, step: int) -> None:
        """Make sure that a run which an exception has ended can still be saved. Collective, if the others come.

        After an exception on one rank the others may be waiting for it in the middle of a step: a collective save
        would wait for them as they do for it.

        Raises
        ------
        InputError
            Where not every rank comes within `MEETING`, or not all after the same step.
        """
        self.wait()
        try:
            steps = self._meeting.gather_objects(step)
        except RuntimeError as error:  # of gloo: too late, or gone
            raise InputError(
                f"the exception was not raised on all ranks within {MEETING.total_seconds():g} s, and a checkpoint "
                "needs them all; resume from the one before"
            ) from error
        if len(set(steps)) > 1:
            raise InputError(f"the ranks were ended after different steps: {steps}; resume from the checkpoint before")

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


class BackgroundJobs:
    """Runs jobs in a thread, one after the other.

    Jobs may communicate over a process group of their own: every rank must then submit the same jobs in the same order.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []
        self._failed = False

    def submit(self, job: Callable[[], None], *, needs_success: bool = False) -> Future[None]:
        """Run `job` after those submitted before; with `needs_success` only if the one before it ended well."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lowrank-dist-save")

        def run() -> None:
            if needs_success and self._failed:
                return
            self._failed = True
            job()
            self._failed = False

        self._pending.append(self._pool.submit(run))
        return self._pending[-1]

    def wait(self) -> None:
        """Wait until every job has ended, well or not: that their futures tell."""
        while self._pending:
            self._pending[0].exception()
            self._pending.pop(0)

    def close(self) -> None:
        """Wait, and end the thread."""
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
