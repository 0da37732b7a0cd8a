"""Flat tensors cut anew for other ranks: every element arrives once, in its place, and nothing else does."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from helpers.ranks import run_ranks
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatPartition, FlatStorage
from lowrank_dist.distributed.reshard import redistribute

DTYPES = {"codes": torch.uint8, "scales": torch.float32, "factor": torch.bfloat16}
# elements of the items' tensors: fewer than ranks, none by blocks of 64 bytes, more than one item for a group of ranks
ITEMS = [(1, 3, 2), (700, 23, 64), (64, 1, 331), (5, 129, 4), (1000, 1000, 1000)]


def whole(item: int, name: str) -> Tensor:
    numel = ITEMS[item][list(DTYPES).index(name)]
    return (torch.arange(numel) * 7 + item).remainder(251).to(DTYPES[name])


def shard(tensor: Tensor, ranks: int, rank: int) -> Tensor:
    partition = FlatPartition(numel=len(tensor), world_size=ranks)
    start, stop = partition.bounds(rank)
    return torch.nn.functional.pad(tensor[start:stop], (0, partition.shard_numel - (stop - start)))


def storage(tensor: Tensor, ranks: int) -> FlatStorage:
    partition = FlatPartition(numel=len(tensor), world_size=ranks)
    return FlatStorage(numel=partition.numel, shard_numel=partition.shard_numel, dtype=tensor.dtype)


def _every_way() -> None:
    group = ShardGroup()
    divisors = [size for size in range(1, group.size + 1) if group.size % size == 0]
    for group_size, kept_by in itertools.product(divisors, [None, *divisors]):
        kept = kept_by or group.size
        mine = range(group.rank // group_size, len(ITEMS), group.size // group_size)
        shards = [
            {name: shard(whole(item, name), group_size, group.rank % group_size) for name in DTYPES} for item in mine
        ]
        layouts = [
            {name: (storage(whole(item, name), group_size), storage(whole(item, name), kept)) for name in DTYPES}
            for item in range(len(ITEMS))
        ]
        cut = redistribute(shards, layouts, group_size, group, kept_by=kept_by)
        for of_rank in shards:  # what came out does not lie in what went in
            for tensor in of_rank.values():
                tensor.zero_()
        assert len(cut) == len(ITEMS)
        for item, found in enumerate(cut):
            assert found.keys() == DTYPES.keys()
            for name, tensor in found.items():
                wanted = shard(whole(item, name), kept, group.rank % kept)
                assert tensor.dtype == wanted.dtype
                assert torch.equal(tensor, wanted), (group.size, group_size, kept_by, item, name)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_element_arrives_in_its_place(world_size: int) -> None:
    run_ranks(world_size, _every_way)
