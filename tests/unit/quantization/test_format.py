"""Formats of a residual: the decoding of single rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowrank_dist import NF4
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.quantization.dense import Dense


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
