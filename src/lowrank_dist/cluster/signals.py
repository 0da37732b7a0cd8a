"""Signals that request a run to stop: the rank that receives one records it, all ranks act on it between two steps."""

from __future__ import annotations

import enum
import signal
import threading
from typing import Any, ClassVar


class Request(enum.IntEnum):
    """The request of a signal; the highest of several counts."""

    NONE = 0
    #: SIGTERM: save and stop. SLURM decides whether the job is requeued.
    STOP = 1
    #: SIGUSR2, sent before the time limit or preemption: save and requeue.
    REQUEUE = 2


class StopSignals:
    """Signal handlers that only set a flag, because a collective inside a handler would wait for ever."""

    REQUESTS: ClassVar[dict[signal.Signals, Request]] = {signal.SIGTERM: Request.STOP, signal.SIGUSR2: Request.REQUEUE}

    def __init__(self) -> None:
        self.request = Request.NONE
        self._before: dict[signal.Signals, Any] = {}
        self._kept = False

    def arm(self, *, training: bool = True, keep: bool = False) -> None:
        """Install the handlers; a repeated call also replaces handlers installed in the meantime.

        Parameters
        ----------
        training
            Whether steps end at which the run acts on a request. Otherwise SIGTERM gets the handler that it had before
            the first call (of a kept one the default, which ends the process): nobody would look at the request.
        keep
            Make `disarm` keep the handlers. A process of a single run needs this, because a signal after the run must
            not reach the previous handlers.
        """
        self._kept = self._kept or keep
        if threading.current_thread() is not threading.main_thread():
            return  # Python sets handlers in the main thread only
        for number in self.REQUESTS:
            before = signal.signal(number, self._remember)
            self._before.setdefault(number, before)
        if not training:
            before = signal.SIG_DFL if self._kept else self._before[signal.SIGTERM]
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

    def disarm(self) -> None:
        """Restore the handlers that were installed before the first `arm`, and reset the request."""
        self.request = Request.NONE
        if self._kept:
            return
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before = {}

    def ignore(self) -> None:
        """Ignore the signals until the process ends; Python would restore the fatal defaults during its shutdown."""
        if threading.current_thread() is threading.main_thread():
            for number in self.REQUESTS:
                signal.signal(number, signal.SIG_IGN)

    def _remember(self, number: int, frame: object) -> None:
        self.request = max(self.request, self.REQUESTS[signal.Signals(number)])


#: The signal handlers of this process. A job arms them before its heavy imports, the callback after Lightning's own.
SIGNALS = StopSignals()
