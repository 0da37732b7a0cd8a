"""Shards to owners: every tensor whole on one rank, bytes evenly spread."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.ranks import run_ranks
from lowrank_dist.distributed.gather_to_owner import assign_owners, deliver, pack_for_owners
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatPartition

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.float64]


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 1000), max_size=30), st.integers(1, 8))
def test_ranks_own_about_equally_much(sizes: dict[str, int], ranks: int) -> None:
    """Longest processing time first: at most 4/3 of the optimum, which is at least the mean and the largest."""
    owners = assign_owners(sizes, ranks)
    assert owners.keys() == sizes.keys()
    loads = [sum(size for name, size in sizes.items() if owners[name] == rank) for rank in range(ranks)]
    largest = sorted(sizes.values(), reverse=True)
    optimum = max([sum(sizes.values()) / ranks, *largest[:1], sum(largest[ranks - 1 : ranks + 1])])
    assert max(loads) <= 4 / 3 * optimum + 1e-9
    assert owners == assign_owners(dict(reversed(sizes.items())), ranks)


def gather(batch_bytes: int) -> dict[str, torch.Tensor]:
    group, shards = ShardGroup(), []
    for index in range(9):
        whole = (torch.arange(5 * index) + 7 * index).to(DTYPES[index % 4])
        flat = FlatPartition(numel=whole.numel(), world_size=group.size)
        shard = whole.new_zeros(flat.shard_numel)
        mine = whole[slice(*flat.bounds(group.rank))]
        shard[: len(mine)] = mine
        shards.append((str(index), shard, whole.numel()))
    owner = lambda name: int(name) % group.size  # noqa: E731
    parcels = list(pack_for_owners(shards, owner, group, device=group.device, batch_bytes=batch_bytes))
    for _, shard, _ in shards:
        shard.zero_()  # parcels are copies
    return dict(deliver(parcels, group))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch_bytes", [1, 60, 10_000])
def test_every_tensor_arrives_whole(ranks: int, batch_bytes: int) -> None:
    results = run_ranks(ranks, gather, batch_bytes)
    for rank, found in enumerate(results):
        assert list(found) == [str(index) for index in range(9) if index % ranks == rank]
        for name, whole in found.items():
            index = int(name)
            assert torch.equal(whole, (torch.arange(5 * index) + 7 * index).to(DTYPES[index % 4]))
