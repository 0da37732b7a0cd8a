"""Residual formats: how the frozen part of a decomposed matrix is stored, sharded and read back.

A format turns this rank's rows of the residual into named flat shards, says how long each shard is, and decodes
the gathered (or local) shards again. The walk, the ZeRO-3 partition and the layer know nothing else about it, so
a new format is one class. `Dense` below keeps the values; `lowrank_dist.quantization.nf4.NF4` packs them into 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition, Storage
from lowrank_dist.storage.reader import FileTensor


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """This rank's shards of a stored residual.

    Attributes
    ----------
    shards
        Flat tensors by name, each exactly as long as `ResidualFormat.storages` says.
    rows
        ``rows(some)``: what the shards stand for in a slice of this rank's real rows, ``[k, n]`` fp32; may be a view
        of what was encoded.
    """

    shards: dict[str, Tensor]
    rows: Callable[[slice], Tensor]

    @property
    def decoded(self) -> Tensor:
        """What the shards stand for: ``[m_p, n]`` fp32, all of this rank's real rows."""
        return self.rows(slice(None))


#: ``[m, r]`` and ``[r, n]``.
Product = tuple[Tensor, Tensor]

#: ``read(suffix, start, stop)``: elements ``start:stop`` of the flattened file tensor ``<weight's name><suffix>``;
#: None: to its end.
ReadFile = Callable[[str, int, int | None], Tensor]


class ResidualFormat(Protocol):
    """How a residual is stored. Implementations are frozen dataclasses without state."""

    @property
    def block(self) -> int:
        """Consecutive elements that are encoded together; ranks hold whole blocks."""

    @property
    def exact(self) -> bool:
        """Whether decoding gives back the encoded values up to rounding to a floating-point type."""

    def storages(self, partition: RowPartition) -> dict[str, Storage]:
        """Names, lengths and dtypes of the shards of a matrix partitioned by `partition`."""

    def encode(self, block: Tensor, partition: RowPartition, group: ShardGroup) -> Encoded:
        """Encode this rank's real rows, ``[m_p, n]`` fp32."""

    def decode(
        self, stored: Mapping[str, Tensor], partition: RowPartition, dtype: torch.dtype, product: Product | None = None
    ) -> Tensor:
        """Decode the gathered storages of all ranks to the ``[m, n]`` matrix in `dtype`; nothing is communicated.

        With `product`, two factors of that dtype, ``left @ right`` is added.
        """

    def decode_rows(
        self, stored: Mapping[str, Tensor], partition: RowPartition, rows: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """``decode(stored, partition, dtype)[rows]`` for row numbers ``[k]`` int64, without decoding the others."""

    def files(self, partition: RowPartition, dtype: torch.dtype) -> dict[str, FileTensor]:
        """The tensors that stand for a matrix of a checkpoint in `dtype` on disk, by suffix to the weight's name."""

    def to_files(
        self, shards: Mapping[str, Tensor], partition: RowPartition, rank: int, dtype: torch.dtype
    ) -> Iterator[tuple[str, int, Tensor]]:
        """What `rank` contributes to `files`: suffix, first element, flat values. All ranks together fill them."""

    def from_files(self, read: ReadFile, partition: RowPartition, rank: int) -> dict[str, Tensor]:
        """The shards of `rank`, exactly as long as `storages` says, from `files`."""
