"""A reader of a quantized checkpoint that returns the weights decoded, by rows."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_dist.decoding.encoded import EncodedMatrix, Found
from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.dtypes import CODES
from lowrank_dist.storage.reader import CheckpointReader, TensorInfo

#: Elements that are decoded at a time, and rows of which their bounds are multiples: blocks have no more.
CHUNK, ALIGNMENT = 2**22, 128


class DecodingReader(CheckpointReader):
    """A `CheckpointReader` of a quantized checkpoint, which shows it as if it were dense.

    The tensors that encode a matrix stand under one name, with the decoded shape and dtype and the size in bytes of
    what is stored. Rows are decoded as they are read, and the bytes that were read for them are counted: each byte of
    the values once over all rows. Rows whose bounds are not those of a block read the scales of the blocks at their
    ends. What a whole matrix shares, a code book say, is read once for every `CHUNK` elements.

    Parameters
    ----------
    stored
        Reader of the tensors as they are stored; closed with this one.
    found
        The quantized matrices.
    """

    def __init__(self, stored: CheckpointReader, found: Found) -> None:
        # the parent's __init__ looks for files
        self.directory, self.stored_reader = stored.directory, stored
        self.encoding: str | None = found.format
        self.bytes_read = 0
        self._matrices = found.matrices
        parts = {tensor for matrix in found.matrices.values() for tensor in matrix.tensors}
        self._file_of = {name: stored._file_of[name] for name in stored if name not in parts | found.unused}
        for name in found.matrices:
            if name in self._file_of:
                raise CheckpointError(
                    f"{stored.directory}: holds {name} both dense and in {found.format}; fetch the model again"
                )
        self._file_of |= dict.fromkeys(found.matrices, "")
        self._info, self._joined, self._files = {}, {}, {}
        self._stored_as = stored._stored_as
        for name, matrix in found.matrices.items():
            self._info[name] = TensorInfo(
                shape=matrix.shape,
                dtype=CODES[matrix.dtype],
                nbytes=sum(stored.stored(tensor).nbytes for tensor in matrix.tensors),
            )

    @property
    def files(self) -> list[Path]:
        return self.stored_reader.files

    def decodes(self, name: str) -> bool:
        matrices = (self._matrices.get(piece.key) for piece in self.pieces(name))
        return any(matrix is not None and matrix.is_quantized for matrix in matrices)

    def encoded(self, name: str) -> EncodedMatrix | None:
        """How a tensor of the files is encoded; None if it is returned as stored."""
        return self._matrices.get(name)

    def _open(self, file: str) -> Any:
        return self.stored_reader._open(file)

    def _load(self, name: str, start: int, stop: int, entry: int | None = None) -> Tensor:
        matrix = self._matrices.get(name)
        if matrix is None:
            return super()._load(name, start, stop, entry)
        if len(matrix.shape) <= 2 or entry is not None:
            return self._decoded(matrix, start, stop, entry)
        return torch.stack([self._decoded(matrix, 0, matrix.shape[1], index) for index in range(start, stop)])

    def _decoded(self, matrix: EncodedMatrix, start: int, stop: int, entry: int | None) -> Tensor:
        """Rows of a matrix, some at a time: decoding takes several times the memory of its result."""
        inside = matrix.shape[1 if entry is None else 2 :]
        step = max(CHUNK // max(math.prod(inside), 1) // ALIGNMENT, 1) * ALIGNMENT
        if stop - start <= step:
            return matrix.rows(self.stored_part, start, stop, entry)
        values = torch.empty(stop - start, *inside, dtype=matrix.dtype)
        bounds = [start, *range((start // step + 1) * step, stop, step), stop]
        for low, high in pairwise(bounds):
            values[low - start : high - start] = matrix.rows(self.stored_part, low, high, entry)
        return values

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        matrix = self._matrices.get(name)
        if matrix is None or len(matrix.shape) < 3 or start >= stop:
            return super().flat(name, start, stop)
        # the rows of each entry that are needed, not whole entries
        rows, width = matrix.shape[1], math.prod(matrix.shape[2:])  # not 0: there is an element to read
        parts = []
        for entry in range(start // (rows * width), -(-stop // (rows * width))):
            low, high = (min(max(bound - entry * rows * width, 0), rows * width) for bound in (start, stop))
            top = low // width
            some = self._load(name, top, -(-high // width), entry).reshape(-1)
            parts.append(some[low - top * width : high - top * width])
        return torch.cat(parts)

    def stored_part(self, name: str, *index: int | slice) -> Tensor:
        """A part of a stored tensor, whose bytes are counted."""
        part = self.stored_reader.part(name, *index)
        self.bytes_read += part.nbytes
        return part

    def _count(self, name: str, values: Tensor) -> None:
        if name not in self._matrices:  # else its stored bytes are counted as they are read
            super()._count(name, values)

    def close(self) -> None:
        self.stored_reader.close()
