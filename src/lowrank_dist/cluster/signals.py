"""Signals that ask a run to stop: remembered by the rank that gets them, acted upon by all ranks between two steps."""

from __future__ import annotations

import enum
import signal
import threading
from typing import Any, ClassVar


class Request(enum.IntEnum):
    """What a signal asks for; of several the highest counts."""

    NONE = 0
    #: SIGTERM: save. SLURM decides whether the job comes back.
    STOP = 1
    #: SIGUSR2, sent ahead of the time limit or of preemption: save and requeue.
    REQUEUE = 2


class StopSignals:
    """Handlers that set a flag and do nothing else: a collective inside a handler would wait for ever."""

    REQUESTS: ClassVar[dict[signal.Signals, Request]] = {signal.SIGTERM: Request.STOP, signal.SIGUSR2: Request.REQUEUE}

    def __init__(self) -> None:
        self.request = Request.NONE
        self._before: dict[signal.Signals, Any] = {}
        self._kept = False

    def arm(self, *, keep: bool = False) -> None:
        """Take the signals over, also from those who have taken them over since.

        Parameters
        ----------
        keep
            `disarm` gives nothing back: the process is there for one run, and a signal that comes after it must not
            reach the handlers from before.
        """
        self._kept = self._kept or keep
        if threading.current_thread() is not threading.main_thread():
            return  # Python sets handlers in the main thread only
        for number in self.REQUESTS:
            before = signal.signal(number, self._remember)
            self._before.setdefault(number, before)

    def disarm(self) -> None:
        """Give the signals back to those who had them first, and forget what was asked for."""
        self.request = Request.NONE
        if self._kept:
            return
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before = {}

    def ignore(self) -> None:
        """Let the process come to its end whatever is sent; Python itself would put the fatal defaults back before."""
        if threading.current_thread() is threading.main_thread():
            for number in self.REQUESTS:
                signal.signal(number, signal.SIG_IGN)

    def _remember(self, number: int, frame: object) -> None:
        self.request = max(self.request, self.REQUESTS[signal.Signals(number)])


#: The signals of this process. A job arms them before its heavy imports, the callback once Lightning has set its own.
SIGNALS = StopSignals()
