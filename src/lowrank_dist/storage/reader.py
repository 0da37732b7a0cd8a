"""Pretrained weights on disk: a streaming reader of safetensors files."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lowrank_dist.errors import CheckpointError
from lowrank_dist.linalg import all_finite
from lowrank_dist.storage.dtypes import DTYPES
from lowrank_dist.storage.find_weights import find_weights, plain_names
from lowrank_dist.storage.headers import open_file, read_index
from lowrank_dist.storage.layout import QUANT_STATES

log = logging.getLogger(__name__)

#: Dtypes of encoded weights in the reader of a residual model.
PACKED_DTYPES = tuple(name.upper() for name in QUANT_STATES)


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Description of one stored tensor.

    Attributes
    ----------
    shape
        Its shape.
    dtype
        Its code in safetensors headers (``BF16``, ...), or ``NF4`` for the 4-bit weights of a residual model.
    nbytes
        Its size in bytes.

    See Also
    --------
    CheckpointReader.info : Returns it.

    Examples
    --------
    >>> from lowrank_dist.storage import TensorInfo
    >>> TensorInfo(shape=(4, 3), dtype="BF16", nbytes=24).shape
    (4, 3)
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stored tensor, or a part of it, that is joined to others along the first dimension.

    Attributes
    ----------
    key
        The stored tensor.
    index
        Entry of its first dimension, if the piece is a matrix of a stack.
    start, stop
        Rows of the first dimension, if it is not the whole tensor.
    transposed
        Whether the entry is joined transposed.
    """

    key: str
    index: int | None = None
    start: int = 0
    stop: int | None = None
    transposed: bool = False

    @property
    def is_ordinary(self) -> bool:
        """Whether the piece is a stored tensor, or an entry of it, as it is."""
        return self.start == 0 and self.stop is None and not self.transposed


class CheckpointReader:
    """Reads slices of the tensors of safetensors files and counts the bytes that it returns.

    Every file is opened once and its header read; tensor data is memory-mapped and read on demand.

    Parameters
    ----------
    directory
        Directory with ``model.safetensors``, or with ``model.safetensors.index.json`` and the files it names. If both
        exist, the single file is read, as transformers does, and rank 0 warns. Or one file; what else is taken, see
        `lowrank_dist.storage.find_weights.find_weights`.
    stem
        Replaces ``model`` in these names.

    Attributes
    ----------
    holds_residuals : bool
        Whether the tensors are residuals of decomposed matrices (`lowrank_dist.residual_model.reader`).
    identity : bytes
        Enters the fingerprint beside the files; a weight source has its own fingerprint here.
    encoding : str, optional
        The format that weights are decoded from (`lowrank_dist.decoding`); None if they are returned as stored.

    Raises
    ------
    CheckpointError
        If there are no weights, a file is missing or truncated, or the index names a tensor that its file does not
        hold.

    See Also
    --------
    resolve_checkpoint : Finds the directory of a hub id.
    WeightSource : Weights that are not stored in files.

    Examples
    --------
    >>> import tempfile, torch
    >>> from safetensors.torch import save_file
    >>> from lowrank_dist.storage import CheckpointReader
    >>> directory = tempfile.mkdtemp()
    >>> save_file({"layer.weight": torch.ones(4, 3)}, f"{directory}/model.safetensors")
    >>> reader = CheckpointReader(directory)
    >>> reader.rows("layer.weight", 1, 3).shape, reader.bytes_read
    (torch.Size([2, 3]), 24)
    >>> reader.close()
    """

    holds_residuals = False
    identity = b""
    encoding: str | None = None
    _stored_as: Mapping[str, str] = MappingProxyType({})  # names in the files, of tensors that have another here

    def __init__(self, directory: str | os.PathLike[str], *, stem: str = "model") -> None:
        found = find_weights(Path(directory), stem)
        self.directory = found.directory
        self.bytes_read = 0
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self._info: dict[str, TensorInfo] = {}
        self._joined: dict[str, tuple[Piece, ...]] = {}
        if found.index is not None:
            self._file_of = read_index(found.index)
        for file in found.files:
            for name in self._open(file).keys():  # noqa: SIM118 (no dictionary)
                if name in self._file_of:
                    raise CheckpointError(f"{self.directory}: {file} and {self._file_of[name]} both hold {name}")
                self._file_of[name] = file
        held = {file: set(self._open(file).keys()) for file in sorted(set(self._file_of.values()))}
        for name, file in self._file_of.items():
            if name not in held[file]:
                raise CheckpointError(
                    f"{found.index}: names tensor {name}, which {file} does not hold; fetch both again"
                )
        if stem == "model":
            self._stored_as = plain_names(self._file_of, self.directory)
            if self._stored_as:
                self._file_of = {name: self._file_of[stored] for name, stored in self._stored_as.items()}

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.directory / file
            if not path.exists():
                raise CheckpointError(f"{path}: missing, though the index names it; fetch it again")
            self._files[file] = open_file(path).__enter__()
        return self._files[file]

    def _slice(self, name: str) -> Any:
        return self._open(self._file_of[name]).get_slice(self._stored_as.get(name, name))

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted."""
        return [self.directory / file for file in sorted(set(self._file_of.values()))]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(self.stored(name).nbytes for name in self._file_of)

    def join(self, name: str, pieces: Sequence[Piece]) -> None:
        """Define the tensor `name` as `pieces`, stacked along their first dimension.

        A joined tensor is read like any other, but counts neither among the names nor in the bytes of the reader.

        Raises
        ------
        CheckpointError
            If the pieces differ in width or dtype.
        """
        infos = [self.stored(piece.key) for piece in pieces]
        shapes = [self._shape(piece) for piece in pieces]
        for piece, info, shape in zip(pieces, infos, shapes, strict=True):
            if not shape or shape[1:] != shapes[0][1:] or info.dtype != infos[0].dtype:
                raise CheckpointError(
                    f"{name}: {piece.key} {list(shape)} {info.dtype} does not go with {pieces[0].key} "
                    f"{list(shapes[0])} {infos[0].dtype}; fetch the model again"
                )
        rows = sum(shape[0] for shape in shapes)
        nbytes = sum(
            info.nbytes * math.prod(shape) // max(1, math.prod(info.shape))
            for info, shape in zip(infos, shapes, strict=True)
        )
        self._joined[name] = tuple(pieces)
        self._info[name] = TensorInfo(shape=(rows, *shapes[0][1:]), dtype=infos[0].dtype, nbytes=nbytes)

    def _shape(self, piece: Piece) -> tuple[int, ...]:
        """Shape of a piece."""
        shape = self.stored(piece.key).shape[0 if piece.index is None else 1 :]
        if piece.transposed:
            return shape[::-1]
        return (
            shape if piece.is_ordinary else ((shape[0] if piece.stop is None else piece.stop) - piece.start, *shape[1:])
        )

    def join_stack(self, name: str, pieces: Sequence[Piece], depth: int) -> None:
        """Like `join`, for a ``[depth, rows, columns]`` tensor: as many pieces for every entry of its first dimension.

        Raises
        ------
        CheckpointError
            If the pieces differ in width or dtype, or do not fill `depth` equal entries.
        """
        self.join(name, pieces)
        info, each = self._info[name], len(pieces) // depth
        heights = [self._shape(piece)[0] for piece in pieces]
        if len(pieces) % depth or heights != heights[:each] * depth:
            raise CheckpointError(f"{name}: {len(pieces)} tensors do not make {depth} equal ones; fetch them again")
        shape = (depth, info.shape[0] // depth, info.shape[1])
        self._info[name] = TensorInfo(shape=shape, dtype=info.dtype, nbytes=info.nbytes)

    def join_as(self, other: CheckpointReader) -> None:
        """Join the tensors that are joined in `other`, if this reader holds all their pieces."""
        for name, pieces in other._joined.items():
            if all(piece.key in self._file_of for piece in pieces):
                self._joined[name], self._info[name] = pieces, other._info[name]

    def entry(self, name: str, index: int) -> str:
        """Join entry `index` of the ``[depth, rows, columns]`` tensor `name` as a matrix and return its name."""
        entry = f"{name}[{index}]"
        pieces: Sequence[Piece] = [Piece(key=name, index=index)]
        if name in self._joined:
            each = len(self._joined[name]) // self.stored(name).shape[0]
            pieces = self._joined[name][index * each : (index + 1) * each]
        self.join(entry, pieces)
        return entry

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """The tensors of the files that `name` stands for, in the order in which they are joined."""
        return self._joined.get(name, (Piece(key=name),))

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and size of the tensor that `name` stands for."""
        return self.stored(name)

    @property
    def returns_values(self) -> bool:
        """Whether what it returns are weights, whatever the configuration of the model says about quantization."""
        return self.holds_residuals or self.encoding is not None

    def decodes(self, name: str) -> bool:
        """Whether `name`, or a tensor that is joined to it, is decoded from a quantized format."""
        return False

    def stored(self, name: str) -> TensorInfo:
        """Shape, dtype and size of `name` as the file holds it."""
        if name not in self._info:
            view = self._slice(name)
            shape, dtype = tuple(view.get_shape()), view.get_dtype()
            digits = re.search(r"\d+", dtype)  # F8_E4M3 has 8
            bits = int(digits[0]) if digits else 8  # BOOL
            self._info[name] = TensorInfo(shape=shape, dtype=dtype, nbytes=math.prod(shape) * bits // 8)
        return self._info[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of the first dimension, in the dtype of the file."""
        if start >= stop:
            shape = (0, *self.stored(name).shape[1:])
            return torch.empty(shape, dtype=DTYPES.get(self.stored(name).dtype, torch.float32))
        if name in self._joined:
            row = self.stored(name).shape[1:]
            width = torch.Size(row).numel()
            return self._flat_of_pieces(name, start * width, stop * width).view(-1, *row)
        rows = self._load(name, start, stop)
        self._count(name, rows)
        return rows

    def _count(self, name: str, values: Tensor) -> None:
        """Count `values` of the tensor `name`, which were read for a caller."""
        self.bytes_read += values.nbytes

    def part(self, name: str, *index: int | slice) -> Tensor:
        """The part of a tensor of the files that `index` selects, an integer or slice for each of its first dimensions.

        The result is not counted, and is contiguous.
        """
        if not index:
            whole: Tensor = self._open(self._file_of[name]).get_tensor(self._stored_as.get(name, name))
            return whole
        part: Tensor = self._slice(name)[index]
        return part.contiguous()

    def _load(self, name: str, start: int, stop: int, entry: int | None = None) -> Tensor:
        """Rows ``start:stop`` of a tensor of the files, or of entry `entry` of its first dimension."""
        view = self._slice(name)
        rows: Tensor = view[start:stop] if entry is None else view[entry, start:stop]
        return rows

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start:stop`` of the flattened tensor, in the dtype of the file.

        Whole rows of the first dimension are read, so that the rows at both ends may be read by two ranks; only
        the elements asked for are counted as read.
        """
        if name in self._joined:
            return self._flat_of_pieces(name, start, stop)
        shape = self.stored(name).shape
        if not shape:
            whole = self.part(name).reshape(1)
            self.bytes_read += whole[start:stop].nbytes
            return whole[start:stop]
        width = max(1, self.stored(name).nbytes and torch.Size(shape[1:]).numel())
        first, last = start // width, -(-stop // width)
        if first >= last:
            return self.rows(name, first, last).reshape(-1)
        part = self._load(name, first, last).reshape(-1)[start - first * width : stop - first * width]
        self._count(name, part)
        return part

    def _flat_of_pieces(self, name: str, start: int, stop: int) -> Tensor:
        parts = []
        for piece, low, high in self._within_pieces(name, start, stop):
            shape = self._shape(piece)
            width = math.prod(shape[1:])
            if piece.index is None and not piece.transposed:
                parts.append(self.flat(piece.key, piece.start * width + low, piece.start * width + high))
                continue
            top, bottom = low // width, -(-high // width)
            if piece.transposed:
                entry = () if piece.index is None else (piece.index,)
                rows = self.part(piece.key, *entry, slice(None), slice(top, bottom)).mT
            else:
                rows = self._load(piece.key, piece.start + top, piece.start + bottom, piece.index)
            parts.append(rows.reshape(-1)[low - top * width : high - top * width])
            self._count(piece.key, parts[-1])
        empty = torch.empty(0, dtype=DTYPES.get(self.stored(name).dtype, torch.float32))
        return torch.cat(parts or [empty])

    def _within_pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[Piece, int, int]]:
        """The pieces that elements ``start:stop`` of `name` lie in, and from where to where in each."""
        first = 0
        for piece in self.pieces(name):
            numel = math.prod(self._shape(piece))
            low, high = max(start - first, 0), min(stop - first, numel)
            first += numel
            if low < high:
                yield piece, low, high

    def places(self, name: str, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """Where elements ``start:stop`` of `name` lie in the files: tensor, first element there, how many; in order."""
        for piece, low, high in self._within_pieces(name, start, stop):
            before = piece.start * math.prod(self._shape(piece)[1:])
            if piece.index is not None:
                before += piece.index * torch.Size(self.stored(piece.key).shape[1:]).numel()
            yield piece.key, before + low, high - low

    def close(self) -> None:
        """Close the files."""
        for handle in self._files.values():
            handle.__exit__(None, None, None)
        self._files.clear()


@dataclass(frozen=True, kw_only=True)
class FileTensor:
    """Shape and dtype of a tensor of a safetensors file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def check_finite(key: str, values: Tensor, start: int) -> None:
    """Raise CheckpointError if `values` (rows or elements of tensor `key` from `start` on) hold a NaN or infinity."""
    if not all_finite(values):
        bad = (~torch.isfinite(values)).nonzero()[0].tolist()
        bad[0] += start
        raise CheckpointError(
            f"{key}: NaN or infinity at {bad}; the weights are damaged or were saved from a diverged run"
        )
