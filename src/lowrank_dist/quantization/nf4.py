"""NF4: the 4-bit NormalFloat of QLoRA, encoded shard by shard with the kernels of bitsandbytes.

Blocks of `block_size` consecutive elements share one absolute maximum. Ranks hold whole blocks
(`lowrank_dist.distributed.partition`), so quantizing a shard gives the same bytes as quantizing the whole matrix.
Double quantization stores the maxima themselves in 8 bits, 256 to a second-level block. One all-reduce makes the
maximum of a second-level block that spans two ranks equal on both.

References
----------
T. Dettmers, A. Pagnoni, A. Holtzman, L. Zettlemoyer, "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023,
section 3; arXiv:2305.14314.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowrank_dist.distributed.exact_sum import exact_sum
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatPartition, FlatStorage, RowPartition
from lowrank_dist.errors import InputError
from lowrank_dist.quantization.dense import Dense, pad_rows
from lowrank_dist.quantization.format import Encoded, Product, ReadFile, ResidualFormat
from lowrank_dist.storage.dtypes import NAMED_DTYPES
from lowrank_dist.storage.layout import QUANT_STATE
from lowrank_dist.storage.parse import Record, is_flag, is_integer, is_list_of, is_number, parse_object
from lowrank_dist.storage.reader import FileTensor

NESTED_BLOCK = 256  # absolute maxima per second-level block, as in bitsandbytes' compress_statistics
_STATE_BYTES = 256  # fixed size of the JSON beside a weight, whose own length depends on the digits of its numbers
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)


@cache
def _bitsandbytes() -> ModuleType:
    import bitsandbytes.functional

    module: ModuleType = bitsandbytes.functional
    return module


@dataclass(frozen=True, kw_only=True)
class NF4:
    """Residual format: packed NF4 codes with block-wise absolute maxima (4.5 bits per weight; 4.127 double-quantized).

    Parameters
    ----------
    block_size
        Number of elements that share one absolute maximum.
    double_quant
        Quantize the absolute maxima to 8 bits too (QLoRA's double quantization; bitsandbytes'
        ``compress_statistics``).

    Raises
    ------
    InputError
        If `block_size` is not one of 64, 128, 256, 512, 1024, 2048 and 4096.

    See Also
    --------
    lowrank_dist.quantization.dense.Dense : Stores floating-point values.
    lowrank_dist.quantization.format.ResidualFormat : What a format implements.

    Notes
    -----
    Every rank stores bytes, so that no cast of the model changes them: ``weight_packed`` (two codes to a byte),
    ``weight_absmax`` (fp32, or one 8-bit code each) and, if double-quantized, ``weight_nested`` (fp32: the offset, then
    the second-level maxima of the whole matrix, sharded evenly over the ranks).

    Examples
    --------
    As an option of the strategy:

    >>> from lowrank_dist import NF4
    >>> NF4(double_quant=True)
    NF4(block_size=64, double_quant=True)

    Encode and decode a matrix on a single rank:

    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> residual, w = NF4(), torch.linspace(-1, 1, 32 * 64).view(32, 64)
    >>> partition = RowPartition(rows=32, columns=64, world_size=1, block=residual.block)
    >>> encoded = residual.encode(w, partition, ShardGroup.single())
    >>> decoded = residual.decode(encoded.shards, partition, torch.float32)
    >>> decoded.shape, bool((decoded - w).abs().max() < 0.16)
    (torch.Size([32, 64]), True)
    """

    block_size: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise InputError(f"NF4: block_size={self.block_size} is not one of {BLOCK_SIZES}")

    @property
    def block(self) -> int:
        return self.block_size

    @property
    def exact(self) -> bool:
        return False

    def storages(self, partition: RowPartition) -> dict[str, FlatStorage]:
        def of_bytes(units: int, per_rank: int, size: int) -> FlatStorage:
            return FlatStorage(numel=units * size, shard_numel=per_rank * size, dtype=torch.uint8)

        blocks, per_rank = partition.blocks, partition.blocks_per_rank
        storages = {
            "weight_packed": FlatStorage(
                numel=_packed_bytes(partition), shard_numel=per_rank * self.block_size // 2, dtype=torch.uint8
            ),
            "weight_absmax": of_bytes(blocks, per_rank, 1 if self.double_quant else 4),
        }
        if self.double_quant:
            nested = _nested_partition(partition)
            storages["weight_nested"] = of_bytes(nested.numel, nested.shard_numel, 4)
        return storages

    def encode(self, block: Tensor, partition: RowPartition, group: ShardGroup) -> Encoded:
        """Quantize this rank's real rows, ``[m_p, n]`` fp32.

        Returns
        -------
        Encoded
            Byte shards; `Encoded.rows` dequantizes rows from them on every call. Double quantization issues two
            all-reduces (that of `exact_sum` and one of ``ceil(m n / (256 block_size))`` fp32), plain NF4 none.
        """
        _bitsandbytes()
        rows = pad_rows(block, partition)
        if rows.shape[0] == 0:
            packed = torch.empty(0, dtype=torch.uint8, device=block.device)
            absmax = torch.empty(0, dtype=torch.float32, device=block.device)
        else:
            packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(rows, self.block_size, "nf4", torch.uint8)
        shards = {"weight_packed": packed.flatten()}
        if self.double_quant:
            codes, nested = _quantize_absmax(absmax, partition, group)
            first = group.rank * partition.blocks_per_rank
            absmax = _dequantize_absmax(codes, nested, torch.arange(first, first + len(codes), device=codes.device))
            start, stop = _nested_partition(partition).bounds(group.rank)
            mine = torch.zeros(_nested_partition(partition).shard_numel, dtype=torch.float32, device=block.device)
            mine[: stop - start] = nested[start:stop]
            shards |= {"weight_absmax": codes, "weight_nested": mine.view(torch.uint8)}
        else:
            shards["weight_absmax"] = absmax.view(torch.uint8)
        height, columns = block.shape

        def decoded(some: slice) -> Tensor:
            first, last, _ = some.indices(height)
            # Whole blocks are decoded; the first and the last may hold elements of other rows.
            start, stop = first * columns // self.block_size, -(-last * columns // self.block_size)
            codes = shards["weight_packed"][start * self.block_size // 2 : stop * self.block_size // 2]
            flat = (1, 2 * len(codes))
            values = _dequantize(codes, absmax[start:stop], self.block_size, flat, torch.float32)
            before = first * columns - start * self.block_size
            return values[0, before : before + (last - first) * columns].view(last - first, columns)

        return Encoded(shards=shards, rows=decoded)

    def decode(
        self, stored: Mapping[str, Tensor], partition: RowPartition, dtype: torch.dtype, product: Product | None = None
    ) -> Tensor:
        """Decode with the Triton kernel if it runs (`has_kernel`), else with bitsandbytes; see `ResidualFormat`."""
        if torch.compiler.is_compiling():
            packed, absmax, nested = (stored.get(f"weight_{name}") for name in ("packed", "absmax", "nested"))
            left, right = product or (None, None)
            facts = partition.rows, partition.columns, partition.world_size, self.block_size
            weight: Tensor = _decode_opaquely(packed, absmax, nested, left, right, *facts, dtype)
            return weight
        if self.has_kernel(partition, stored["weight_packed"].device):
            return self.decode_with_kernel(stored, partition, dtype, product)
        weight = self.decode_with_bitsandbytes(stored, partition, dtype)
        return weight if product is None else weight.addmm_(*product)

    def decode_with_bitsandbytes(
        self, stored: Mapping[str, Tensor], partition: RowPartition, dtype: torch.dtype
    ) -> Tensor:
        """`decode` with the operators of bitsandbytes, without a product."""
        packed, absmax, rows, columns = (
            stored["weight_packed"],
            stored["weight_absmax"],
            partition.rows,
            partition.columns,
        )
        if not self.double_quant:
            absmax = absmax.view(torch.float32)
        blocks, rest = divmod(rows * columns, self.block_size)
        if rest:  # the last real block ends in a row of padding
            blocks += 1
            rows = partition.padded_rows
        # what pads shards is left out, where there is any
        absmax = _first(absmax, blocks)
        if self.double_quant:
            absmax = _dequantize_all_absmax(absmax, stored["weight_nested"].view(torch.float32))
        if rest:
            absmax = torch.nn.functional.pad(absmax, (0, rows * columns // self.block_size - blocks))
        else:
            packed = _first(packed, blocks * self.block_size // 2)
        weight = _dequantize(packed, absmax, self.block_size, (rows, columns), dtype)
        return weight[: partition.rows] if rest else weight

    def decode_stack(self, stored: Mapping[str, Tensor], partition: RowPartition, dtype: torch.dtype) -> Tensor:
        """See `lowrank_dist.quantization.stacks.decode_stack`. The rows that pad the matrices are decoded too."""
        packed, absmax = stored["weight_packed"], stored["weight_absmax"]
        if self.double_quant:
            absmax = _dequantize_absmax_of_each(absmax, stored["weight_nested"].view(torch.float32))
        else:
            absmax = absmax.view(torch.float32)
        (count, _), rows = packed.shape, partition.padded_rows
        packed, absmax, shape = packed.reshape(-1), absmax.reshape(-1), (count * rows, partition.columns)
        if self.has_kernel(partition, packed.device):
            from lowrank_dist.quantization.nf4_triton import decode

            maps = _nf4_map(packed.device), _dynamic_map(packed.device)
            weights = decode(packed, absmax, None, maps, shape=shape, block_size=self.block_size, dtype=dtype)
        else:
            weights = _dequantize(packed, absmax, self.block_size, shape, dtype)
        return weights.view(count, rows, partition.columns)[:, : partition.rows]

    def has_kernel(self, partition: RowPartition, device: torch.device) -> bool:
        """Whether Triton can decode the matrix: rows consist of whole blocks, on CUDA or in Triton's interpreter."""
        runs = device.type == "cuda" or _interprets_triton()
        return runs and partition.columns % self.block_size == 0 and _has_triton()

    def decode_with_kernel(
        self, stored: Mapping[str, Tensor], partition: RowPartition, dtype: torch.dtype, product: Product | None = None
    ) -> Tensor:
        """`decode` with the Triton kernel; requires `has_kernel`."""
        from lowrank_dist.quantization.nf4_triton import decode

        absmax, nested, device = stored["weight_absmax"], None, stored["weight_packed"].device
        if self.double_quant:
            nested = stored["weight_nested"].view(torch.float32)
        else:
            absmax = absmax.view(torch.float32)
        return decode(
            stored["weight_packed"],
            absmax,
            nested,
            (_nf4_map(device), _dynamic_map(device)),
            shape=(partition.rows, partition.columns),
            block_size=self.block_size,
            dtype=dtype,
            product=product,
        )

    def decode_rows(
        self, stored: Mapping[str, Tensor], partition: RowPartition, rows: Tensor, dtype: torch.dtype
    ) -> Tensor:
        _bitsandbytes()
        size, columns = self.block_size, partition.columns
        # A row may begin within a block, at any multiple of the common divisor.
        per_row = -(-(size - math.gcd(size, columns) + columns) // size)
        packed = stored["weight_packed"].view(-1, size // 2)
        within = torch.arange(max(per_row * size, columns), device=rows.device)
        blocks = (rows[:, None] * columns // size + within[:per_row]).clamp_(max=len(packed) - 1)
        if self.double_quant:
            absmax = _dequantize_absmax(
                stored["weight_absmax"][blocks], stored["weight_nested"].view(torch.float32), blocks
            )
        else:
            absmax = stored["weight_absmax"].view(torch.float32)[blocks]
        shape = (len(rows) * per_row, size)
        values = _dequantize(packed[blocks].flatten(), absmax.flatten(), size, shape, dtype).view(
            len(rows), per_row * size
        )
        return values.gather(1, rows[:, None] * columns % size + within[:columns])

    def files(self, partition: RowPartition, dtype: torch.dtype) -> dict[str, FileTensor]:
        """The serialization of bitsandbytes' ``Linear4bit``: codes, maxima, code books, and a JSON for the rest."""
        uint8, fp32 = torch.uint8, torch.float32
        blocks = partition.blocks
        files = {
            "": FileTensor(shape=(_packed_bytes(partition), 1), dtype=uint8),
            ".absmax": FileTensor(shape=(blocks,), dtype=uint8 if self.double_quant else fp32),
            ".quant_map": FileTensor(shape=(16,), dtype=fp32),
            QUANT_STATE: FileTensor(shape=(_STATE_BYTES,), dtype=uint8),
        }
        if self.double_quant:
            files[".nested_absmax"] = FileTensor(shape=(_nested_partition(partition).numel - 1,), dtype=fp32)
            files[".nested_quant_map"] = FileTensor(shape=(256,), dtype=fp32)
        return files

    def to_files(
        self, shards: Mapping[str, Tensor], partition: RowPartition, rank: int, dtype: torch.dtype
    ) -> Iterator[tuple[str, int, Tensor]]:
        first, last = partition.block_bounds(rank)
        start = first * self.block_size // 2
        stop = min(last * self.block_size // 2, _packed_bytes(partition))
        yield "", start, shards["weight_packed"][: stop - start]
        absmax = shards["weight_absmax"] if self.double_quant else shards["weight_absmax"].view(torch.float32)
        yield ".absmax", first, absmax[: last - first]
        state = {
            "quant_type": "nf4",
            "blocksize": self.block_size,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": [partition.rows, partition.columns],
        }
        if self.double_quant:
            start, stop = _nested_partition(partition).bounds(rank)
            nested = shards["weight_nested"].view(torch.float32)[: stop - start]
            yield ".nested_absmax", max(start - 1, 0), nested[1 if start == 0 else 0 :]
            if rank == 0:  # its shard begins with the offset
                state |= {
                    "nested_blocksize": NESTED_BLOCK,
                    "nested_dtype": "float32",
                    "nested_offset": float(nested[0]),
                }
                yield ".nested_quant_map", 0, _dynamic_map(torch.device("cpu"))
        if rank == 0:
            yield ".quant_map", 0, _nf4_map(torch.device("cpu"))
            text = json.dumps(state).encode().ljust(_STATE_BYTES)  # JSON may end in spaces
            yield QUANT_STATE, 0, torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def from_files(self, read: ReadFile, partition: RowPartition, rank: int) -> dict[str, Tensor]:
        first, last = partition.block_bounds(rank)
        storages = self.storages(partition)
        start = first * self.block_size // 2
        stop = min(last * self.block_size // 2, _packed_bytes(partition))
        shards = {
            "weight_packed": read("", start, stop),
            "weight_absmax": read(".absmax", first, last).view(torch.uint8),
        }
        if self.double_quant:
            start, stop = _nested_partition(partition).bounds(rank)
            nested = read(".nested_absmax", max(start - 1, 0), max(stop - 1, 0))
            if start == 0:
                state = read_quant_state(read(QUANT_STATE, 0, None), QUANT_STATE)
                nested = torch.cat([torch.tensor([state["nested_offset"]], dtype=torch.float32), nested])
            shards["weight_nested"] = nested.view(torch.uint8)
        return {
            name: torch.nn.functional.pad(shard, (0, storages[name].shard_numel - shard.numel()))
            for name, shard in shards.items()
        }


@torch.library.custom_op(
    "lowrank_dist::decode_nf4",
    mutates_args=(),
    schema=(
        "(Tensor packed, Tensor absmax, Tensor? nested, Tensor? left, Tensor? right, SymInt rows, SymInt columns, "
        "SymInt world_size, SymInt block_size, ScalarType dtype) -> Tensor"
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
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """`NF4.decode` as one operator in the graphs of ``torch.compile``, which does not look inside."""
    stored = {"weight_packed": packed, "weight_absmax": absmax}
    if nested is not None:
        stored["weight_nested"] = nested
    partition = RowPartition(rows=rows, columns=columns, world_size=world_size, block=block_size)
    product = None if left is None or right is None else (left, right)
    return NF4(block_size=block_size, double_quant=nested is not None).decode(stored, partition, dtype, product)


@_decode_opaquely.register_fake
def _shape_of_decoded(packed: Tensor, *args: Any) -> Tensor:
    *_, rows, columns, _, _, dtype = args
    return packed.new_empty((rows, columns), dtype=dtype)


def read_quant_state(values: Tensor, where: str) -> dict[str, Any]:
    """Parse the JSON that bitsandbytes keeps beside a 4-bit weight (``<weight>.quant_state.bitsandbytes__nf4``).

    Raises
    ------
    CheckpointError
        If it is damaged; `where` begins the message.
    """
    state = Record(parse_object(values.numpy().tobytes(), where), where)
    state.expect("shape", lambda v: is_list_of(is_integer)(v) and len(v) == 2, "two sizes")
    state.integer("blocksize", low=1, high=2**20)
    state.text("quant_type")
    if "nested_blocksize" in state:
        state.integer("nested_blocksize", low=1, high=2**20)
        state.expect("nested_offset", is_number, "a number")
    return state


def _packed_bytes(partition: RowPartition) -> int:
    """Bytes of the codes of the whole matrix, without those that pad the last block."""
    return -(-partition.rows * partition.columns // 2)


def _nested_partition(partition: RowPartition) -> FlatPartition:
    """Even shards of ``[offset, second-level maxima]`` of the whole matrix."""
    return FlatPartition(numel=1 + -(-partition.blocks // NESTED_BLOCK), world_size=partition.world_size)


def _dequantize(packed: Tensor, absmax: Tensor, block_size: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device=packed.device)
    # Blocks run over the flattened matrix, so it is passed as rows only if they consist of whole blocks.
    whole = shape[1] % block_size == 0
    flat = shape if whole else (shape[0] * shape[1],)
    _bitsandbytes()
    out = torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, block_size, "nf4", flat, dtype)
    return out if whole else out.view(shape)  # type: ignore[no-any-return]


def _first(tensor: Tensor, count: int) -> Tensor:
    """``tensor[:count]`` of a flat tensor, without a slice where there are no more."""
    return tensor if tensor.numel() == count else tensor[:count]


def _quantize_absmax(absmax: Tensor, partition: RowPartition, group: ShardGroup) -> tuple[Tensor, Tensor]:
    """Second-level quantization of row-sharded absolute maxima.

    Parameters
    ----------
    absmax
        ``[blocks_per_rank]`` fp32, row-sharded; entries beyond the last real block are padding.

    Returns
    -------
    codes
        ``[blocks_per_rank]`` uint8, row-sharded; padding has code 0.
    nested
        ``[1 + ceil(blocks / 256)]`` fp32, replicated: the mean of all maxima, then the second-level maxima. The mean is
        that of the exact sum, so that it does not depend on the world size.

    Notes
    -----
    Two all-reduces: that of `exact_sum` and one of ``ceil(blocks / 256)`` fp32.
    """
    first, last = partition.block_bounds(group.rank)
    real = absmax[: last - first]
    offset = absmax.new_tensor([exact_sum(real, group) / partition.blocks])
    centred = real - offset
    second = torch.zeros(-(-partition.blocks // NESTED_BLOCK), dtype=torch.float32, device=absmax.device)
    index = torch.arange(first, last, device=absmax.device) // NESTED_BLOCK
    group.max(second.scatter_reduce_(0, index, centred.abs(), "amax"))

    codes = torch.zeros(absmax.numel(), dtype=torch.uint8, device=absmax.device)
    if last > first:
        # Place this rank's maxima in whole second-level blocks. The slots of other ranks hold the block's maximum, so
        # that the kernel finds the maximum of the whole block.
        start, stop = first // NESTED_BLOCK, -(-last // NESTED_BLOCK)
        whole = second[start:stop].repeat_interleave(NESTED_BLOCK)
        mine = slice(first - start * NESTED_BLOCK, last - start * NESTED_BLOCK)
        whole[mine] = centred
        quantized, _ = torch.ops.bitsandbytes.quantize_blockwise.default(
            whole, _dynamic_map(whole.device), NESTED_BLOCK
        )
        codes[: last - first] = quantized[mine]
    return codes, torch.cat([offset, second])


def _dequantize_absmax(codes: Tensor, nested: Tensor, blocks: Tensor) -> Tensor:
    """Decode `codes` of the absolute maxima of `blocks` (same shape) to fp32; padding uses the last second level."""
    scale = nested[1:][(blocks // NESTED_BLOCK).clamp_(max=nested.numel() - 2)]
    return _dynamic_map(codes.device)[codes.int()] * scale + nested[0]


def _dequantize_absmax_of_each(codes: Tensor, nested: Tensor) -> Tensor:
    """`_dequantize_absmax` of all blocks of several matrices: codes ``[count, blocks]``, nested ``[count, ...]``."""
    blocks = torch.arange(codes.shape[1], device=codes.device) // NESTED_BLOCK
    absmax = _dynamic_map(codes.device)[codes.int()]
    return absmax.mul_(nested[:, 1:][:, blocks.clamp_(max=nested.shape[1] - 2)]).add_(nested[:, :1])


def _dequantize_all_absmax(codes: Tensor, nested: Tensor) -> Tensor:
    """`_dequantize_absmax` of the first blocks of a matrix, in order, by one operator of bitsandbytes."""
    _bitsandbytes()
    offset, maxima = nested.split_with_sizes([1, nested.numel() - 1])
    absmax: Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(
        codes, maxima, _dynamic_map(codes.device), NESTED_BLOCK, torch.float32
    )
    return absmax.add_(offset)


@cache
def _interprets_triton() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _nf4_map(device: torch.device) -> Tensor:
    return _bitsandbytes().get_4bit_type("nf4", device=device)  # type: ignore[no-any-return]


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    return _bitsandbytes().create_dynamic_map().to(device)  # type: ignore[no-any-return]


def format_as_dict(residual: ResidualFormat) -> dict[str, Any]:
    """Describe a residual format for a manifest, by its name and its options."""
    if isinstance(residual, NF4):
        return {"format": "nf4", "block_size": residual.block_size, "double_quant": residual.double_quant}
    return {"format": "dense", "dtype": str(getattr(residual, "dtype", None)).removeprefix("torch.")}


def format_from_dict(values: Mapping[str, Any]) -> ResidualFormat:
    """The residual format that `format_as_dict` described."""
    values = Record(values, "the residual format in the manifest")
    if values.text("format") == "nf4":
        return NF4(
            block_size=values.integer("block_size"),
            double_quant=values.expect("double_quant", is_flag, "true or false"),
        )
    return Dense(dtype=NAMED_DTYPES[values.expect("dtype", lambda name: name in NAMED_DTYPES, "a dtype")])
