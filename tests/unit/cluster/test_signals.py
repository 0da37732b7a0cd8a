"""Signals that stop a run between two steps: remembered, and given back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from lowrank_dist.cluster.signals import Request, StopSignals


def test_signals_are_remembered_and_given_back() -> None:
    before = signal.getsignal(signal.SIGUSR2)
    signals = StopSignals()
    signals.arm()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.request is Request.STOP
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.request is Request.REQUEUE
    finally:
        signals.disarm()
    assert signals.request is Request.NONE
    assert signal.getsignal(signal.SIGUSR2) == before


def test_a_process_that_is_there_for_one_run_keeps_them_to_its_end() -> None:
    program = (
        "import os; from lowrank_dist.cluster.signals import SIGNALS as s; s.arm(keep=True); s.arm(); s.disarm(); {} "
    )
    program += "os.kill(os.getpid(), 12); os.kill(os.getpid(), 15); print(s.request.name)"
    for ended, request in (("", "REQUEUE"), ("s.ignore();", "NONE")):
        done = subprocess.run([sys.executable, "-c", program.format(ended)], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == request


def test_sigterm_outside_of_training_ends_the_process() -> None:
    """Of a run of its own at once; in a program with a handler that is called."""
    start = "import os, signal; from lowrank_dist.cluster.signals import SIGNALS as s; "
    kept = "s.arm(training=False, keep=True); os.kill(os.getpid(), 15); print('left')"
    done = subprocess.run([sys.executable, "-c", start + kept], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")
    own = "signal.signal(15, lambda *_: print('own')); s.arm(training=False); os.kill(os.getpid(), 15); "
    own += "s.arm(); os.kill(os.getpid(), 15); print(s.request.name)"
    done = subprocess.run([sys.executable, "-c", start + own], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["own", "STOP"]
