"""Shard arithmetic: every row once, whole blocks only, the same bytes whatever the world size."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lowrank_dist.distributed.partition import FlatPartition, RowPartition

sizes = st.integers(1, 700)
ranks = st.integers(1, 33)
blocks = st.sampled_from([1, 64, 128, 256])


@given(rows=sizes, columns=sizes, world_size=ranks, block=blocks)
def test_rows_are_covered_once_in_order(rows: int, columns: int, world_size: int, block: int) -> None:
    partition = RowPartition(rows=rows, columns=columns, world_size=world_size, block=block)
    bounds = [partition.bounds(rank) for rank in range(world_size)]
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(rows))


@given(rows=sizes, columns=sizes, world_size=ranks, block=blocks)
def test_ranks_hold_whole_blocks(rows: int, columns: int, world_size: int, block: int) -> None:
    partition = RowPartition(rows=rows, columns=columns, world_size=world_size, block=block)
    assert partition.rows_per_rank * columns % block == 0
    assert partition.padded_rows * columns == partition.blocks_per_rank * block * world_size
    bounds = [partition.block_bounds(rank) for rank in range(world_size)]
    assert [index for start, stop in bounds for index in range(start, stop)] == list(range(partition.blocks))


@given(rows=sizes, columns=sizes, world_size=ranks, block=blocks)
def test_padding_is_less_than_one_quantum_of_rows_per_rank(
    rows: int, columns: int, world_size: int, block: int
) -> None:
    partition = RowPartition(rows=rows, columns=columns, world_size=world_size, block=block)
    smaller = partition.rows_per_rank - block  # block rows always hold whole blocks
    assert smaller * world_size < rows


@given(numel=st.integers(1, 10_000), world_size=ranks)
def test_flat_shards_cover_the_tensor_once(numel: int, world_size: int) -> None:
    partition = FlatPartition(numel=numel, world_size=world_size)
    bounds = [partition.bounds(rank) for rank in range(world_size)]
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(numel))
    assert all(stop - start <= partition.shard_numel for start, stop in bounds)


def test_the_rows_of_llama_on_24_gpus() -> None:
    # 8192 rows of 8192: 342 rows each, the last ranks padded
    partition = RowPartition(rows=8192, columns=8192, world_size=24, block=64)
    assert (partition.rows_per_rank, partition.padded_rows) == (342, 8208)
