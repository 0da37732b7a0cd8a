"""Shard arithmetic: which rows, elements and blocks of a tensor belong to which rank.

A ZeRO-3 partition is a contiguous ``1/P`` of the flattened tensor. For a row-major matrix whose row count is
padded to a multiple of ``P``, that partition is a block of whole rows: `RowPartition` describes it and is the
only place that knows about padding. Tensors that are not decomposed are cut wherever ``numel / P`` falls:
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
        Elements of the whole tensor.
    world_size
        Ranks of the shard group, P.
    """

    numel: int
    world_size: int

    @property
    def shard_numel(self) -> int:
        """Elements held by each rank, padding included: ``ceil(numel / P)``."""
        return -(-self.numel // self.world_size)

    def bounds(self, rank: int) -> tuple[int, int]:
        """Half-open range of real elements of `rank`; empty for ranks that hold only padding."""
        start = min(rank * self.shard_numel, self.numel)
        return start, min(start + self.shard_numel, self.numel)


@dataclass(frozen=True, kw_only=True)
class RowPartition:
    """Row blocks of an ``m x n`` row-major matrix over P ranks, aligned to quantization blocks.

    Rows per rank are rounded up so that every rank holds whole blocks of `block` consecutive elements of the
    flattened matrix: the bytes of a block-wise quantizer then do not depend on the world size. Ranks beyond the
    last real row hold zero padding only.

    Parameters
    ----------
    rows, columns
        Shape of the whole matrix, ``m x n``.
    world_size
        Ranks of the shard group, P.
    block
        Elements per quantization block; 1 for formats that have none.
    """

    rows: int
    columns: int
    world_size: int
    block: int = 1

    @property
    def rows_per_rank(self) -> int:
        """Rows held by each rank, padding included."""
        quantum = self.block // math.gcd(self.block, self.columns)
        return -(-self.rows // (self.world_size * quantum)) * quantum

    @property
    def padded_rows(self) -> int:
        """Rows of all ranks together, padding included."""
        return self.rows_per_rank * self.world_size

    @property
    def blocks(self) -> int:
        """Quantization blocks that hold at least one real element."""
        return -(-self.rows * self.columns // self.block)

    @property
    def blocks_per_rank(self) -> int:
        """Quantization blocks held by each rank, padding included."""
        return self.rows_per_rank * self.columns // self.block

    def bounds(self, rank: int) -> tuple[int, int]:
        """Half-open range of real rows of `rank`; empty for ranks that hold only padding."""
        start = min(rank * self.rows_per_rank, self.rows)
        return start, min(start + self.rows_per_rank, self.rows)

    def block_bounds(self, rank: int) -> tuple[int, int]:
        """Half-open range of the real quantization blocks of `rank`."""
        start = min(rank * self.blocks_per_rank, self.blocks)
        return start, min(start + self.blocks_per_rank, self.blocks)


@dataclass(frozen=True, kw_only=True)
class Storage:
    """One stored tensor of a format: flat, `numel` elements of `dtype`, cut every `shard_numel` elements.

    The last shards may end in padding, or be padding only.
    """

    numel: int
    shard_numel: int
    dtype: torch.dtype
