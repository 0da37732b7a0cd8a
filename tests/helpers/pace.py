"""Steps that last long enough to be interrupted, and faults at a step of the first attempts."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback


class Pace(Callback):
    """Sleep before every step, unless SLURM has started the job again, and say in a file which is about to be done.

    Parameters
    ----------
    seconds
        To sleep.
    record
        File that rank 0 appends ``step`` lines to.
    """

    def __init__(self, seconds: float, record: str) -> None:
        super().__init__()
        self.seconds, self.record = 0 if os.environ.get("SLURM_RESTART_COUNT") else seconds, record

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            return  # in the middle of a step
        if trainer.is_global_zero:
            with Path(self.record).open("a") as file:
                file.write(f"{trainer.global_step}\n")
        time.sleep(self.seconds)


class FailAt(Callback):
    """At `step`, on the last rank, in the first `times` attempts: raise, die or hang.

    Parameters
    ----------
    marker
        File that counts the attempts that have failed.
    """

    def __init__(self, step: int, how: str, times: int, marker: str) -> None:
        super().__init__()
        self.step, self.how, self.times, self.marker = step, how, times, Path(marker)

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step != self.step or trainer.global_rank != trainer.world_size - 1:
            return
        failed = len(self.marker.read_text()) if self.marker.exists() else 0
        if failed >= self.times:
            return
        self.marker.write_text("x" * (failed + 1))
        if self.how == "raise":
            raise RuntimeError("a fault of this test")
        if self.how == "die":
            os.kill(os.getpid(), 9)
        time.sleep(3600)
