"""Shard arithmetic: which rows, elements and blocks of a tensor belong to which rank.

A ZeRO-3 partition is a contiguous ``1/P`` of the flattened tensor. If the number of rows of a row-major matrix is
padded to a multiple of ``P``, its partition is a block of whole rows. `RowPartition` describes it and is the only place
that knows about padding. Tensors that are not decomposed are sharded at multiples of ``ceil(numel / P)`` elements, by
`FlatPartition`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class FlatPartition:
    """Contiguous, equal shards of a flattened tensor, the last one zero-padded (DeepSpeed's own ZeRO-3 rule).

    Parameters
    ----------
    numel
        Number of elements of the whole tensor.
    world_size
        Number of ranks of the shard group, P.
    """

    numel: int
    world_size: int

    @property
    def shard_numel(self) -> int:
        """Number of elements on each rank, padding included: ``ceil(numel / P)``."""
        return -(-self.numel // self.world_size)

    def bounds(self, rank: int) -> tuple[int, int]:
        """Half-open range of the real elements of `rank`; empty for ranks that hold only padding."""
        start = min(rank * self.shard_numel, self.numel)
        return start, min(start + self.shard_numel, self.numel)


@dataclass(frozen=True, kw_only=True)
class RowPartition:
    """Row blocks of an ``m x n`` row-major matrix over P ranks, aligned to quantization blocks.

    Rows per rank are rounded up so that every rank holds whole blocks of `block` consecutive elements of the flattened
    matrix. The bytes of a block-wise quantizer then do not depend on the world size. Ranks beyond the last real row
    hold only zero padding.

    Parameters
    ----------
    rows, columns
        Shape of the whole matrix, ``m x n``.
    world_size
        Number of ranks of the shard group, P.
    block
        Number of elements per quantization block; 1 for formats without blocks.
    """

    rows: int
    columns: int
    world_size: int
    block: int = 1

    @property
    def rows_per_rank(self) -> int:
        """Number of rows on each rank, padding included."""
        quantum = self.block // math.gcd(self.block, self.columns)
        return -(-self.rows // (self.world_size * quantum)) * quantum

    @property
    def padded_rows(self) -> int:
        """Number of rows of all ranks together, padding included."""
        return self.rows_per_rank * self.world_size

    @property
    def blocks(self) -> int:
        """Number of quantization blocks with at least one real element."""
        return -(-self.rows * self.columns // self.block)

    @property
    def blocks_per_rank(self) -> int:
        """Number of quantization blocks on each rank, padding included."""
        return self.rows_per_rank * self.columns // self.block

    def bounds(self, rank: int) -> tuple[int, int]:
        """Half-open range of the real rows of `rank`; empty for ranks that hold only padding."""
        start = min(rank * self.rows_per_rank, self.rows)
        return start, min(start + self.rows_per_rank, self.rows)

    def block_bounds(self, rank: int) -> tuple[int, int]:
        """Half-open range of the real quantization blocks of `rank`."""
        start = min(rank * self.blocks_per_rank, self.blocks)
        return start, min(start + self.blocks_per_rank, self.blocks)


@dataclass(frozen=True, kw_only=True)
class FlatStorage:
    """One flat tensor of an encoded residual: `numel` elements of `dtype`, in shards of `shard_numel` elements.

    The last shards may end in padding or consist of padding only.
    """

    numel: int
    shard_numel: int
    dtype: torch.dtype
