"""What an all-reduce costs between the products of two ranks on one host, one core each.

    python benchmarks/bench_collectives.py

`lowrank_dist.distributed.group` waits awake for a collective on CPUs and keeps gloo's threads from interrupting each
other; ``torch.distributed`` by itself does neither. Both in turns, five times each; from the moment the last rank
begins until the last has ended, in milliseconds.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist
from ranks import run_ranks

from lowrank_dist.distributed.group import ShardGroup

RANKS, REPEATS, ROUNDS = 2, 40, 5


def rounds(shape: tuple[int, int], ours: bool) -> list[tuple[float, float]]:
    """When each all-reduce began and ended here."""
    reduce = ShardGroup().sum if ours else dist.all_reduce
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
        spent: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(ROUNDS):
            for ours, found in spent.items():
                ranks = run_ranks(RANKS, rounds, shape, ours)
                found += [
                    1e3 * (max(end for _, end in times) - max(start for start, _ in times))
                    for times in zip(*ranks, strict=True)
                ]
        line = "; ".join(
            f"{'ours' if ours else 'torch'} {statistics.median(found):.2f} (mean {statistics.mean(found):.2f})"
            for ours, found in spent.items()
        )
        ratio = statistics.mean(spent[True]) / statistics.mean(spent[False])
        print(f"{shape[0]} x {shape[1]} fp32 ({4 * shape[0] * shape[1] / 1e6:.3f} MB): {line}; ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
