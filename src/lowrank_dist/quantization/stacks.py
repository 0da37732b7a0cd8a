"""Decoding of several matrices at once, such as some experts of a stack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.quantization.format import ResidualFormat

#: Bytes of decoded experts at one time, unless the user asks for a number of experts: those of one matrix of a large
#: dense model (28672 x 8192 in 16 bits), which cost nothing beside what is gathered, and enough to keep a GPU busy.
DECODED_BYTES = 512 * 2**20


@runtime_checkable
class DecodesStacks(Protocol):
    """A residual format that decodes several matrices in fewer operators than one after the other."""

    def decode_stack(self, stored: Mapping[str, Tensor], partition: RowPartition, dtype: torch.dtype) -> Tensor:
        """As `decode_stack`, for this format."""


def decode_stack(
    residual: ResidualFormat, stored: Mapping[str, Tensor], partition: RowPartition, dtype: torch.dtype
) -> Tensor:
    """Decode several matrices of one shape.

    Parameters
    ----------
    residual
        How each is encoded.
    stored
        By storage name ``[count, numel]``: for every matrix the gathered storages of all ranks, padding included.
    partition
        Shape of one matrix, m x n, and its sharding.

    Returns
    -------
    Tensor
        ``[count, m, n]`` in `dtype`; it may be a view of `stored`. The values are those of `ResidualFormat.decode`.
    """
    if isinstance(residual, DecodesStacks):
        return residual.decode_stack(stored, partition, dtype)
    (count, _), device = next(iter(stored.values())).shape, next(iter(stored.values())).device
    out = torch.empty(count, partition.rows, partition.columns, dtype=dtype, device=device)
    for index in range(count):
        out[index] = residual.decode({name: of_all[index] for name, of_all in stored.items()}, partition, dtype)
    return out


def experts_at_a_time(given: int | None, experts: int, partition: RowPartition, dtype: torch.dtype) -> int:
    """Number of experts of a stack that are decoded together.

    Parameters
    ----------
    given
        What the user asks for. None: as many as take `DECODED_BYTES`, at least one.
    experts
        Number of experts in the stack.
    partition, dtype
        Shape of a matrix, and dtype in which it is decoded.
    """
    if given is None:
        given = max(1, DECODED_BYTES // (partition.rows * partition.columns * dtype.itemsize))
    return min(given, experts)


def decoding_bytes(residual: ResidualFormat, partition: RowPartition, count: int, dtype: torch.dtype) -> int:
    """Upper bound of the bytes that `decode_stack` takes for `count` matrices of a stack, with its temporary ones.

    The encoded bytes are copied first, unless the matrices follow each other on one rank. Values that are stored in
    `dtype` are not copied again.
    """
    elements = partition.padded_rows * partition.columns
    storages = residual.storages(partition).values()
    nbytes = sum(storage.shard_numel * partition.world_size * storage.dtype.itemsize for storage in storages)
    if isinstance(residual, Dense) and residual.dtype == dtype:
        return count * nbytes
    return count * (elements * dtype.itemsize + nbytes) + residual.scratch_bytes(count * elements, stacked=True)
