"""Stacked factors filled on ranks: the shards of the whole, whatever the number of ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.ranks import run_ranks
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatPartition
from lowrank_dist.model.stacking import StackedFactors, join_a, join_b

EXPERTS, OUT, IN, RANK = 3, 7, 5, 2


def experts() -> dict[str, Tensor]:
    return {
        "lora_A": torch.arange(float(EXPERTS * RANK * IN)).view(EXPERTS, RANK, IN),
        "lora_B": torch.arange(float(EXPERTS * OUT * RANK)).view(EXPERTS, OUT, RANK),
    }


def filled(padded: bool) -> dict[str, Tensor]:
    group = ShardGroup()
    shapes = {"lora_A": (RANK, IN), "lora_B": (OUT, RANK)}
    stack = StackedFactors(shapes, EXPERTS, group, torch.float32)
    for expert in (2, 0, 1):
        shards = {}
        for factor, each in experts().items():
            one = FlatPartition(numel=each[expert].numel(), world_size=group.size)
            shards[factor] = each[expert].flatten()[slice(*one.bounds(group.rank))]
            if padded:
                shards[factor] = torch.cat([shards[factor], torch.zeros(one.shard_numel - len(shards[factor]))])
        stack.put(expert, shards)
    return stack.shards


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_shards_are_those_of_the_whole(world_size: int) -> None:
    """No rank count divides ``7 * 2 * 3`` and ``2 * 5 * 3`` alike: shards are of unequal length, or end in padding."""
    whole = {"lora_A": join_a(experts()["lora_A"]), "lora_B": join_b(experts()["lora_B"])}
    for padded in (False, True):
        parts = run_ranks(world_size, filled, padded)
        for factor, expected in whole.items():
            assert torch.equal(torch.cat([part[factor] for part in parts]), expected.flatten())
