"""The protocol of residual formats: how the residual of a decomposed matrix is stored, sharded and decoded.

A format encodes this rank's rows of the residual as named flat shards, states the length of every shard, and decodes
gathered (or local) shards. The walk, the ZeRO-3 partition and the layers know nothing else about a format, so a new
format is one class. `lowrank_dist.quantization.dense.Dense` stores floating-point values,
`lowrank_dist.quantization.blocks.BlockFormat` is what formats of few bits have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatStorage, RowPartition
from lowrank_dist.storage.reader import FileTensor


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """This rank's shards of an encoded residual.

    Attributes
    ----------
    shards
        Flat tensors by name, each exactly as long as `ResidualFormat.storages` states.
    rows
        ``rows(some)`` decodes a slice of this rank's real rows, ``[k, n]`` fp32. The result may be a view of the
        encoded values.

    See Also
    --------
    ResidualFormat.encode : Returns it.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.quantization import Dense
    >>> partition = RowPartition(rows=2, columns=3, world_size=1)
    >>> encoded = Dense(dtype=torch.bfloat16).encode(torch.ones(2, 3), partition, ShardGroup.single())
    >>> encoded.shards["weight_rows"].shape, encoded.decoded.dtype
    (torch.Size([6]), torch.float32)
    """

    shards: dict[str, Tensor]
    rows: Callable[[slice], Tensor]

    @property
    def decoded(self) -> Tensor:
        """All of this rank's real rows, decoded: ``[m_p, n]`` fp32."""
        return self.rows(slice(None))


#: Factors ``[m, r]`` and ``[r, n]`` of a product.
Product = tuple[Tensor, Tensor]

#: ``read(suffix, start, stop)`` reads elements ``start:stop`` of the flattened file tensor ``<weight's name><suffix>``.
#: A `stop` of None means its end.
ReadFile = Callable[[str, int, int | None], Tensor]


#: What a user passes instead of a format to keep the bytes of a quantized checkpoint
#: (`lowrank_dist.decoding.as_stored`).
AsStoredOption = Literal["as stored"]
AS_STORED: AsStoredOption = "as stored"


class ResidualFormat(Protocol):
    """How a residual is stored. Implementations are frozen dataclasses without state.

    See Also
    --------
    lowrank_dist.quantization.dense.Dense : Floating-point values.
    lowrank_dist.quantization.nf4.NF4 : 4-bit NormalFloat.

    Examples
    --------
    Every format states the storages of a matrix, here over two ranks:

    >>> import torch
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.quantization.dense import Dense
    >>> from lowrank_dist.quantization.nf4 import NF4
    >>> for residual in (Dense(dtype=torch.bfloat16), NF4()):
    ...     partition = RowPartition(rows=128, columns=64, world_size=2, block=residual.block)
    ...     for name, storage in residual.storages(partition).items():
    ...         print(name, storage.numel, storage.shard_numel, storage.dtype)
    weight_rows 8192 4096 torch.bfloat16
    weight_packed 4096 2048 torch.uint8
    weight_absmax 512 256 torch.uint8
    """

    @property
    def block(self) -> int:
        """Number of consecutive elements that are encoded together; ranks hold whole blocks."""

    @property
    def exact(self) -> bool:
        """Whether decoding returns the encoded values up to rounding to a floating-point type."""

    def of_matrix(self, key: str) -> ResidualFormat:
        """The format of a matrix, whose weight the reader calls `key`; for all formats but one, this format."""

    def scratch_bytes(self, elements: int, *, stacked: bool = False) -> int:
        """Upper bound of the temporary bytes of decoding `elements`, beside the stored ones and the result.

        `stacked`: of matrices of a stack (`lowrank_dist.quantization.stacks`).
        """

    @property
    def stock(self) -> bool:
        """Whether stock transformers loads its `files` where they hold the weight of a linear layer."""

    def storages(self, partition: RowPartition) -> dict[str, FlatStorage]:
        """Names, lengths and dtypes of the shards of a matrix partitioned by `partition`."""

    def encode(self, block: Tensor, partition: RowPartition, group: ShardGroup) -> Encoded:
        """Encode this rank's real rows, ``[m_p, n]`` fp32."""

    def decode(
        self, stored: Mapping[str, Tensor], partition: RowPartition, dtype: torch.dtype, product: Product | None = None
    ) -> Tensor:
        """Decode the gathered storages of all ranks to the ``[m, n]`` matrix in `dtype`; nothing is communicated.

        `product`, two factors in the same dtype, is multiplied out and added.
        """

    def decode_rows(
        self, stored: Mapping[str, Tensor], partition: RowPartition, rows: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """``decode(stored, partition, dtype)[rows]`` for row numbers ``[k]`` int64, decoding only these rows."""

    def files(self, partition: RowPartition, dtype: torch.dtype) -> dict[str, FileTensor]:
        """The tensors on disk for a matrix of a model in `dtype`, by the suffix that follows the weight's name."""

    def to_files(
        self, shards: Mapping[str, Tensor], partition: RowPartition, rank: int, dtype: torch.dtype
    ) -> Iterator[tuple[str, int, Tensor]]:
        """This rank's part of `files`: suffix, first element, flat values. The parts of all ranks make up the files."""

    def from_files(self, read: ReadFile, partition: RowPartition, rank: int) -> dict[str, Tensor]:
        """Read the shards of `rank` from `files`, each exactly as long as `storages` states."""
