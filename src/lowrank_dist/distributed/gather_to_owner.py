"""Gathering of sharded tensors, each on one rank, for writing.

Every tensor has an owner; the ranks own about equally many bytes. All-to-alls send shards to the owners. A rank sends
each of its shards once, 16 MiB at a time, and receives only the tensors that it owns (P times as many bytes if it owns
them all).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup

BATCH_BYTES = 2**24  # bytes of a rank's own shards that are sent at a time


def assign_owners(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """Assign tensors to ranks, the largest first, each to the rank that owns the fewest bytes (the lowest of equals).

    No rank owns more than 4/3 of the best distribution in bytes (R. L. Graham, "Bounds on multiprocessing timing
    anomalies", 1969).
    """
    owned = [0] * world_size
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = min(range(world_size), key=lambda rank: (owned[rank], rank))
        owners[name] = rank
        owned[rank] += sizes[name]
    return owners


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """Copies of a rank's shards of some tensors, concatenated in the order of the ranks that own the tensors.

    Attributes
    ----------
    packed
        Flat uint8, on the CPU or the device of the group that sends them.
    lengths
        Number of bytes for each rank.
    owned
        Name, dtype, elements of the whole tensor and bytes of a shard, for the tensors that this rank owns.
    """

    packed: Tensor
    lengths: list[int]
    owned: list[tuple[str, torch.dtype, int, int]]


def pack_for_owners(
    shards: Iterable[tuple[str, Tensor, int]],
    owner: Callable[[str], int],
    group: ShardGroup,
    *,
    device: torch.device,
    batch_bytes: int = BATCH_BYTES,
) -> Iterator[Parcel]:
    """Copy shards into parcels that are ready to be sent. Communicates nothing.

    Parameters
    ----------
    shards
        Name, this rank's flat shard (equally long on every rank, padding included) and number of elements of the whole
        tensor.
    owner
        Returns the rank that owns a tensor, by name.
    group
        The ranks that hold the shards.
    device
        Device of the copies.
    batch_bytes
        Largest size of a parcel; a shard larger than this has its own.
    """
    batch: list[tuple[str, Tensor, int]] = []
    size = 0
    for name, shard, numel in shards:
        if batch and size + shard.nbytes > batch_bytes:
            yield _parcel(batch, owner, group, device)
            batch, size = [], 0
        batch.append((name, shard.detach(), numel))
        size += shard.nbytes
    if batch:
        yield _parcel(batch, owner, group, device)


def deliver(parcels: Iterable[Parcel], group: ShardGroup) -> Iterator[tuple[str, Tensor]]:
    """Send parcels and yield whole tensors on their owners. Collective.

    All ranks must iterate to the end, over parcels of the same tensors. One all-to-all per parcel, which is then freed.

    Yields
    ------
    name
        Name of a tensor that this rank owns.
    whole
        A flat copy on the CPU.
    """
    for parcel in parcels:
        received = group.exchange(
            parcel.packed, parcel.lengths, [sum(nbytes for *_, nbytes in parcel.owned)] * group.size
        )
        owned, start = parcel.owned, 0
        del parcel
        for name, dtype, numel, nbytes in owned:
            whole = torch.empty(group.size, nbytes, dtype=torch.uint8)
            for row, part in zip(whole, received, strict=True):
                row.copy_(part[start : start + nbytes])
            yield name, whole.view(-1).view(dtype)[:numel]
            start += nbytes
        received = []  # freed before the next exchange allocates as much


def gather_to_owners(
    shards: Iterable[tuple[str, Tensor, int]], owner: Callable[[str], int], group: ShardGroup
) -> Iterator[tuple[str, Tensor]]:
    """`pack_for_owners` and `deliver`, one parcel at a time. Collective."""
    return deliver(pack_for_owners(shards, owner, group, device=group.device), group)


def _parcel(
    batch: list[tuple[str, Tensor, int]], owner: Callable[[str], int], group: ShardGroup, device: torch.device
) -> Parcel:
    packed = torch.empty(sum(shard.nbytes for _, shard, _ in batch), dtype=torch.uint8, device=device)
    lengths, owned, start = [0] * group.size, [], 0
    for name, shard, numel in sorted(batch, key=lambda entry: owner(entry[0])):  # stable: one order on all ranks
        packed[start : start + shard.nbytes].copy_(shard.contiguous().view(torch.uint8))
        start += shard.nbytes
        lengths[owner(name)] += shard.nbytes
        if owner(name) == group.rank:
            owned.append((name, shard.dtype, numel, shard.nbytes))
    return Parcel(packed=packed, lengths=lengths, owned=owned)
