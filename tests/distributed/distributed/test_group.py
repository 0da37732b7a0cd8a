"""Threads of gloo take turns: `lowrank_dist.distributed.group`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from helpers.ranks import run_ranks
from lowrank_dist.distributed.group import ShardGroup


def _policies() -> list[tuple[str, int]]:
    """Name and policy of every thread, those of the groups of a part of the ranks among them."""
    ShardGroup().split(2)
    tasks = Path("/proc/self/task").iterdir()
    return [((task / "comm").read_text().strip(), os.sched_getscheduler(int(task.name))) for task in tasks]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are found in /proc")
def test_threads_of_gloo_do_not_interrupt() -> None:
    for threads in run_ranks(4, _policies):
        assert any("gloo" in name for name, _ in threads)
        assert all((policy == os.SCHED_BATCH) == ("gloo" in name) for name, policy in threads)
