"""The seed of a run, where an option names none."""

from __future__ import annotations

import os


def global_seed() -> int:
    """The seed that ``lightning.seed_everything`` was called with in this run, or 0.

    Lightning keeps it in ``PL_GLOBAL_SEED`` of the environment, also for the processes that it starts.
    """
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
