"""Time, memory, bytes on the network and flops of a part of a program."""

from __future__ import annotations

import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lowrank_dist.distributed.group import ShardGroup

MB = 1e6


def seconds_of(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def repeat(
    run: Callable[[Any], object],
    *,
    repeats: int,
    budget: float,
    first: float = 0.0,
    prepare: Callable[[], Any] = lambda: None,
    group: ShardGroup | None = None,
) -> list[float]:
    """Seconds of ``run(prepare())``, without `prepare`, on the slowest rank; as often as fits `repeats` and `budget`.

    Where the warm-up, which took `first`, has used up the budget (in seconds), it is the only measurement.
    """
    group = group or ShardGroup.single()
    slowest = float(group.max(torch.tensor(first, dtype=torch.float64)))
    if slowest > budget:
        return [slowest]
    times: list[float] = []
    while len(times) < repeats and (not times or sum(times) + times[-1] < budget):
        subject = prepare()
        group.raise_together(None)  # all begin together
        elapsed = seconds_of(lambda s=subject: run(s))  # type: ignore[misc]
        times.append(float(group.max(torch.tensor(elapsed, dtype=torch.float64))))
        del subject
    return times


def fastest(run: Callable[[], object], repeats: int = 4) -> float:
    """Shortest of some runs, in seconds, after one to warm up."""
    run()
    return min(seconds_of(run) for _ in range(repeats))


def shown(times: Sequence[float]) -> str:
    """Minimum / median of some seconds."""
    digits = 3 if min(times) < 1 else 2 if min(times) < 10 else 1
    return f"{min(times):.{digits}f} / {statistics.median(times):.{digits}f}"


class PeakMemory:
    """Peak resident memory of this process in the block above that at its start, sampled every 2 ms.

    Attributes
    ----------
    private
        MB of memory that no file backs.
    resident
        MB with the pages of mapped files: of a checkpoint that is read, the kernel may drop them at any time.
    """

    def __enter__(self) -> PeakMemory:
        self._stop = threading.Event()
        self._base = self._peak = _resident()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def restart(self) -> None:
        """Forget the peak so far; the base stays."""
        self._peak = _resident()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.private, self.resident = ((p - b) / MB for p, b in zip(self._peak, self._base, strict=True))

    def _sample(self) -> None:
        while True:
            private, resident = _resident()
            self._peak = max(self._peak[0], private), max(self._peak[1], resident)
            if self._stop.wait(0.002):
                return


def free_heap() -> None:
    """Give memory that was freed back to the kernel, where the C library is glibc: new allocations then count."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident() -> tuple[int, int]:
    """Bytes of private and of all resident memory of this process."""
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile", "RssShmem"):
            fields[name] = 1024 * int(value.split()[0])
    return fields["RssAnon"] + fields["RssShmem"], sum(fields.values())


class Traffic:
    """Bytes that this rank sends in the block, as the bandwidth-optimal algorithm of each collective would."""

    def __enter__(self) -> Traffic:
        self.sent = 0.0
        counted = {
            "all_reduce": lambda p, tensor, *_, **__: 2 * tensor.nbytes * (p - 1) / p,
            "reduce": lambda p, tensor, *_, **__: tensor.nbytes * (p - 1) / p,
            "broadcast": lambda p, tensor, *_, **__: tensor.nbytes * (p - 1) / p,
            "all_gather": lambda p, parts, tensor, *_, **__: tensor.nbytes * (p - 1),
            "all_gather_into_tensor": lambda p, out, tensor, *_, **__: tensor.nbytes * (p - 1),
            "reduce_scatter_tensor": lambda p, out, tensor, *_, **__: tensor.nbytes * (p - 1) / p,
            "all_to_all_single": lambda p, out, tensor, *_, **__: tensor.nbytes * (p - 1) / p,
        }
        self._patches = [mock.patch.object(dist, name, self._counting(name, size)) for name, size in counted.items()]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _counting(self, name: str, sent: Callable[..., float]) -> Callable[..., Any]:
        original = getattr(dist, name)

        def collective(*args: Any, **kwargs: Any) -> Any:
            self.sent += sent(dist.get_world_size(kwargs.get("group")), *args)
            return original(*args, **kwargs)

        return collective


class Flops(FlopCounterMode):
    """Counts the flops of matrix products in the block (`total`); factorizations are not products."""

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops})  # not known to torch

    @property
    def total(self) -> int:
        return self.get_total_flops()


def _addmm_flops(_: Sequence[int], left: Sequence[int], right: Sequence[int], **__: object) -> int:
    """Of ``tensor.addmm_(left, right)``, from the shapes."""
    return 2 * left[0] * left[1] * right[1]


def residual_norm(rows: Callable[[int, int], Tensor], left: Tensor, right: Tensor, scaling: float = 1.0) -> float:
    """``||W - scaling * left @ right||_F`` in fp64; ``rows(start, stop)`` gives rows of W."""
    squares, right = 0.0, right.double()
    for start in range(0, len(left), 1024):
        part = left[start : start + 1024].double()
        squares += float((rows(start, start + len(part)).double() - scaling * part @ right).square().sum())
    return squares**0.5
