"""Work that goes on beside training: one thread, one job at a time, in order."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass


@dataclass(frozen=True)
class Finished:
    """A job that has ended.

    Attributes
    ----------
    name
        What it was called.
    error
        What it raised, or None.
    """

    name: str
    error: BaseException | None


class BackgroundJobs:
    """Runs jobs in a thread, one after the other.

    Jobs may communicate over a process group of their own: every rank must then submit the same jobs in the same order.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._pending: list[tuple[str, Future[None]]] = []
        self._failed = False

    def submit(self, name: str, job: Callable[[], None], *, needs_success: bool = False) -> None:
        """Run `job` after those submitted before; with `needs_success` only if the one before it ended well."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lowrank-dist-save")

        def run() -> None:
            if needs_success and self._failed:
                return
            self._failed = True
            job()
            self._failed = False

        self._pending.append((name, self._pool.submit(run)))

    @property
    def busy(self) -> bool:
        """Whether a job has not ended yet."""
        return any(not future.done() for _, future in self._pending)

    def finished(self) -> list[Finished]:
        """Jobs that have ended since the last call, in order. Does not wait."""
        ended = []
        while self._pending and self._pending[0][1].done():
            name, future = self._pending.pop(0)
            ended.append(Finished(name, future.exception()))
        return ended

    def wait(self) -> None:
        """Wait until every job has ended; `finished` then tells how."""
        for _, future in self._pending:
            future.exception()

    def close(self) -> None:
        """Wait, and end the thread."""
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
