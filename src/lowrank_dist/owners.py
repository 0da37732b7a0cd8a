"""Whole tensors on one rank each: how shards that all ranks hold are brought together for writing.

Every tensor has an owner; the ranks own about equally many bytes. Shards travel to the owners in all-to-alls of bounded
size: a rank sends each of its shards once, and no rank ever holds more than its part of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from lowrank_dist.comm import ShardGroup

BATCH_BYTES = 2**24  # of a rank's own shards that travel at a time


def assign_owners(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """Which rank owns what: the largest first, each to the rank that owns least so far (the lowest of equal ones).

    At most 4/3 of an even distribution in bytes (R. L. Graham, "Bounds on multiprocessing timing anomalies", 1969).
    """
    owned = [0] * world_size
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = min(range(world_size), key=lambda rank: (owned[rank], rank))
        owners[name] = rank
        owned[rank] += sizes[name]
    return owners


def gather_to_owners(
    shards: Iterable[tuple[str, Tensor, int]],
    owner: Callable[[str], int],
    group: ShardGroup,
    *,
    batch_bytes: int = BATCH_BYTES,
) -> Iterator[tuple[str, Tensor]]:
    """Whole flat tensors on their owners. Collective: all ranks iterate to the end, over the same names.

    Parameters
    ----------
    shards
        Name, this rank's flat shard (equally long on every rank, padding included) and the elements of the whole.
    owner
        Gives the rank that wants a tensor, by name.
    group
        The ranks that hold the shards.
    batch_bytes
        A rank sends so many bytes at a time (a single larger shard alone): one all-to-all each.

    Yields
    ------
    name
        Of a tensor that this rank owns.
    whole
        Flat, on the CPU, a copy.
    """
    batch: list[tuple[str, Tensor, int]] = []
    size = 0
    for name, shard, numel in shards:
        nbytes = shard.numel() * shard.element_size()
        if batch and size + nbytes > batch_bytes:
            yield from _exchange(batch, owner, group)
            batch, size = [], 0
        batch.append((name, shard, numel))
        size += nbytes
    if batch:
        yield from _exchange(batch, owner, group)


def _exchange(
    batch: list[tuple[str, Tensor, int]], owner: Callable[[str], int], group: ShardGroup
) -> Iterator[tuple[str, Tensor]]:
    outgoing: list[list[Tensor]] = [[] for _ in range(group.size)]
    mine = []
    for name, shard, numel in batch:
        data = shard.detach().to(group.device).contiguous().view(torch.uint8)
        outgoing[owner(name)].append(data)
        if owner(name) == group.rank:
            mine.append((name, shard.dtype, numel, data.numel()))
    packed = torch.cat([part for parts in outgoing for part in parts])
    sizes = [sum(part.numel() for part in parts) for parts in outgoing]
    received = group.exchange_packed(packed, sizes, [sum(nbytes for *_, nbytes in mine)] * group.size)
    del packed
    start = 0
    for name, dtype, numel, nbytes in mine:
        whole = torch.empty(group.size, nbytes, dtype=torch.uint8)
        for row, part in zip(whole, received, strict=True):
            row.copy_(part[start : start + nbytes])
        yield name, whole.view(-1).view(dtype)[:numel]
        start += nbytes
