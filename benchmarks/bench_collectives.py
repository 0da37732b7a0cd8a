"""What an all-reduce costs between the products of two ranks on one host, one core each.

    python benchmarks/bench_collectives.py

With ``LOWRANK_DIST_LOW_LATENCY=1`` `lowrank_dist.distributed.group` waits awake for a collective on CPUs and keeps
gloo's threads from interrupting each other; by default it does neither, nor does ``torch.distributed``. All three in
turns, five times each; from the moment the last rank begins until the last has ended, in milliseconds.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from ranks import run_ranks

from lowrank_dist.distributed.group import LOW_LATENCY, ShardGroup

RANKS, REPEATS, ROUNDS = 2, 40, 5


WAYS = {"torch": None, "default": "0", "low latency": "1"}  # the environment variable, for a `ShardGroup`


def rounds(shape: tuple[int, int], way: str) -> list[tuple[float, float]]:
    """When each all-reduce began and ended here."""
    reduce: Callable[[torch.Tensor], object] = dist.all_reduce
    if (low_latency := WAYS[way]) is not None:
        os.environ[LOW_LATENCY] = low_latency
        reduce = ShardGroup().sum
    weight, tensor = torch.ones(2048, shape[1]), torch.zeros(shape)
    times = []
    for _ in range(REPEATS):
        for _ in range(4):
            tensor @ weight.mT
        started = time.monotonic()
        reduce(tensor)
        times.append((started, time.monotonic()))
    return times[REPEATS // 4 :]


def main() -> None:
    for shape in ((16, 64), (32, 4096), (32, 14336)):
        spent: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(ROUNDS):
            for way, found in spent.items():
                ranks = run_ranks(RANKS, rounds, shape, way)
                found += [
                    1e3 * (max(end for _, end in times) - max(start for start, _ in times))
                    for times in zip(*ranks, strict=True)
                ]
        line = "; ".join(
            f"{way} {statistics.median(found):.2f} (mean {statistics.mean(found):.2f})" for way, found in spent.items()
        )
        print(f"{shape[0]} x {shape[1]} fp32 ({4 * shape[0] * shape[1] / 1e6:.3f} MB): {line}")


if __name__ == "__main__":
    main()
