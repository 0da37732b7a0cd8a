"""Formats of a residual: single rows of it, encoded or stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowrank_dist import FP4, FP8, INT8, MXFP4, NF4
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.quantization.dense import Dense

each_format = pytest.mark.parametrize(
    "fmt",
    [
        Dense(dtype=torch.float32),
        *(NF4(), NF4(block_size=128, double_quant=True), NF4(double_quant=True), FP4(), FP4(double_quant=True)),
        *(INT8(), FP8(), MXFP4()),
    ],
    ids=str,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [64, 128, 36, 100, 3, 65])
@each_format
def test_decoded_rows_are_rows_of_the_decoded_matrix(fmt: Any, columns: int, dtype: torch.dtype) -> None:
    """Bit for bit, also where rows begin inside quantization blocks, for the first and the last row."""
    partition = RowPartition(rows=301, columns=columns, world_size=1, block=fmt.block)
    weight = torch.randn(301, columns) * torch.rand(301, 1)
    stored = fmt.encode(weight, partition, ShardGroup.single()).shards
    whole = fmt.decode(stored, partition, dtype)
    for rows in (torch.tensor([0, 300, 17, 17, 150]), torch.arange(301), torch.tensor([], dtype=torch.int64)):
        assert torch.equal(fmt.decode_rows(stored, partition, rows, dtype), whole[rows])


@each_format
def test_encoded_rows_are_rows_of_the_decoded_matrix(fmt: Any) -> None:
    """Bit for bit, as a large matrix asks for them: some rows at a time."""
    partition = RowPartition(rows=301, columns=64, world_size=1, block=fmt.block)
    encoded = fmt.encode(torch.randn(301, 64), partition, ShardGroup.single())
    whole = fmt.decode(encoded.shards, partition, torch.float32)
    for rows in (slice(0, 100), slice(100, 300), slice(300, 301), slice(None)):
        assert torch.equal(encoded.rows(rows), whole[rows])
