"""Saves during training: snapshots between two steps, files in the background."""

from __future__ import annotations

import logging
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
from lowrank_dist.storage.atomic import put_link, remove_directory
from lowrank_dist.zero3.optimizer import ShardedOptimizer

#: How long a rank on which an exception was raised waits for the others to raise it too before it gives up saving.
MEETING = timedelta(seconds=30)

log = logging.getLogger(__name__)


class Saver:
    """Saves checkpoints and removes old ones, one after the other.

    Parameters
    ----------
    writer
        Writer of the model's checkpoints.
    timeout
        How long a rank waits for the others while files are written.

    Attributes
    ----------
    writer
        The same writer.

    Notes
    -----
    Saves communicate over a gloo group of their own, so that their collectives do not mix with those of training.
    Construction and `save` are collective. The future of a save has the same outcome on every rank.
    """

    def __init__(self, writer: CheckpointWriter, timeout: timedelta) -> None:
        group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        # gloo's timeout belongs to the group; this one has a short timeout of its own
        meeting = dist.new_group(backend="gloo", timeout=MEETING) if dist.is_initialized() else None
        self.writer, self._jobs = writer, BackgroundJobs()
        self._group, self._meeting = ShardGroup(group), ShardGroup(meeting)

    def save(
        self,
        directory: Path,
        optimizer: ShardedOptimizer | None,
        *,
        state: tuple[Any, dict[str, Tensor]] | None,
        facts: Mapping[str, Any],
    ) -> Future[None]:
        """Wait for the previous save, take a snapshot and begin to write it (see `CheckpointWriter`). Collective.

        Returns
        -------
        Future
            Done once the checkpoint is complete or has failed; ``result()`` then raises the OSError or InputError.
        """
        self.wait()
        taken = self.writer.snapshot(optimizer, state=state, facts=facts)
        return self._jobs.submit(lambda: self.writer.write(taken, directory, self._group))

    def remove(self, directory: Path) -> None:
        """Remove a checkpoint after the earlier saves, unless the job before failed. Called by one rank."""

        def remove() -> None:
            with _warned(f"{directory} could not be removed"):
                remove_directory(directory)

        self._jobs.submit(remove, needs_success=True)

    def link(self, directory: Path, link: Path) -> None:
        """Make `link` a symbolic link to `directory` after the earlier saves, unless the job before failed."""

        def make() -> None:
            with _warned(f"{link} could not be made"):
                put_link(link, directory)

        self._jobs.submit(make, needs_success=True)

    def wait(self) -> None:
        """Wait until all saves, removals and links have ended."""
        self._jobs.wait()

    def meet(self, step: int) -> None:
        """Check that every rank can take part in a save after an exception. Collective with a timeout.

        If only one rank raised the exception, the others may wait for it in a collective of the step. A save would then
        deadlock.

        Raises
        ------
        InputError
            If not every rank calls this within `MEETING`, or the ranks call it with different steps.
        """
        self.wait()
        try:
            steps = self._meeting.gather_objects(step)
        except RuntimeError as error:  # gloo raises it on a timeout and on a lost connection
            raise InputError(
                f"the exception was not raised on all ranks within {MEETING.total_seconds():g} s, and a checkpoint "
                "needs all ranks; resume from the previous checkpoint"
            ) from error
        if len(set(steps)) > 1:
            raise InputError(f"the ranks ended after different steps: {steps}; resume from the previous checkpoint")

    def close(self) -> None:
        """Wait for all jobs and end the thread."""
        self._jobs.close()


@contextmanager
def _warned(what: str) -> Iterator[None]:
    """Log an error, which stays in the job's future: only this rank does the work, and must not end alone."""
    try:
        yield
    except (OSError, InputError) as error:
        log.warning("%s: %s", what, error)
        raise


class BackgroundJobs:
    """Runs jobs in a thread, one after the other.

    Jobs may communicate over a process group of their own. Every rank must then submit the same jobs in the same order.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []
        self._failed = False

    def submit(self, job: Callable[[], None], *, needs_success: bool = False) -> Future[None]:
        """Run `job` after all earlier jobs; with `needs_success` only if the job before it succeeded."""
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
        """Wait until every job has ended. Raises nothing: the futures hold the errors."""
        while self._pending:
            self._pending[0].exception()
            self._pending.pop(0)

    def close(self) -> None:
        """Wait for all jobs and end the thread."""
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
