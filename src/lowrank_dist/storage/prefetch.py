"""Blocks of rows out of a checkpoint, ready to be computed with, read beside what is computed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_dist.linalg import slabs
from lowrank_dist.storage.buffers import Buffers
from lowrank_dist.storage.reader import CheckpointReader, check_finite, read_ahead

# Elements that are widened and checked at a time on a CPU: they are in its cache still.
_CACHED = 2**18


@dataclass(frozen=True, kw_only=True)
class RowRange:
    """Rows ``start:stop`` of tensor `key`."""

    key: str
    start: int
    stop: int


class RowBlock(NamedTuple):
    """Rows of a matrix.

    Attributes
    ----------
    values
        ``[rows, n]``, fp32.
    spare
        Whether they may be overwritten: they are neither the mapped file nor a source's own.
    """

    values: Tensor
    spare: bool


def read_blocks(
    reader: CheckpointReader, ranges: Sequence[RowRange], buffers: Buffers, device: torch.device
) -> Iterator[RowBlock]:
    """Every range as fp32 on `device`, checked for NaN and infinity, while a thread reads the next one.

    Memory of `device`: the block in use and the next one, in `buffers` where they are of another dtype in the
    checkpoint; blocks in fp32 on a CPU are the mapped file. To CUDA rows cross from pinned memory in the dtype of the
    checkpoint, on a stream of their own, and become fp32 there.

    Raises
    ------
    CheckpointError
        Where the block would have come, if it cannot be read or holds a NaN or infinity.
    """
    stream: Any = None
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # a reader may hand out what is still being computed

    def beside() -> AbstractContextManager[object]:
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def read(rows: RowRange) -> RowBlock:
        with beside():
            found = reader.rows(rows.key, rows.start, rows.stop)
            if stream is not None:
                block = found if found.is_cuda else found.pin_memory().to(device, non_blocking=True)
                block = block.to(device, torch.float32)
                check_finite(rows.key, block, rows.start)  # waits for the stream: the rows are there
                return RowBlock(block, spare=block is not found)
            known = found.dtype == torch.float32 and found.device == device
            block = found if known else buffers.empty(found.shape, device)
            for some in slabs(block, _CACHED):
                if not known:
                    block[some] = found[some]
                check_finite(rows.key, block[some], rows.start + some.start)
                os.sched_yield()  # a core that computes too is there for collectives first
        return RowBlock(block, spare=not known)

    for block in read_ahead(read, ranges):
        if stream is not None:  # else its memory is used anew while it is read
            block.values.record_stream(torch.cuda.current_stream(device))
        yield block
        del block  # before the one after the next is read
