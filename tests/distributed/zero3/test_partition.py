"""The canary: parameters made from shards against those that DeepSpeed's own zero.Init makes from whole tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import Init
from torch import nn

from helpers.ranks import run_ranks
from helpers.training import DEEPSPEED_CONFIG
from lowrank_dist.distributed.partition import FlatPartition
from lowrank_dist.zero3.partition import (
    Partitioner,
    gathered,
    is_partitioned,
    local_shard,
    repeated_layers,
    stored_bytes,
    use_cpu_accelerator,
    whole_shape,
)

CASES = [((6, 5), torch.float32), ((7, 3), torch.bfloat16), ((11,), torch.uint8), ((2,), torch.float32)]


def attributes(parameter: Any) -> dict[str, Any]:
    """What DeepSpeed has hung on a parameter, as far as it can be compared."""
    plain = (int, bool, str, torch.Size, torch.dtype, type(None))
    names = [name for name in vars(parameter) if name.startswith(("ds_", "nvme")) or name == "is_external_param"]
    values = {name: getattr(parameter, name) for name in names if name != "ds_id"}
    described = {name: value if isinstance(value, plain) else type(value).__name__ for name, value in values.items()}
    shard = parameter.ds_tensor
    described["shard"] = (shard.dtype, tuple(shard.shape), shard.ds_numel, str(shard.status), shard.final_location)
    described["status"] = str(parameter.ds_status)
    described["itself"] = (tuple(parameter.shape), parameter.dtype, parameter.requires_grad)
    return described


def compare() -> list[tuple[dict[str, Any], dict[str, Any], bool, bool]]:
    use_cpu_accelerator()
    partitioner = Partitioner(DEEPSPEED_CONFIG)
    results = []
    for shape, dtype in CASES:
        whole = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
        theirs = nn.Parameter(whole.clone(), requires_grad=dtype == torch.float32)
        Init(config_dict_or_path=DEEPSPEED_CONFIG)._zero_init_param(theirs)
        flat = FlatPartition(numel=whole.numel(), world_size=partitioner.group.size)
        shard = whole.flatten()[slice(*flat.bounds(partitioner.group.rank))]
        ours = partitioner.parameter(shape, dtype, shard, requires_grad=dtype == torch.float32)
        # zero.Init leaves the padding of the last shard uninitialised; ours is zero
        same_shard = torch.equal(local_shard(ours)[: shard.numel()], local_shard(theirs)[: shard.numel()])
        with gathered([ours]):
            same_whole = torch.equal(ours.detach(), whole)
        results.append((attributes(ours), attributes(theirs), same_shard, same_whole))
        assert local_shard(ours)[shard.numel() :].abs().sum() == 0
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_parameters_are_what_zero_init_makes(world_size: int) -> None:
    for results in run_ranks(world_size, compare):
        for ours, theirs, same_shard, same_whole in results:
            assert ours == theirs
            assert same_shard
            assert same_whole


def make() -> dict[str, Any]:
    use_cpu_accelerator()
    partitioner = Partitioner(DEEPSPEED_CONFIG)
    made = [partitioner.parameter((3, i + 1), torch.float32, torch.empty(0)) for i in range(5)]
    return {
        "shapes": [tuple(whole_shape(p)) for p in made],
        "stored": stored_bytes(made),
        "partitioned": all(is_partitioned(p) for p in made),
    }


def test_parameters_are_made_of_shards() -> None:
    for result in run_ranks(2, make):
        assert result["partitioned"]
        assert result["shapes"] == [(3, i + 1) for i in range(5)]
        assert result["stored"] == sum(-(-3 * (i + 1) // 2) * 4 for i in range(5))


def test_a_shard_that_does_not_fit_is_refused() -> None:
    run_ranks(1, refuse)


def refuse() -> None:
    use_cpu_accelerator()
    partitioner = Partitioner(DEEPSPEED_CONFIG)
    for shard in (torch.zeros(7), torch.zeros(6, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="does not fit a partition of 6"):
            partitioner.parameter((2, 3), torch.float32, shard)


def test_repeated_layers_are_the_outermost_of_their_stacks() -> None:
    inner = nn.ModuleList([nn.Linear(1, 1)])
    layers = [nn.ModuleDict({"experts": inner}), nn.Linear(1, 1)]
    assert repeated_layers(nn.ModuleDict({"layers": nn.ModuleList(layers), "head": nn.Linear(1, 1)})) == layers
