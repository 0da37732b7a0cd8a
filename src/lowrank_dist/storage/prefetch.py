"""Row blocks of the pretrained weights in fp32, read by a thread while the previous block is in use."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lowrank_dist.linalg import slabs
from lowrank_dist.storage.buffers import Buffers
from lowrank_dist.storage.reader import CheckpointReader, check_finite

_Request = TypeVar("_Request")
_Block = TypeVar("_Block")

# elements that are widened and checked at a time on a CPU, few enough to stay in its cache
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
        Whether `values` may be overwritten: they are neither the mapped file nor memory of a weight source.
    """

    values: Tensor
    spare: bool


def read_blocks(
    reader: CheckpointReader, ranges: Sequence[RowRange], buffers: Buffers, device: torch.device
) -> Iterator[RowBlock]:
    """Yield every range in fp32 on `device`, checked for NaN and infinity, while a thread reads the next one.

    `device` holds the block in use and the next one. On a CPU, blocks that are stored in fp32 are the mapped file, and
    others lie in `buffers`. Rows for CUDA are copied from pinned memory in their stored dtype, on a separate stream,
    and widened there.

    Raises
    ------
    CheckpointError
        At the block that cannot be read or that holds a NaN or infinity.
    """
    stream: Any = None
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(
            torch.cuda.current_stream(device)
        )  # a reader may return tensors that are still being computed

    def beside() -> AbstractContextManager[object]:
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def read(rows: RowRange) -> RowBlock:
        with beside():
            found = reader.rows(rows.key, rows.start, rows.stop)
            if stream is not None:
                block = found if found.is_cuda else found.pin_memory().to(device, non_blocking=True)
                block = block.to(device, torch.float32)
                check_finite(rows.key, block, rows.start)  # waits for the stream, so that the rows have arrived
                return RowBlock(block, spare=block is not found)
            known = found.dtype == torch.float32 and found.device == device
            block = found if known else buffers.empty(found.shape, device)
            for some in slabs(block, _CACHED):
                if not known:
                    block[some] = found[some]
                check_finite(rows.key, block[some], rows.start + some.start)
                os.sched_yield()  # lets the thread of the collectives run first on a shared core
        return RowBlock(block, spare=not known)

    for block in read_ahead(read, ranges):
        if stream is not None:  # else the allocator reuses its memory while it is read
            block.values.record_stream(torch.cuda.current_stream(device))
        yield block
        del block  # before the one after the next is read


def read_ahead(read: Callable[[_Request], _Block], requests: Iterable[_Request], *, depth: int = 1) -> Iterator[_Block]:
    """``map(read, requests)`` with a thread that stays `depth` results ahead of the consumer.

    Host memory holds at most ``depth + 1`` results beside the one in use. An error of `read` is raised in place of its
    result.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as pool:
        pending: deque[Future[_Block]] = deque()
        try:
            for request in requests:
                pending.append(pool.submit(read, request))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
