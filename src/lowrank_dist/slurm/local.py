"""The jobs of a submission on this machine, as child processes of this one."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from typing import Any

import psutil

from lowrank_dist.cluster.signals import StopSignals
from lowrank_dist.slurm.submit import ENDED, Submission, describe, follow, state_of


def run_here(submission: Submission) -> int:
    """Run the jobs, at most ``options.parallelism`` at a time, and print their logs one after the other.

    After SIGTERM or SIGUSR2 no further job is started.

    Returns
    -------
    int
        0 if all jobs were started and completed, else 1.
    """
    waiting, executor = list(zip(submission.jobs, submission.roots, strict=True)), submission.executor()
    running: list[Any] = []
    with Forwarding() as signals:

        def go_on() -> None:
            signals.deliver()
            running[:] = [job for job in running if state_of(submission, job) not in ENDED]
            while waiting and len(running) < submission.options.parallelism and not signals.received:
                job, root = waiting.pop(0)
                running.append(executor.submit(job))
                signals.jobs.append(running[-1])
                describe(submission, running[-1], root)

        go_on()
        status, followed = 0, 0
        while followed < len(signals.jobs):
            status = max(status, follow(submission, signals.jobs[followed], meanwhile=go_on))
            followed += 1
            go_on()
    if waiting:
        text = f"{len(waiting)} of {len(submission.jobs)} jobs were not started, because a signal stopped the sweep"
        print(text, file=sys.stderr)
    return 1 if waiting else status


class Forwarding:
    """Forwards SIGUSR2 and SIGTERM to the tasks of jobs on this machine, as SLURM does.

    Without it SIGUSR2 would kill submitit's controller, which started the tasks, and leave the tasks running. Signals
    that arrive before the tasks have started are kept until then.

    Attributes
    ----------
    jobs
        Jobs of submitit.
    received
        Whether a signal has arrived.
    """

    def __init__(self) -> None:
        self.jobs: list[Any] = []
        self.received = False
        self._waiting: list[int] = []

    def __enter__(self) -> Forwarding:
        self._before = {number: signal.signal(number, self._receive) for number in StopSignals.REQUESTS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self.received = True
        self._waiting.append(number)
        self.deliver()

    def deliver(self) -> None:
        """Send waiting signals, if the tasks have started."""
        tasks = [task for job in self.jobs for task in _tasks(job)]
        if not tasks:
            return
        numbers, self._waiting = self._waiting, []
        for number in numbers:
            for task in tasks:
                with suppress(psutil.NoSuchProcess):
                    task.send_signal(number)


def _tasks(job: Any) -> list[psutil.Process]:
    """Processes that run the tasks of a job on this machine, without their child processes."""
    running: dict[int, tuple[psutil.Process, int]] = {}
    with suppress(psutil.NoSuchProcess):  # it has just ended
        for process in psutil.Process(job._process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # this one too, reaped or not
                if "submitit.core._submit" in process.cmdline():
                    running[process.pid] = process, process.ppid()
    return [process for process, parent in running.values() if parent not in running]
