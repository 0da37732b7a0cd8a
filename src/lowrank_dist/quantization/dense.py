"""The dense residual format: floating-point values, sharded by rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatStorage, RowPartition
from lowrank_dist.quantization.format import Encoded, Product, ReadFile, ResidualFormat
from lowrank_dist.storage.reader import FileTensor


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Residual format: values rounded to `dtype` and sharded by rows.

    Parameters
    ----------
    dtype
        Floating-point type of the stored values.

    See Also
    --------
    lowrank_dist.quantization.nf4.NF4 : Stores 4 bits a weight.
    lowrank_dist.quantization.format.ResidualFormat : What a format implements.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.quantization.dense import Dense
    >>> residual, partition = Dense(dtype=torch.bfloat16), RowPartition(rows=3, columns=4, world_size=1)
    >>> encoded = residual.encode(torch.ones(3, 4), partition, ShardGroup.single())
    >>> residual.decode(encoded.shards, partition, torch.float32).shape
    torch.Size([3, 4])
    """

    dtype: torch.dtype

    @property
    def block(self) -> int:
        return 1

    @property
    def exact(self) -> bool:
        return True

    def of_matrix(self, key: str) -> ResidualFormat:
        return self

    def scratch_bytes(self, elements: int, *, stacked: bool = False) -> int:
        return 0

    @property
    def stock(self) -> bool:
        return True

    def storages(self, partition: RowPartition) -> dict[str, FlatStorage]:
        numel, shard_numel = partition.rows * partition.columns, partition.rows_per_rank * partition.columns
        return {"weight_rows": FlatStorage(numel=numel, shard_numel=shard_numel, dtype=self.dtype)}

    def encode(self, block: Tensor, partition: RowPartition, group: ShardGroup) -> Encoded:
        values = block.to(self.dtype)
        shards = {"weight_rows": pad_rows(values, partition).flatten()}
        return Encoded(shards=shards, rows=lambda some: values[some].float())

    def decode(
        self, stored: Mapping[str, Tensor], partition: RowPartition, dtype: torch.dtype, product: Product | None = None
    ) -> Tensor:
        weight = stored["weight_rows"].view(-1, partition.columns)
        if weight.shape[0] != partition.rows or weight.dtype != dtype:
            weight = weight[: partition.rows].to(dtype)
        return weight if product is None else torch.addmm(weight, *product)

    def decode_stack(self, stored: Mapping[str, Tensor], partition: RowPartition, dtype: torch.dtype) -> Tensor:
        """See `lowrank_dist.quantization.stacks.decode_stack`."""
        rows = stored["weight_rows"].unflatten(1, (-1, partition.columns))
        return rows[:, : partition.rows].to(dtype)

    def decode_rows(
        self, stored: Mapping[str, Tensor], partition: RowPartition, rows: Tensor, dtype: torch.dtype
    ) -> Tensor:
        return stored["weight_rows"].view(-1, partition.columns)[rows].to(dtype)

    def files(self, partition: RowPartition, dtype: torch.dtype) -> dict[str, FileTensor]:
        return {"": FileTensor(shape=(partition.rows, partition.columns), dtype=dtype)}

    def to_files(
        self, shards: Mapping[str, Tensor], partition: RowPartition, rank: int, dtype: torch.dtype
    ) -> Iterator[tuple[str, int, Tensor]]:
        start, stop = (row * partition.columns for row in partition.bounds(rank))
        yield "", start, shards["weight_rows"][: stop - start].to(dtype)

    def from_files(self, read: ReadFile, partition: RowPartition, rank: int) -> dict[str, Tensor]:
        start, stop = partition.bounds(rank)
        rows = read("", start * partition.columns, stop * partition.columns).to(self.dtype)
        return {"weight_rows": pad_rows(rows.view(-1, partition.columns), partition).flatten()}


def pad_rows(block: Tensor, partition: RowPartition) -> Tensor:
    """Append rows of zeros to ``[m_p, n]`` real rows, up to ``[rows_per_rank, n]``."""
    missing = partition.rows_per_rank - block.shape[0]
    return block if missing == 0 else torch.nn.functional.pad(block, (0, 0, 0, missing))
