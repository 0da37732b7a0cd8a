"""Decoding of several matrices at once: the bits of decoding each, and the bytes that it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.ranks import run_ranks
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.quantization import FP4, FP8, INT8, MXFP4, NF4, Dense
from lowrank_dist.quantization.stacks import DECODED_BYTES, decode_stack, decoding_bytes, experts_at_a_time

FORMATS = [
    *(NF4(), NF4(block_size=128), NF4(double_quant=True), FP4(double_quant=True), INT8(), FP8(), MXFP4()),
    *(Dense(dtype=torch.bfloat16), Dense(dtype=torch.float32)),
]


@dataclass(frozen=True)
class OneByOne:
    """A format that knows nothing of stacks."""

    inner: Any

    def decode(self, *args: Any) -> Tensor:
        return self.inner.decode(*args)


def gathered(residual: Any, partition: RowPartition, count: int, group: ShardGroup) -> dict[str, Tensor]:
    """Of every matrix the storages of all ranks, ``[count, numel]``."""
    torch.manual_seed(0)
    stored: dict[str, list[Tensor]] = {}
    for _ in range(count):
        matrix = torch.randn(partition.rows, partition.columns)
        mine = matrix[slice(*partition.bounds(group.rank))]
        for name, shard in residual.encode(mine, partition, group).shards.items():
            whole = group.gather_equal(shard) if group.size > 1 else shard
            stored.setdefault(name, []).append(whole.flatten())
    return {name: torch.stack(tensors) for name, tensors in stored.items()}


def check(residual: Any, rows: int, columns: int, count: int, dtype: torch.dtype, group: ShardGroup) -> None:
    partition = RowPartition(rows=rows, columns=columns, world_size=group.size, block=residual.block)
    stored = gathered(residual, partition, count, group)
    expected = torch.stack(
        [residual.decode({n: t[i] for n, t in stored.items()}, partition, dtype) for i in range(count)]
    )
    for one in (residual, OneByOne(residual)):
        found = decode_stack(one, stored, partition, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, expected)
    held = decode_stack(residual, stored, partition, dtype).untyped_storage().nbytes()
    encoded = sum(tensor.nbytes for tensor in stored.values())
    taken = encoded if held == encoded and isinstance(residual, Dense) else held + encoded
    assert taken <= decoding_bytes(residual, partition, count, dtype) or isinstance(residual, Dense)


@pytest.mark.parametrize("residual", FORMATS, ids=str)
@given(
    rows=st.integers(1, 40),
    columns=st.sampled_from([8, 24, 36, 64, 128, 192]),
    count=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=15, deadline=None)
def test_bits_are_those_of_one_matrix(residual: Any, rows: int, columns: int, count: int, dtype: torch.dtype) -> None:
    check(residual, rows, columns, count, dtype, ShardGroup.single())


def check_all() -> None:
    for residual in FORMATS:
        for rows, columns in ((17, 36), (5, 64), (600, 40)):  # the last has more than 256 blocks
            check(residual, rows, columns, 3, torch.bfloat16, ShardGroup())


@pytest.mark.parametrize("ranks", [2, 3])
def test_bits_are_those_of_one_matrix_on_ranks(ranks: int) -> None:
    run_ranks(ranks, check_all)


def test_how_many_at_a_time() -> None:
    large = RowPartition(rows=4096, columns=7168, world_size=8)  # DeepSeek-V3's gate and up projections
    assert experts_at_a_time(None, 256, large, torch.bfloat16) == 9
    assert 9 * 4096 * 7168 * 2 <= DECODED_BYTES < 10 * 4096 * 7168 * 2
    assert experts_at_a_time(None, 4, large, torch.bfloat16) == 4
    assert experts_at_a_time(20, 256, large, torch.bfloat16) == 20
    assert experts_at_a_time(300, 256, large, torch.bfloat16) == 256
    huge = RowPartition(rows=2**16, columns=2**16, world_size=8)
    assert experts_at_a_time(None, 8, huge, torch.float32) == 1
