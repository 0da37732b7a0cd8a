"""Work that goes on beside training: one thread, one job at a time, in order."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


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
