"""The shard group: the P ranks that together hold every tensor once, and the few collectives that the walk needs.

P is not necessarily the world size, because the residual may be sharded within a node and replicated across nodes.
Every function that communicates therefore takes a `ShardGroup` and uses nothing else of the world.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_dist.errors import InputError, Report

LOW_LATENCY = "LOWRANK_DIST_LOW_LATENCY"
"""Environment variable: with ``1``, ranks on CPUs take more of their cores so that collectives end sooner.

A rank then waits awake for a collective (`ShardGroup`'s ``_run``), and the threads of gloo get another scheduling class
(`_let_gloo_take_turns`). Neither is done unless asked for; `benchmarks/bench_collectives.py` measures both ways.
"""

# Seconds for which a rank that waits awake asks again and again whether a collective has ended, before it sleeps:
# virtual cores are given back when idle, and ranks that wake up late are late at the next collective too.
_AWAKE = 0.1


class ShardGroup:
    """Ranks over which tensors are sharded.

    Parameters
    ----------
    process_group
        A ``torch.distributed`` group. None means the default group if one is initialised, else a group of one rank.
    device
        Device on which the small tensors of `raise_together` live (the device of the group's backend).

    Raises
    ------
    InputError
        Where the environment variable ``LOWRANK_DIST_LOW_LATENCY`` is neither 1 nor 0.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> None:
        self._group = process_group
        self._distributed = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank(process_group) if self._distributed else 0
        self.size: int = dist.get_world_size(process_group) if self._distributed else 1
        self.device = device or torch.device("cpu")
        self._parts: dict[int, ShardGroup] = {}
        self._waits_awake = _asks_for_low_latency()
        if self.size > 1 and self._waits_awake:
            _let_gloo_take_turns()

    @classmethod
    def single(cls) -> ShardGroup:
        """A group of this rank alone, also within a larger world; none of its methods communicate."""
        group = cls.__new__(cls)
        group._group, group._distributed, group.rank, group.size = None, False, 0, 1
        group.device, group._parts, group._waits_awake = torch.device("cpu"), {}, False
        return group

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The group of ``torch.distributed``, for DeepSpeed; a `single` group creates one of this rank."""
        if self._group is not None:
            return self._group
        if self._distributed:
            return dist.group.WORLD  # type: ignore[return-value]
        made: dist.ProcessGroup = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        return made

    def split(self, size: int) -> ShardGroup:
        """Return the group of `size` consecutive ranks that this rank belongs to; all of these ranks must call it.

        Raises
        ------
        ValueError
            If `size` does not divide the number of ranks of this group.
        """
        if size < 1 or self.size % size:
            raise ValueError(
                f"groups of {size} ranks do not divide the {self.size} ranks of the shard group; choose a divisor of "
                f"{self.size}"
            )
        if size == self.size:
            return self
        if size == 1:
            return ShardGroup.single()
        if size not in self._parts:
            first = self.rank // size * size
            members = [self._global(rank) for rank in range(first, first + size)]
            part = dist.new_group(members, use_local_synchronization=True)
            self._parts[size] = ShardGroup(part, self.device)
        return self._parts[size]

    def exchange(self, outgoing: Tensor, lengths: list[int], sizes: list[int]) -> list[Tensor]:
        """Send every rank its part of `outgoing` and receive a part from every rank. One all-to-all.

        Parameters
        ----------
        outgoing
            Flat uint8, the parts concatenated in rank order; it is not copied.
        lengths
            Number of bytes for every rank.
        sizes
            Number of bytes from every rank.

        Returns
        -------
        list of Tensor
            The received flat uint8 tensors, in rank order.
        """
        if self.size == 1:
            return [outgoing]
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=outgoing.device)
        self._run(dist.all_to_all_single, received, outgoing, sizes, lengths)
        return list(received.split(sizes))

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` (same shape on every rank) over the ranks, in place. One all-reduce."""
        if self.size > 1:
            self._run(dist.all_reduce, tensor)
        return tensor

    def sum_rows(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` ``[P * rows, n]`` over the ranks; return this rank's ``[rows, n]``. One reduce-scatter."""
        if self.size == 1:
            return tensor
        rows = tensor.new_empty(tensor.shape[0] // self.size, *tensor.shape[1:])
        self._run(dist.reduce_scatter_tensor, rows, tensor.contiguous())
        return rows

    def max(self, tensor: Tensor) -> Tensor:
        """Element-wise maximum of `tensor` over the ranks, in place. One all-reduce."""
        if self.size > 1:
            self._run(dist.all_reduce, tensor, op=dist.ReduceOp.MAX)
        return tensor

    def once(self, out: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """Run `compute` on rank 0 only and broadcast its result into `out` (its shape and dtype). One broadcast.

        Solving small problems on one rank keeps data-dependent decisions identical on all ranks, even if the LAPACKs of
        their hosts round differently.
        """
        if self.rank == 0:
            out.copy_(compute())
        if self.size > 1:
            self._run(dist.broadcast, out, src=self._global(0))
        return out

    def reduce_once(self, partial: Tensor, out: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum `partial` (same shape on every rank; overwritten) on rank 0, then call `once` with ``compute(partial)``.

        One reduce, one broadcast.
        """
        if self.size > 1:
            self._run(dist.reduce, partial, dst=self._global(0))
        return self.once(out, lambda: compute(partial))

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Overwrite `tensor` (same shape on every rank) with that of rank `source`, in place. One broadcast."""
        if self.size > 1:
            self._run(dist.broadcast, tensor, src=self._global(source))
        return tensor

    def gather_equal(self, tensor: Tensor) -> Tensor:
        """Concatenate `tensor` (same shape on every rank) along its first dimension, in rank order. One all-gather."""
        if self.size == 1:
            return tensor
        every = tensor.new_empty(self.size * tensor.shape[0], *tensor.shape[1:])
        self._run(dist.all_gather_into_tensor, every, tensor.contiguous())
        return every

    def start_gather(self, shard: Tensor) -> tuple[Tensor, dist.Work | None]:
        """Start one all-gather of `shard` (flat, same length on every rank) and return its result and its handle.

        The result, the shards in rank order, may be used after ``wait()`` of the handle, on devices by the stream that
        called it. On a single rank the result is `shard` itself, and there is no handle.
        """
        if self.size == 1:
            return shard, None
        every = shard.new_empty(self.size * len(shard))
        return every, dist.all_gather_into_tensor(every, shard, group=self._group, async_op=True)

    def start_sum_rows(self, tensor: Tensor) -> tuple[Tensor, dist.Work | None]:
        """Start one reduce-scatter of `tensor` ``[P, n]``, whose own row ``[n]`` it overwrites with the sum of all.

        It returns the row, which may be used after ``wait()`` of the handle, as that of `start_gather`, and the handle.
        On a single rank there is no handle.
        """
        mine = tensor[self.rank]
        if self.size == 1:
            return mine, None
        return mine, dist.reduce_scatter_tensor(mine, tensor.view(-1), group=self._group, async_op=True)

    def broadcast_object(self, value: object) -> object:
        """Return rank 0's `value` on every rank (pickled: trusted peers only). One object broadcast."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self._global(0), group=self._group, device=self.device)
        return box[0]

    def gather_objects(self, value: object) -> list[Any]:
        """Return all ranks' values, in rank order, on every rank (pickled: trusted peers only).

        One object all-gather.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank if any rank has an error, so that no rank waits in a collective for ever.

        All raise the same kind of error, so that they go the same way whoever handles it: if ranks have different ones,
        that of the first rank whose error may pass (which is not an `InputError`), else of the first. A rank with an
        error of this class raises its own; the others a `RemoteError` that is an instance of the class too. One
        all-reduce of a flag, and one object all-gather if the flag is set (pickled: trusted peers only).
        """
        if self.size > 1:
            flag = torch.tensor([0 if error is None else 1], dtype=torch.int32, device=self.device)
            if int(self.max(flag)) == 0:
                return
            mine = None if error is None else Report.of(error, rank=self.rank)
            reports: list[Report] = [report for report in self.gather_objects(mine) if report is not None]
            # Prefers the cause to a RemoteError that it has caused on a rank of a smaller group.
            first = min(reports, key=lambda report: (report.is_remote, report.is_input, report.rank))
            if error is None or mine is None or (mine.kind, mine.is_remote) != (first.kind, first.is_remote):
                raise first.error()
        if error is not None:
            raise error

    @contextmanager
    def shared_errors(self) -> Iterator[None]:
        """Raise an exception of any rank inside the context on all ranks at its end; nothing inside may communicate.

        Issues the collectives of `raise_together`.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.raise_together(error)

    def _run(self, collective: Callable[..., dist.Work], tensor: Tensor, *further: object, **options: object) -> None:
        """Run a collective to its end: with `LOW_LATENCY` on CPUs awake for a while, since who sleeps wakes up late.

        Gloo's threads and other processes get the core whenever they ask for it. On devices the stream waits, not the
        rank.
        """
        work = collective(tensor, *further, group=self._group, async_op=True, **options)
        if self._waits_awake and tensor.device.type == "cpu":
            until = time.monotonic() + _AWAKE
            while not work.is_completed() and time.monotonic() < until:
                os.sched_yield()
        work.wait()

    def _global(self, rank: int) -> int:
        return rank if self._group is None else dist.get_global_rank(self._group, rank)


def ignore_renamed() -> None:
    """Ignore what torch 2.13 says of names that it renamed, a line for every call.

    DeepSpeed 0.19 and Lightning 2.6 call them. So does this module: torch 2.6, the lowest supported release, knows no
    other names.
    """
    for name in ("torch.distributed.", r"isinstance\(treespec, LeafSpec\)"):
        warnings.filterwarnings("ignore", message=f"`{name}.*` is deprecated", category=FutureWarning)


@contextmanager
def groups_with_timeout(timeout: timedelta | None) -> Iterator[None]:
    """Give `timeout` to the process groups that other libraries make inside, which have torch's default otherwise.

    No communication. None: leave them as they are.
    """
    c10d = dist.distributed_c10d
    before = set(c10d._world.pg_map) if dist.is_initialized() else set()
    yield
    if timeout is not None and dist.is_initialized():
        for group in set(c10d._world.pg_map) - before:
            c10d._set_pg_timeout(timeout, group)


def _asks_for_low_latency() -> bool:
    value = os.environ.get(LOW_LATENCY, "0")
    if value not in ("0", "1"):
        raise InputError(f"{LOW_LATENCY}={value!r} must be 1, or 0, or not set")
    return value == "1"


def _let_gloo_take_turns() -> None:
    """Keep the threads of gloo from interrupting each other, and this rank, when they wake up (``SCHED_BATCH``).

    Where a rank has one core, gloo's event loop otherwise interrupts the thread that holds its lock and asks for that
    lock until the scheduler's next tick: one of five all-reduces then takes 3 to 4 ms longer. Nothing else changes:
    whoever waits for a collective gives up the core. Where the threads are not known or may not be changed they stay
    as they are.
    """
    if not sys.platform.startswith("linux"):
        return
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread that has ended, a sandbox
            if "gloo" in (task / "comm").read_text():
                os.sched_setscheduler(int(task.name), os.SCHED_BATCH, os.sched_param(0))
