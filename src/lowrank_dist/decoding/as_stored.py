"""Weights that stay in the bytes of a quantized checkpoint: their layout in memory, and what can be kept so.

The bytes of the tensors that encode a matrix are sharded evenly over the ranks and gathered as any residual. A layer
decodes them with the code that decodes checkpoints as they are read, so that both give the same bits. A residual that
is left of a matrix when a method has taken its part is encoded in the residual format of the same kind.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lowrank_dist.decoding.encoded import EncodedMatrix
from lowrank_dist.decoding.fp4 import PackedGroups, StackedBlocks
from lowrank_dist.decoding.reader import ALIGNMENT, DecodingReader
from lowrank_dist.decoding.scaled import ScaledMatrix
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatStorage, RowPartition
from lowrank_dist.errors import CheckpointError, ModelError
from lowrank_dist.model.plan import Plan, PlannedMatrix
from lowrank_dist.quantization.blocks import BlockFormat
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.quantization.format import AS_STORED, Encoded, Product, ReadFile, ResidualFormat
from lowrank_dist.quantization.fp8 import FP8
from lowrank_dist.quantization.int8 import INT8
from lowrank_dist.quantization.mxfp4 import MXFP4
from lowrank_dist.storage.dtypes import DTYPES
from lowrank_dist.storage.reader import FileTensor

#: Layouts that are kept; others are decoded by code that runs on the CPU only, or take longer than a step can wait.
KEPT = (ScaledMatrix, PackedGroups, StackedBlocks)
_DTYPES = DTYPES | {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
if hasattr(torch, "float8_e8m0fnu"):
    _DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
_UNIT = 16  # bytes that shards are multiples of, so that no element of any dtype is cut
#: Elements that are decoded at a time, on the CPU and elsewhere.
_CHUNKS = {"cpu": 2**20, "": 2**25}


@dataclass(frozen=True, kw_only=True)
class StoredPart:
    """Some rows of a matrix that are stored together.

    Attributes
    ----------
    matrix
        How they are encoded. Its tensors are called ``"0"``, ``"1"``, ...; of a stack it is one entry.
    shapes, dtypes
        Of its tensors.
    """

    matrix: EncodedMatrix
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def rows(self) -> int:
        return self.matrix.shape[-2]


@dataclass(frozen=True, kw_only=True, repr=False)
class StoredMatrix:
    """Residual format of one matrix that stays as its checkpoint stores it.

    Parameters
    ----------
    parts
        Rows that are stored together, in order; more than one where transformers joins weights while loading.

    See Also
    --------
    AsStored : The formats of all matrices of a model.
    lowrank_dist.quantization.format.ResidualFormat : What a format implements.

    Notes
    -----
    Storages are ``weight_packed[i]`` (values or codes) and ``weight_scales[i]``, as bytes: those of the first tensor,
    and of the others, of every part. A rank holds an even share of each, whatever rows these are of.
    """

    parts: tuple[StoredPart, ...]

    @property
    def block(self) -> int:
        return 1

    @property
    def exact(self) -> bool:
        return False

    @property
    def stock(self) -> bool:
        return False

    def of_matrix(self, key: str) -> ResidualFormat:
        return self

    def _tensors(self) -> Iterator[tuple[str, int, int, int]]:
        """Name of the storage, part, tensor and bytes of every stored tensor."""
        count = 0
        for index, part in enumerate(self.parts):
            for place, (shape, dtype) in enumerate(zip(part.shapes, part.dtypes, strict=True)):
                name = f"weight_{'scales' if place else 'packed'}[{count}]"
                yield name, index, place, math.prod(shape) * dtype.itemsize
                count += 1

    def storages(self, partition: RowPartition) -> dict[str, FlatStorage]:
        ranks = partition.world_size
        return {
            name: FlatStorage(numel=nbytes, shard_numel=-(-nbytes // (ranks * _UNIT)) * _UNIT, dtype=torch.uint8)
            for name, _, _, nbytes in self._tensors()
        }

    def bounds(self, partition: RowPartition, rank: int) -> Iterator[tuple[str, int, int, int, int]]:
        """Name of the storage, part, tensor, first byte and last byte + 1 of what `rank` holds."""
        storages = self.storages(partition)
        for name, index, place, nbytes in self._tensors():
            start = min(rank * storages[name].shard_numel, nbytes)
            yield name, index, place, start, min(start + storages[name].shard_numel, nbytes)

    def scratch_bytes(self, elements: int, *, stacked: bool = False) -> int:
        # codes of 4 bits become indices and fp32 values, which are rounded; one matrix of a stack is copied
        copied = sum(math.prod(part.matrix.shape[-2:]) for part in self.parts) * 4 if stacked else 0
        return min(elements, max(_CHUNKS.values())) * 16 + copied

    def decode(
        self, stored: Mapping[str, Tensor], partition: RowPartition, dtype: torch.dtype, product: Product | None = None
    ) -> Tensor:
        device = next(iter(stored[name] for name, *_ in self._tensors())).device
        tensors: list[dict[str, Tensor]] = [{} for _ in self.parts]
        for name, index, place, nbytes in self._tensors():
            part = self.parts[index]
            flat = stored[name][:nbytes].view(part.dtypes[place])
            tensors[index][str(place)] = flat.view(part.shapes[place])
        weight = torch.empty(partition.rows, partition.columns, dtype=dtype, device=device)
        step = _CHUNKS.get(device.type, _CHUNKS[""]) // max(partition.columns, 1)
        step = max(step // ALIGNMENT, 1) * ALIGNMENT
        below = 0
        for part, held in zip(self.parts, tensors, strict=True):

            def read(name: str, *index: int | slice, held: Mapping[str, Tensor] = held) -> Tensor:
                return held[name][index]

            entry = 0 if len(part.matrix.shape) > 2 else None
            for start in range(0, part.rows, step):
                stop = min(start + step, part.rows)
                weight[below + start : below + stop] = part.matrix.rows(read, start, stop, entry)
            below += part.rows
        return weight if product is None else weight.addmm_(*product)

    def decode_rows(
        self, stored: Mapping[str, Tensor], partition: RowPartition, rows: Tensor, dtype: torch.dtype
    ) -> Tensor:
        return self.decode(stored, partition, dtype)[rows]

    def encode(self, block: Tensor, partition: RowPartition, group: ShardGroup) -> Encoded:
        raise AssertionError("a weight that stays as it is stored is not encoded")

    def files(self, partition: RowPartition, dtype: torch.dtype) -> dict[str, FileTensor]:
        raise AssertionError("a weight that stays as it is stored is in no residual model")

    def to_files(
        self, shards: Mapping[str, Tensor], partition: RowPartition, rank: int, dtype: torch.dtype
    ) -> Iterator[tuple[str, int, Tensor]]:
        raise AssertionError("a weight that stays as it is stored is in no residual model")

    def from_files(self, read: ReadFile, partition: RowPartition, rank: int) -> dict[str, Tensor]:
        raise AssertionError("a weight that stays as it is stored is in no residual model")

    def __repr__(self) -> str:
        return AS_STORED


@dataclass(frozen=True, kw_only=True, repr=False)
class AsStored(Dense):
    """The formats of a model whose base stays as its checkpoint stores it.

    A matrix that the checkpoint holds dense is dense in `dtype`. What a method leaves of a quantized one is encoded
    again, in the residual format of the same kind.

    Parameters
    ----------
    formats
        Formats of the quantized matrices, by the names that the reader has for their weights.
    """

    formats: Mapping[str, StoredMatrix | BlockFormat] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        return False

    @property
    def stock(self) -> bool:
        return False

    def of_matrix(self, key: str) -> ResidualFormat:
        return self.formats.get(key) or Dense(dtype=self.dtype)

    @cached_property  # the text is asked for once a matrix
    def again(self) -> dict[str, int]:
        """Formats that residuals are encoded in again, and the number of their matrices."""
        return Counter(str(residual) for residual in self.formats.values() if isinstance(residual, BlockFormat))

    def __repr__(self) -> str:
        return AS_STORED if not self.again else f"{AS_STORED}, residuals in {' and '.join(sorted(self.again))}"

    @classmethod
    def of(
        cls,
        plan: Plan,
        reader: DecodingReader,
        dtype: torch.dtype,
        *,
        leaves_residual: Callable[[PlannedMatrix], bool],
    ) -> AsStored:
        """The formats of the matrices of `plan`, from the headers.

        `leaves_residual` says which of them are not kept: a method takes its part from them.

        Raises
        ------
        ModelError
            If a quantized matrix cannot be kept as it is stored, or its residual not be encoded so.
        """
        found: dict[str, StoredMatrix | BlockFormat] = {}
        of_stack: dict[str, StoredMatrix | BlockFormat | None] = {}
        for planned in plan.matrices:
            stored = (_of_residual if leaves_residual(planned) else _stored)(planned.key, reader)
            if stored is not None:
                found[planned.key] = stored
            if planned.expert is not None and of_stack.setdefault(planned.name.partition("[")[0], stored) != stored:
                raise ModelError(
                    f"quantization={AS_STORED!r}: {planned.name} is stored in another layout than the first matrix of "
                    "its stack; pass quantization=NF4(), FP8() or another format to encode it"
                )
        return cls(dtype=dtype, formats=found)


def _stored(key: str, reader: DecodingReader) -> StoredMatrix | None:
    """How the matrix `key` is stored; None if it is dense."""
    pieces, parts = reader.pieces(key), []
    encoded = [reader.encoded(piece.key) for piece in pieces]
    if not any(matrix is not None and matrix.is_quantized for matrix in encoded):
        return None
    for piece, matrix in zip(pieces, encoded, strict=True):
        problem = None
        if matrix is None or not matrix.is_quantized:
            problem = f"only some of the tensors that make it up are quantized ({piece.key} is not)"
        elif not piece.is_ordinary:
            problem = f"it is a part of {piece.key}, or its transpose"
        elif not isinstance(matrix, KEPT):
            problem = f"{reader.encoding} is decoded while it is read, not in a step"
        if problem is not None or matrix is None:
            raise ModelError(
                f"quantization={AS_STORED!r}: {key} cannot be kept: {problem}; pass quantization=NF4(), FP8() or "
                "another format to encode it"
            )
        infos = [reader.stored_reader.stored(name) for name in matrix.tensors]
        shape = matrix.shape
        shapes = [info.shape for info in infos]
        if piece.index is not None:
            shape, shapes = (1, *shape[1:]), [(1, *of[1:]) for of in shapes]
        names = tuple(str(place) for place in range(len(infos)))
        parts.append(
            StoredPart(
                matrix=replace(matrix, shape=shape, tensors=names),
                shapes=tuple(shapes),
                dtypes=tuple(_DTYPES[info.dtype] for info in infos),
            )
        )
    return StoredMatrix(parts=tuple(parts))


def _of_residual(key: str, reader: DecodingReader) -> BlockFormat | None:
    """The residual format of the kind that the matrix `key` is stored in; None if it is dense."""
    encoded = [reader.encoded(piece.key) for piece in reader.pieces(key)]
    if not any(matrix is not None and matrix.is_quantized for matrix in encoded):
        return None
    kinds = {None if matrix is None else _same_kind(matrix, reader) for matrix in encoded}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        raise ModelError(
            f"quantization={AS_STORED!r}: {key} is stored in {reader.encoding}, and no residual format is of the same "
            "kind to encode its residual again; pass init=LoRA() to keep the weights as they are, or quantization="
            "NF4(), FP8() or another format"
        )
    return kind


def _same_kind(matrix: EncodedMatrix, reader: DecodingReader) -> BlockFormat | None:
    """The residual format whose codes are of the kind of a stored matrix; its blocks may be others."""
    if isinstance(matrix, StackedBlocks) or (isinstance(matrix, PackedGroups) and len(matrix.tensors) == 2):
        return MXFP4()
    if isinstance(matrix, ScaledMatrix):
        return {"F8_E4M3": FP8(), "I8": INT8()}.get(reader.stored_reader.stored(matrix.tensors[0]).dtype)
    return None


def read_stored(
    key: str, stored: StoredMatrix, reader: DecodingReader, partition: RowPartition, rank: int
) -> dict[str, Tensor]:
    """Read what `rank` holds of a matrix, as bytes. What is read is counted.

    Raises
    ------
    CheckpointError
        If a value or a scale is NaN or infinite.
    """
    storages, pieces, shards = stored.storages(partition), reader.pieces(key), dict[str, Tensor]()
    for name, index, place, start, stop in stored.bounds(partition, rank):
        piece, part = pieces[index], stored.parts[index]
        matrix = reader.encoded(piece.key)
        assert matrix is not None
        values = _bytes_of(
            matrix.tensors[place], piece.index, part.shapes[place], part.dtypes[place], start, stop, reader
        )
        _check_finite(matrix.tensors[place], values, part.dtypes[place], scales=place == 1)
        shards[name] = torch.nn.functional.pad(values, (0, storages[name].shard_numel - values.numel()))
    return shards


def _bytes_of(
    name: str,
    entry: int | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    start: int,
    stop: int,
    reader: DecodingReader,
) -> Tensor:
    """Bytes ``start:stop`` of a tensor, or of an entry of its first dimension, with `shape` ``[1, ...]``."""
    if start >= stop:
        return torch.empty(0, dtype=torch.uint8)
    inside = shape if entry is None else shape[1:]
    if not inside:  # a scalar
        whole = reader.stored_part(name) if entry is None else reader.stored_part(name, entry)
        return whole.reshape(1).view(torch.uint8)[start:stop]
    width = math.prod(inside[1:]) * dtype.itemsize
    first, last = start // width, -(-stop // width)
    rows = reader.stored_part(name, *(() if entry is None else (entry,)), slice(first, last))
    return rows.reshape(-1).view(torch.uint8)[start - first * width : stop - first * width].clone()


def _check_finite(name: str, values: Tensor, dtype: torch.dtype, *, scales: bool) -> None:
    """Raise CheckpointError if bytes of `dtype` hold a NaN or infinity; scales in bytes are exponents (E8M0)."""
    if str(dtype) == "torch.float8_e8m0fnu" or (scales and dtype == torch.uint8):
        bad = (values == 0xFF).any()
    elif dtype == torch.float8_e4m3fn:
        bad = (values & 0x7F == 0x7F).any()
    elif dtype == torch.float8_e5m2:
        bad = (values & 0x7F >= 0x7C).any()
    elif dtype.is_floating_point and dtype.itemsize > 1:
        bad = ~torch.isfinite(values.view(dtype)).all()
    else:
        return
    if bad:
        raise CheckpointError(f"{name}: holds a NaN or infinity; fetch the model again")
