"""What residual formats of few bits have in common: codes of consecutive elements with one scale for each block.

Blocks run over the flattened matrix, and ranks hold whole blocks (`lowrank_dist.distributed.partition`), so that the
bytes of a matrix do not depend on the number of ranks. A format says how a block becomes codes and a scale, and back;
shards, files, single rows and stacks are the same for all.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatStorage, RowPartition
from lowrank_dist.errors import InputError
from lowrank_dist.quantization.dense import pad_rows
from lowrank_dist.quantization.format import Encoded, Product, ReadFile, ResidualFormat
from lowrank_dist.storage.layout import QUANT_STATES
from lowrank_dist.storage.reader import FileTensor

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
_BY_NAME: dict[str, type[BlockFormat]] = {}
_STATE_BYTES = 256  # fixed size of the JSON beside a weight, whose own length depends on the digits of its numbers


@dataclass(frozen=True, kw_only=True)
class BlockFormat(ABC):
    """A residual format that encodes blocks of consecutive elements, each with a scale.

    See Also
    --------
    lowrank_dist.quantization.NF4, lowrank_dist.quantization.FP4 : 4 bits, code tables of bitsandbytes.
    lowrank_dist.quantization.MXFP4 : 4 bits, scales that are powers of two.
    lowrank_dist.quantization.INT8, lowrank_dist.quantization.FP8 : 8 bits.

    Notes
    -----
    Every rank stores bytes, so that no cast of the model changes them: ``weight_packed`` (codes) and ``weight_absmax``
    (scales).

    Examples
    --------
    All formats, in the order of their bits for each weight of a matrix of 4096 x 4096:

    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.quantization import FP4, FP8, INT8, MXFP4, NF4
    >>> for residual in (NF4(double_quant=True), MXFP4(), FP4(), FP8(), INT8()):
    ...     partition = RowPartition(rows=4096, columns=4096, world_size=1, block=residual.block)
    ...     nbytes = sum(storage.numel for storage in residual.storages(partition).values())
    ...     print(residual, round(8 * nbytes / 4096**2, 3))
    NF4(block_size=64, double_quant=True) 4.127
    MXFP4() 4.25
    FP4(block_size=64, double_quant=False) 4.5
    FP8(block_size=128) 8.25
    INT8(block_size=64) 8.5
    """

    name: ClassVar[str]
    bits: ClassVar[int]
    #: Whether stock transformers loads the files of linear layers.
    stock: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            _BY_NAME[cls.name] = cls

    @property
    @abstractmethod
    def block(self) -> int:
        """Number of elements with one scale."""

    @classmethod
    @abstractmethod
    def of(cls, block: int, *, nested: bool) -> BlockFormat:
        """The format with these blocks, as far as it has a choice."""

    @abstractmethod
    def encoded(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Encode ``[k, block]`` fp32 (k may be 0): codes, uint8, and scales, `scale_bytes` each, in any shape."""

    @abstractmethod
    def decoded(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode codes ``[k, block_bytes]`` uint8 with scales ``[k]``: ``[k, block]`` in `dtype`."""

    def of_matrix(self, key: str) -> ResidualFormat:
        return self

    @property
    def exact(self) -> bool:
        return False

    @property
    def block_bytes(self) -> int:
        """Bytes of the codes of a block."""
        return self.block * self.bits // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of a stored scale: 4 of fp32, or 1."""
        return 4

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype of a stored scale."""
        return torch.float32 if self.scale_bytes == 4 else torch.uint8

    def scratch_bytes(self, elements: int, *, stacked: bool = False) -> int:
        return 0

    def storages(self, partition: RowPartition) -> dict[str, FlatStorage]:
        blocks, per_rank = partition.blocks, partition.blocks_per_rank
        codes = FlatStorage(
            numel=self._code_bytes(partition), shard_numel=per_rank * self.block_bytes, dtype=torch.uint8
        )
        scales = FlatStorage(
            numel=blocks * self.scale_bytes, shard_numel=per_rank * self.scale_bytes, dtype=torch.uint8
        )
        return {"weight_packed": codes, "weight_absmax": scales}

    def encode(self, block: Tensor, partition: RowPartition, group: ShardGroup) -> Encoded:
        """Quantize this rank's real rows, ``[m_p, n]`` fp32.

        Returns
        -------
        Encoded
            Byte shards; `Encoded.rows` dequantizes rows from them on every call. Nothing is communicated, unless the
            format's `stored_scales` says so.
        """
        codes, scales = self.encoded(pad_rows(block, partition).reshape(-1, self.block))
        of_scales, scales = self.stored_scales(scales.flatten(), partition, group)
        shards = {"weight_packed": codes.flatten()} | of_scales
        codes, (height, columns) = shards["weight_packed"].view(-1, self.block_bytes), block.shape

        def rows(some: slice) -> Tensor:
            first, last, _ = some.indices(height)
            # Whole blocks are decoded; the first and the last may hold elements of other rows.
            start, stop = first * columns // self.block, -(-last * columns // self.block)
            values = self.decoded(codes[start:stop], scales[start:stop], torch.float32).view(-1)
            before = first * columns - start * self.block
            return values[before : before + (last - first) * columns].view(last - first, columns)

        return Encoded(shards=shards, rows=rows)

    def stored_scales(
        self, scales: Tensor, partition: RowPartition, group: ShardGroup
    ) -> tuple[dict[str, Tensor], Tensor]:
        """This rank's shards of its scales, and the scales that they stand for."""
        return {"weight_absmax": scales.view(torch.uint8)}, scales

    def scales(self, stored: Mapping[str, Tensor], blocks: Tensor) -> Tensor:
        """Scales of `blocks`, int64, in their shape, of a gathered matrix."""
        return stored["weight_absmax"].view(self.scale_dtype)[blocks]

    def scales_of_stack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Scales of all blocks of several gathered matrices, ``[count * blocks]``."""
        return stored["weight_absmax"].view(self.scale_dtype).reshape(-1)

    def decode(
        self, stored: Mapping[str, Tensor], partition: RowPartition, dtype: torch.dtype, product: Product | None = None
    ) -> Tensor:
        """See `ResidualFormat`."""
        if torch.compiler.is_compiling():
            return _decode_in_graph(self, stored, partition, dtype, product)
        return self.decode_now(stored, partition, dtype, product)

    def decode_now(
        self, stored: Mapping[str, Tensor], partition: RowPartition, dtype: torch.dtype, product: Product | None
    ) -> Tensor:
        """`decode`, not in a graph of ``torch.compile``."""
        blocks, numel = partition.blocks, partition.rows * partition.columns
        codes = stored["weight_packed"].view(-1, self.block_bytes)[:blocks]
        scales = stored["weight_absmax"].view(self.scale_dtype)[:blocks]
        weight = self.decoded(codes, scales, dtype).view(-1)[:numel].view(partition.rows, partition.columns)
        return weight if product is None else weight.addmm_(*product)

    def decode_stack(self, stored: Mapping[str, Tensor], partition: RowPartition, dtype: torch.dtype) -> Tensor:
        """See `lowrank_dist.quantization.stacks.decode_stack`. The rows that pad the matrices are decoded too."""
        count, rows = stored["weight_packed"].shape[0], partition.padded_rows
        codes = stored["weight_packed"].reshape(-1, self.block_bytes)
        weights = self.decoded(codes, self.scales_of_stack(stored), dtype)
        return weights.view(count, rows, partition.columns)[:, : partition.rows]

    def decode_rows(
        self, stored: Mapping[str, Tensor], partition: RowPartition, rows: Tensor, dtype: torch.dtype
    ) -> Tensor:
        size, columns = self.block, partition.columns
        # A row may begin within a block, at any multiple of the common divisor.
        per_row = -(-(size - math.gcd(size, columns) + columns) // size)
        codes = stored["weight_packed"].view(-1, self.block_bytes)
        within = torch.arange(max(per_row * size, columns), device=rows.device)
        blocks = (rows[:, None] * columns // size + within[:per_row]).clamp_(max=len(codes) - 1)
        values = self.decoded(codes[blocks].flatten(0, 1), self.scales(stored, blocks).flatten(), dtype)
        values = values.view(len(rows), per_row * size)
        return values.gather(1, rows[:, None] * columns % size + within[:columns])

    def files(self, partition: RowPartition, dtype: torch.dtype) -> dict[str, FileTensor]:
        """Codes, scales, and a JSON for the rest."""
        return {
            "": FileTensor(shape=(self._code_bytes(partition), 1), dtype=torch.uint8),
            ".absmax": FileTensor(shape=(partition.blocks,), dtype=self.scale_dtype),
            QUANT_STATES[self.name]: FileTensor(shape=(_STATE_BYTES,), dtype=torch.uint8),
        }

    def to_files(
        self, shards: Mapping[str, Tensor], partition: RowPartition, rank: int, dtype: torch.dtype
    ) -> Iterator[tuple[str, int, Tensor]]:
        first, last = partition.block_bounds(rank)
        start, stop = self._code_bounds(partition, rank)
        yield "", start, shards["weight_packed"][: stop - start]
        yield ".absmax", first, shards["weight_absmax"].view(self.scale_dtype)[: last - first]
        if rank == 0:
            text = json.dumps(self.state(partition, dtype, shards)).encode()
            text = text.ljust(_STATE_BYTES)  # JSON may end in spaces
            yield QUANT_STATES[self.name], 0, torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def state(self, partition: RowPartition, dtype: torch.dtype, shards: Mapping[str, Tensor]) -> dict[str, Any]:
        """The JSON beside a weight, given the shards of rank 0."""
        return {
            "quant_type": self.name,
            "blocksize": self.block,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": [partition.rows, partition.columns],
        }

    def from_files(self, read: ReadFile, partition: RowPartition, rank: int) -> dict[str, Tensor]:
        storages = self.storages(partition)
        shards = {
            "weight_packed": read("", *self._code_bounds(partition, rank)),
            "weight_absmax": read(".absmax", *partition.block_bounds(rank)).view(torch.uint8),
        } | self.nested_from_files(read, partition, rank)
        return {
            name: torch.nn.functional.pad(shard, (0, storages[name].shard_numel - shard.numel()))
            for name, shard in shards.items()
        }

    def nested_from_files(self, read: ReadFile, partition: RowPartition, rank: int) -> dict[str, Tensor]:
        """Further shards of `rank`, if scales are encoded themselves."""
        return {}

    def _code_bytes(self, partition: RowPartition) -> int:
        """Bytes of the codes of the whole matrix, without those that pad the last block."""
        return -(-partition.rows * partition.columns * self.bits // 8)

    def _code_bounds(self, partition: RowPartition, rank: int) -> tuple[int, int]:
        first, last = partition.block_bounds(rank)
        return first * self.block_bytes, min(last * self.block_bytes, self._code_bytes(partition))


@dataclass(frozen=True, kw_only=True)
class SizedBlocks(BlockFormat):
    """A block format whose blocks have a size that the user chooses, one of those that bitsandbytes knows."""

    block_size: int = 64

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise InputError(f"{type(self).__name__}: block_size={self.block_size} is not one of {BLOCK_SIZES}")

    @property
    def block(self) -> int:
        return self.block_size

    @classmethod
    def of(cls, block: int, *, nested: bool) -> BlockFormat:
        assert not nested
        return cls(block_size=block)


def _decode_in_graph(
    residual: BlockFormat,
    stored: Mapping[str, Tensor],
    partition: RowPartition,
    dtype: torch.dtype,
    product: Product | None,
) -> Tensor:
    """`BlockFormat.decode` as one operator in the graphs of ``torch.compile``, which does not look inside."""
    packed, absmax, nested = (stored.get(f"weight_{name}") for name in ("packed", "absmax", "nested"))
    left, right = product or (None, None)
    facts = partition.rows, partition.columns, partition.world_size, residual.block
    weight: Tensor = _decode_opaquely(packed, absmax, nested, left, right, *facts, residual.name, dtype)
    return weight


@torch.library.custom_op(
    "lowrank_dist::decode_blocks",
    mutates_args=(),
    schema=(
        "(Tensor packed, Tensor absmax, Tensor? nested, Tensor? left, Tensor? right, SymInt rows, SymInt columns, "
        "SymInt world_size, SymInt block, str name, ScalarType dtype) -> Tensor"
    ),
)
def _decode_opaquely(
    packed: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    rows: int,
    columns: int,
    world_size: int,
    block: int,
    name: str,
    dtype: torch.dtype,
) -> Tensor:
    stored = {"weight_packed": packed, "weight_absmax": absmax}
    if nested is not None:
        stored["weight_nested"] = nested
    partition = RowPartition(rows=rows, columns=columns, world_size=world_size, block=block)
    product = None if left is None or right is None else (left, right)
    return _BY_NAME[name].of(block, nested=nested is not None).decode_now(stored, partition, dtype, product)


@_decode_opaquely.register_fake
def _shape_of_decoded(packed: Tensor, *args: Any) -> Tensor:
    *_, rows, columns, _, _, _, dtype = args
    return packed.new_empty((rows, columns), dtype=dtype)
