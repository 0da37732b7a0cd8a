"""Processes that die and disks that fill up, at a chosen moment of a save."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

#: What a save does to the disk, and where its remains are removed.
OPERATIONS = ((os, "pwrite"), (os, "fdatasync"), (os, "fsync"), (os, "rename"), (shutil, "rmtree"))


def kill_at(call: int, victims: Sequence[int], trigger: int) -> None:
    """Make rank `trigger`, before its `call`-th operation on the disk, kill -9 the ranks `victims`. Collective."""
    pids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    if dist.get_rank() != trigger:
        return
    left = iter(range(call))

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            if next(left, None) is None:
                for rank in sorted(victims, key=lambda rank: rank == trigger):  # itself last
                    os.kill(pids[rank], signal.SIGKILL)
            return real(*args, **kwargs)

        return operation

    for module, name in OPERATIONS:
        setattr(module, name, counted(getattr(module, name)))


def kill_after_commits(commits: int) -> None:
    """Make every rank kill -9 itself once the journal of a residual model holds `commits` flushes, one per matrix."""
    import lowrank_dist.residual_model.writer as module

    commit, done = module.ResidualModelWriter.commit, 0

    def counted(writer: module.ResidualModelWriter) -> None:
        nonlocal done
        commit(writer)
        done += 1
        dist.barrier()
        if done == commits:
            os.kill(os.getpid(), signal.SIGKILL)

    module.FLUSH_BYTES = 1
    module.ResidualModelWriter.commit = counted  # type: ignore[method-assign]


def full_disk_at(part_of_path: str) -> None:
    """Make this rank's writes to files with `part_of_path` in their path end as on a full disk."""
    full, real = os.open("/dev/full", os.O_WRONLY), os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        if part_of_path in os.readlink(f"/proc/self/fd/{descriptor}"):
            return real(full, data, 0)
        return real(descriptor, data, offset)

    os.pwrite = pwrite


def little_room_at(part_of_path: str) -> None:
    """Make the file system say that 1 kB is free, where asked about a directory with `part_of_path` in its path."""
    real = shutil.disk_usage

    def disk_usage(path: Any) -> Any:
        usage = real(path)
        return usage._replace(free=1000) if part_of_path in str(path) else usage

    shutil.disk_usage = disk_usage


def failing_disk_at(part_of_path: str, number: int) -> None:
    """Make this rank's writes to files with `part_of_path` in their path end with the error `number`."""
    real = os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        if part_of_path in (path := os.readlink(f"/proc/self/fd/{descriptor}")):
            raise OSError(number, os.strerror(number), path)
        return real(descriptor, data, offset)

    os.pwrite = pwrite
