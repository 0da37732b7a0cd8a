"""The log of a job's attempts: how far each got and how it ended, to stop a job that fails twice at the same step."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from lowrank_dist.errors import InputError


class RepeatedFailureError(InputError):
    """Two attempts in a row failed at the same step."""


class AttemptLog:
    """JSON lines beside the logs of a job: ``begin``, ``error`` of any rank, ``end``.

    Parameters
    ----------
    folder
        Folder of the job's logs, visible to all nodes.
    job_id
        Id of the job.

    Notes
    -----
    An attempt without an ``end`` counts as failed, whatever ended it. An ``error`` after the ``end`` changes nothing:
    ranks that SLURM ends one after the other lose each other. Every line is appended in one write.
    """

    def __init__(self, folder: str | os.PathLike[str], job_id: str) -> None:
        self.path = Path(folder) / f"{job_id}_attempts.jsonl"
        self._stopped = Path(folder) / f"{job_id}.stopped"
        self._step = Path(folder) / f"{job_id}_step"
        self._descriptor: int | None = None

    def begin(self, **facts: Any) -> None:
        """Record that an attempt begins. Rank 0.

        Raises
        ------
        RepeatedFailureError
            If the last two attempts failed at the same step. The job is then marked as stopped.
        """
        events = self.events()
        if events and self._end_of_last(events) is None:
            events.append(self._append(event="end", outcome="failed", step=self._last_step()))
        ends = [event for event in events if event["event"] == "end"][-2:]
        if len(ends) == 2 and all(end["outcome"] == "failed" for end in ends) and ends[0]["step"] == ends[1]["step"]:
            step = ends[1]["step"]
            self.stop()
            where = "before its first step" if step is None else f"after step {step}"
            raise RepeatedFailureError(
                f"the job failed twice in a row {where} and is not started again; {self._reason(events)}; see the logs "
                f"in {self.path.parent}. Submit the job again when the cause is removed; it resumes from the newest "
                "checkpoint"
            )
        self._step.unlink(missing_ok=True)
        self._append(event="begin", **facts)

    def progress(self, step: int) -> None:
        """Record that `step` steps are done. Rank 0 calls it at every step: it writes some bytes without a flush."""
        if self._descriptor is None:
            self._descriptor = os.open(self._step, os.O_WRONLY | os.O_CREAT, 0o600)
        os.pwrite(self._descriptor, f"{step:12d}\n".encode(), 0)

    def error(self, *, node: str, rank: int, error: BaseException) -> None:
        """Record the error that ended a rank. Any rank."""
        text = f"{type(error).__name__}: {error}"
        self._append(event="error", node=node, rank=rank, error=text[:2000])

    def end(self, outcome: str) -> None:
        """Record the regular end of this attempt: ``finished``, ``requeued`` or ``stopped``. Rank 0.

        A finished job is also marked as not to be requeued, in case a process dies during its shutdown.
        """
        if outcome == "finished":
            self.stop()
        self._append(event="end", outcome=outcome, step=self._last_step())

    def stop(self) -> None:
        """Mark the job as not to be requeued. Any rank."""
        self._stopped.touch(mode=0o600)

    def was_cancelled(self) -> bool:
        """Whether the last attempt saved and ended on request, without the job being marked as stopped."""
        end = self._end_of_last(self.events())
        return end is not None and end["outcome"] == "stopped" and not self._stopped.exists()

    def events(self) -> list[dict[str, Any]]:
        """All complete lines; one that a dying process has truncated is skipped."""
        events = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
        return events

    def _last_step(self) -> int | None:
        try:
            return int(self._step.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _append(self, **event: Any) -> dict[str, Any]:
        line = json.dumps({"time": round(time.time(), 1), **event})
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, f"{line}\n".encode())
        finally:
            os.close(descriptor)
        return event

    @staticmethod
    def _end_of_last(events: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The ``end`` of the last attempt; None where it has none."""
        for event in reversed(events):
            if event["event"] == "end":
                return event
            if event["event"] == "begin":
                break
        return None

    @staticmethod
    def _reason(events: list[dict[str, Any]]) -> str:
        """The first error of the last attempt, in words."""
        begun = max(i for i, event in enumerate(events) if event["event"] == "begin")
        errors = [event for event in events[begun:] if event["event"] == "error"]
        if not errors:
            return "no rank recorded an error (it was killed, or its node was lost)"
        first = errors[0]
        text = first["error"].splitlines()[0]
        return f"rank {first['rank']} on {first['node']} failed first in the last attempt: {text}"
