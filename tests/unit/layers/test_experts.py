"""Factors of stacked experts in PEFT's layout, their conversion, and the decoding of single rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn

from lowrank_dist import NF4
from lowrank_dist.adapters.lora import to_lora
from lowrank_dist.adapters.stacking import put_factor
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatPartition, RowPartition
from lowrank_dist.quantization.dense import Dense

EXPERTS, OUT, IN, RANK = 3, 7, 5, 2


def wrapper(rank: int) -> ParamWrapper:
    base = nn.Module()
    base.stack = nn.Parameter(torch.zeros(EXPERTS, OUT, IN))
    config = LoraConfig(r=rank, lora_alpha=rank, target_parameters=["stack"])
    return ParamWrapper(base, "default", "stack", config, r=rank, lora_alpha=rank)


def delta(a: Tensor, b: Tensor, rank: int) -> Tensor:
    """What PEFT adds to the stack."""
    layer = wrapper(rank)
    layer.lora_A["default"].weight = nn.Parameter(a)
    layer.lora_B["default"].weight = nn.Parameter(b)
    return layer.get_delta_weight("default").detach()


def stacked(factors: list[Tensor], shape: tuple[int, int], world_size: int, interleaved: bool) -> Tensor:
    partition = FlatPartition(numel=shape[0] * shape[1], world_size=world_size)
    shards = []
    for rank in range(world_size):
        start, stop = partition.bounds(rank)
        shard = torch.full((stop - start,), torch.nan)
        for expert, factor in enumerate(factors):
            put_factor(shard, start, factor.flatten(), expert, EXPERTS, interleaved=interleaved)
        shards.append(shard)
    return torch.cat(shards).view(shape)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 50])
def test_shards_of_all_experts_are_pefts_factors(world_size: int) -> None:
    a = [torch.randn(RANK, IN) for _ in range(EXPERTS)]
    b = [torch.randn(OUT, RANK) for _ in range(EXPERTS)]
    whole_a = stacked(a, (EXPERTS * RANK, IN), world_size, interleaved=False)
    whole_b = stacked(b, (OUT, RANK * EXPERTS), world_size, interleaved=True)
    expected = torch.stack([b_e @ a_e for a_e, b_e in zip(a, b, strict=True)])
    torch.testing.assert_close(delta(whole_a, whole_b, RANK), expected)


def test_conversion_keeps_experts_apart() -> None:
    def random() -> tuple[Tensor, Tensor]:
        return torch.randn(EXPERTS * RANK, IN), torch.randn(OUT, RANK * EXPERTS)

    (a, b), (a0, b0) = random(), random()
    names = ("m.experts.lora_A.weight", "m.experts.lora_B.weight")
    adapter, initial = dict(zip(names, (a, b), strict=True)), dict(zip(names, (a0, b0), strict=True))
    converted = to_lora(adapter, initial, dict.fromkeys(names, EXPERTS))
    actual = delta(*(converted[name] for name in names), rank=2 * RANK)
    torch.testing.assert_close(actual, delta(a, b, RANK) - delta(a0, b0, RANK))
    naive = to_lora(adapter, initial)
    assert (delta(*(naive[name] for name in names), rank=2 * RANK) - actual).abs().max() > 0.1


def test_conversion_of_embeddings() -> None:
    shapes = {"e.lora_embedding_A": (2, 9), "e.lora_embedding_B": (4, 2)}
    adapter, initial = ({name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(2))
    a, b = to_lora(adapter, initial).values()
    products = [x["e.lora_embedding_B"] @ x["e.lora_embedding_A"] for x in (adapter, initial)]
    torch.testing.assert_close(b @ a, products[0] - products[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [64, 128, 36, 100, 3, 65])
@pytest.mark.parametrize(
    "fmt",
    [Dense(dtype=torch.float32), NF4(), NF4(block_size=128, double_quant=True), NF4(double_quant=True)],
    ids=str,
)
def test_decoded_rows_are_rows_of_the_decoded_matrix(fmt: Any, columns: int, dtype: torch.dtype) -> None:
    """Bit for bit, also where rows begin inside quantization blocks, for the first and the last row."""
    partition = RowPartition(rows=301, columns=columns, world_size=1, block=fmt.block)
    weight = torch.randn(301, columns) * torch.rand(301, 1)
    stored = fmt.encode(weight, partition, ShardGroup.single()).shards
    whole = fmt.decode(stored, partition, dtype)
    for rows in (torch.tensor([0, 300, 17, 17, 150]), torch.arange(301), torch.tensor([], dtype=torch.int64)):
        assert torch.equal(fmt.decode_rows(stored, partition, rows, dtype), whole[rows])
