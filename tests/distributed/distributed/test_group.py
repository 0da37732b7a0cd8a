"""What ranks on CPUs do for short waits only where they are asked to: `lowrank_dist.distributed.group`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from helpers.ranks import run_ranks
from lowrank_dist.distributed.group import LOW_LATENCY, ShardGroup


def _policies() -> list[tuple[str, int]]:
    """Name and policy of every thread, those of the groups of a part of the ranks among them."""
    ShardGroup().split(2)
    tasks = Path("/proc/self/task").iterdir()
    return [((task / "comm").read_text().strip(), os.sched_getscheduler(int(task.name))) for task in tasks]


def _policies_before_and_after() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    before = _policies()
    with patch.dict(os.environ, {LOW_LATENCY: "1"}):
        return before, _policies()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are found in /proc")
def test_threads_of_gloo_change_their_class_where_asked() -> None:
    for before, after in run_ranks(4, _policies_before_and_after):
        assert any("gloo" in name for name, _ in before)
        assert all(policy == os.SCHED_OTHER for _, policy in before)
        assert all((policy == os.SCHED_BATCH) == ("gloo" in name) for name, policy in after)


def _sums_and_yields() -> tuple[list[float], list[int]]:
    """Sums of the ranks' numbers, and how often the core was offered meanwhile, by default and awake."""
    sums, yields = [], []
    for value in ("0", "1"):
        with patch.dict(os.environ, {LOW_LATENCY: value}), patch("os.sched_yield", wraps=os.sched_yield) as offered:
            group = ShardGroup()
            sums += [float(group.sum(torch.tensor([group.rank + 1.0]))) for _ in range(20)]
            yields.append(offered.call_count)
    return sums, yields


def test_ranks_wait_awake_where_asked() -> None:
    every = run_ranks(2, _sums_and_yields)
    assert [sums for sums, _ in every] == [[3.0] * 40] * 2
    assert [yields[0] for _, yields in every] == [0, 0]
    assert sum(yields[1] for _, yields in every) > 0
