"""Whole tensors on one rank each: how shards that all ranks hold are brought together for writing.

Every tensor has an owner; the ranks own about equally many bytes. Shards travel to the owners in all-to-alls: a rank
sends each of its shards once, 16 MiB at a time, and receives only what it owns (P times as much where it owns all).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup

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


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """A rank's shards of some tensors, copied, end to end in the order of the ranks that own the tensors.

    Attributes
    ----------
    packed
        Bytes; CPU, or the device of the group that is to carry them.
    lengths
        Of what goes to each rank, bytes.
    owned
        Name, dtype, elements of the whole and bytes of a shard: of the tensors that this rank owns.
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
    """Copies of shards, ready to be sent. Communicates nothing.

    Parameters
    ----------
    shards
        Name, this rank's flat shard (equally long on every rank, padding included) and the elements of the whole.
    owner
        Gives the rank that wants a tensor, by name.
    group
        The ranks that hold the shards.
    device
        Where the copies are kept.
    batch_bytes
        Of a parcel (a single larger shard alone).
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
    """Whole flat tensors on their owners. Collective: all ranks iterate to the end, over parcels of the same tensors.

    One all-to-all per parcel, which is then let go of.

    Yields
    ------
    name
        Of a tensor that this rank owns.
    whole
        Flat, on the CPU, a copy.
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
        received = []  # before the next of its size


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
    for name, shard, numel in sorted(batch, key=lambda entry: owner(entry[0])):  # stable
        packed[start : start + shard.nbytes].copy_(shard.contiguous().view(torch.uint8))
        start += shard.nbytes
        lengths[owner(name)] += shard.nbytes
        if owner(name) == group.rank:
            owned.append((name, shard.dtype, numel, shard.nbytes))
    return Parcel(packed=packed, lengths=lengths, owned=owned)
