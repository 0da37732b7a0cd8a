"""Errors that travel, and what ranks do for short waits where they are asked: `lowrank_dist.distributed.group`."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from helpers.ranks import alone, run_ranks
from lowrank_dist.distributed.group import LOW_LATENCY, ShardGroup
from lowrank_dist.errors import CheckpointError, InputError, own_class


def _policies() -> list[tuple[str, int]]:
    """Name and policy of every thread, those of the groups of a part of the ranks among them."""
    ShardGroup().split(2).sum(torch.zeros(1))  # its threads have begun, and given themselves their names
    ShardGroup()
    tasks = Path("/proc/self/task").iterdir()
    return [((task / "comm").read_text().strip(), os.sched_getscheduler(int(task.name))) for task in tasks]


@alone  # torch names the groups of a part by how many groups there are, which others have changed in a pooled rank
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


class _Odd(OSError):
    """Its arguments are not those of its base."""

    def __init__(self, path: str, *, code: int) -> None:
        super().__init__(code, "odd", path)


def _raised(*errors: Exception | None, parts: int = 1) -> tuple[str, str, int | None, str]:
    """What `raise_together` raises on this rank if the ranks have these errors: class, text, errno, cause."""
    group = ShardGroup()
    try:
        with group.shared_errors() if parts > 1 else nullcontext(), group.split(group.size // parts).shared_errors():
            if errors[group.rank] is not None:
                raise errors[group.rank]
    except Exception as error:
        return own_class(error).__name__, str(error), getattr(error, "errno", None), str(error.__cause__)
    raise RuntimeError("nothing was raised")


@alone  # as above
def _all_raised() -> dict[str, tuple[str, str, int | None, str]]:
    class Local(CheckpointError):
        """No other process can import it."""

    return {
        "disk": _raised(None, OSError(errno.EIO, "Input/output error", "w.bin"), None, None),
        "odd": _raised(None, None, None, _Odd("w.bin", code=errno.ESTALE)),
        "local": _raised(Local("damaged"), None, None, None),
        "passing first": _raised(CheckpointError("damaged"), RuntimeError("for a while"), None, None),
        "both their own": _raised(None, InputError("mine"), InputError("mine too"), None),
        "in a part": _raised(None, None, OSError(errno.EIO, "Input/output error"), None, parts=2),
    }


def test_an_error_is_of_one_class_on_all_ranks() -> None:
    every = run_ranks(4, _all_raised)
    kinds = {case: {found[case][0] for found in every} for case in every[0]}
    assert kinds == {
        "disk": {"OSError"},
        "odd": {"_Odd"},
        "local": {"Local", "CheckpointError"},  # the nearest class that the others know
        "passing first": {"RuntimeError"},
        "both their own": {"InputError"},
        "in a part": {"OSError"},
    }
    for rank, found in enumerate(every):
        _, text, number, cause = found["disk"]
        assert number == errno.EIO
        assert text == ("" if rank == 1 else "rank 1: OSError: ") + "[Errno 5] Input/output error: 'w.bin'"
        assert rank == 1 or "in _raised" in cause
        assert found["odd"][2] == errno.ESTALE
        assert found["both their own"][1] == {2: "mine too", 1: "mine"}.get(rank, "rank 1: InputError: mine")
        # the part's own rank number is 0; the others hear it from the whole group
        assert ("rank 2: OSError" in found["in a part"][1]) == (rank != 2)
