"""4-bit code tables of bitsandbytes (NF4, FP4), encoded shard by shard with its kernels.

Blocks of `block_size` consecutive elements share one absolute maximum, in fp32 or double-quantized
(`lowrank_dist.quantization.nested`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatStorage, RowPartition
from lowrank_dist.quantization.blocks import SizedBlocks
from lowrank_dist.quantization.format import Product, ReadFile
from lowrank_dist.quantization.nested import (
    NESTED_BLOCK,
    bitsandbytes,
    dequantize_absmax,
    dequantize_absmax_of_each,
    dequantize_all_absmax,
    dynamic_map,
    nested_partition,
    quantize_absmax,
)
from lowrank_dist.quantization.state import read_quant_state
from lowrank_dist.storage.layout import QUANT_STATES
from lowrank_dist.storage.reader import FileTensor


@dataclass(frozen=True, kw_only=True)
class FourBit(SizedBlocks):
    """A 4-bit format of bitsandbytes; `name` is what it calls the code table.

    Parameters
    ----------
    block_size
        Number of elements that share one absolute maximum.
    double_quant
        Quantize the absolute maxima to 8 bits too (bitsandbytes' ``compress_statistics``).
    """

    bits: ClassVar[int] = 4
    stock: ClassVar[bool] = True
    double_quant: bool = False

    @property
    def scale_bytes(self) -> int:
        return 1 if self.double_quant else 4

    @classmethod
    def of(cls, block: int, *, nested: bool) -> FourBit:
        return cls(block_size=block, double_quant=nested)

    def encoded(self, values: Tensor) -> tuple[Tensor, Tensor]:
        bitsandbytes()
        if len(values) == 0:
            return values.new_empty(0, dtype=torch.uint8), values.new_empty(0)
        return torch.ops.bitsandbytes.quantize_4bit.default(  # type: ignore[no-any-return]
            values, self.block_size, self.name, torch.uint8
        )

    def decoded(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        return self._dequantize(codes.reshape(-1), scales, (len(scales), self.block_size), dtype)

    def scratch_bytes(self, elements: int, *, stacked: bool = False) -> int:
        if not self.double_quant:
            return 0
        # maxima in fp32; for several matrices at once their codes as int32 and their scales too
        return (3 if stacked else 1) * 4 * elements // self.block_size

    def storages(self, partition: RowPartition) -> dict[str, FlatStorage]:
        storages = super().storages(partition)
        if self.double_quant:
            nested = nested_partition(partition)
            storages["weight_nested"] = FlatStorage(
                numel=nested.numel * 4, shard_numel=nested.shard_numel * 4, dtype=torch.uint8
            )
        return storages

    def stored_scales(
        self, scales: Tensor, partition: RowPartition, group: ShardGroup
    ) -> tuple[dict[str, Tensor], Tensor]:
        """See `BlockFormat`. Double quantization issues two all-reduces, plain maxima none.

        They are that of `exact_sum` and one of ``ceil(m n / (256 block_size))`` fp32.
        """
        if not self.double_quant:
            return super().stored_scales(scales, partition, group)
        codes, nested = quantize_absmax(scales, partition, group)
        first = group.rank * partition.blocks_per_rank
        blocks = torch.arange(first, first + len(codes), device=codes.device)
        start, stop = nested_partition(partition).bounds(group.rank)
        mine = torch.zeros(nested_partition(partition).shard_numel, dtype=torch.float32, device=scales.device)
        mine[: stop - start] = nested[start:stop]
        shards = {"weight_absmax": codes, "weight_nested": mine.view(torch.uint8)}
        return shards, dequantize_absmax(codes, nested, blocks)

    def scales(self, stored: Mapping[str, Tensor], blocks: Tensor) -> Tensor:
        if not self.double_quant:
            return super().scales(stored, blocks)
        nested = stored["weight_nested"].view(torch.float32)
        return dequantize_absmax(stored["weight_absmax"][blocks], nested, blocks)

    def scales_of_stack(self, stored: Mapping[str, Tensor]) -> Tensor:
        if not self.double_quant:
            return super().scales_of_stack(stored)
        nested = stored["weight_nested"].view(torch.float32)
        return dequantize_absmax_of_each(stored["weight_absmax"], nested).reshape(-1)

    def decode_now(
        self, stored: Mapping[str, Tensor], partition: RowPartition, dtype: torch.dtype, product: Product | None
    ) -> Tensor:
        """Decode with the Triton kernel if it runs (`has_kernel`), else with bitsandbytes."""
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
            absmax = dequantize_all_absmax(absmax, stored["weight_nested"].view(torch.float32))
        if rest:
            absmax = torch.nn.functional.pad(absmax, (0, rows * columns // self.block_size - blocks))
        else:
            packed = _first(packed, blocks * self.block_size // 2)
        weight = self._dequantize(packed, absmax, (rows, columns), dtype)
        return weight[: partition.rows] if rest else weight

    def decode_stack(self, stored: Mapping[str, Tensor], partition: RowPartition, dtype: torch.dtype) -> Tensor:
        """See `lowrank_dist.quantization.stacks.decode_stack`. The rows that pad the matrices are decoded too."""
        packed, absmax = stored["weight_packed"], self.scales_of_stack(stored)
        (count, _), rows = packed.shape, partition.padded_rows
        packed, shape = packed.reshape(-1), (count * rows, partition.columns)
        if self.has_kernel(partition, packed.device):
            from lowrank_dist.quantization.nf4_triton import decode

            maps = code_table(self.name, packed.device), dynamic_map(packed.device)
            weights = decode(packed, absmax, None, maps, shape=shape, block_size=self.block_size, dtype=dtype)
        else:
            weights = self._dequantize(packed, absmax, shape, dtype)
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
            (code_table(self.name, device), dynamic_map(device)),
            shape=(partition.rows, partition.columns),
            block_size=self.block_size,
            dtype=dtype,
            product=product,
        )

    def files(self, partition: RowPartition, dtype: torch.dtype) -> dict[str, FileTensor]:
        """The serialization of bitsandbytes' ``Linear4bit``: codes, maxima, code books, and a JSON for the rest."""
        files = super().files(partition, dtype)
        files[".quant_map"] = FileTensor(shape=(16,), dtype=torch.float32)
        if self.double_quant:
            numel = nested_partition(partition).numel - 1
            files[".nested_absmax"] = FileTensor(shape=(numel,), dtype=torch.float32)
            files[".nested_quant_map"] = FileTensor(shape=(256,), dtype=torch.float32)
        return files

    def to_files(
        self, shards: Mapping[str, Tensor], partition: RowPartition, rank: int, dtype: torch.dtype
    ) -> Iterator[tuple[str, int, Tensor]]:
        yield from super().to_files(shards, partition, rank, dtype)
        if self.double_quant:
            start, stop = nested_partition(partition).bounds(rank)
            nested = shards["weight_nested"].view(torch.float32)[: stop - start]
            yield ".nested_absmax", max(start - 1, 0), nested[1 if start == 0 else 0 :]
        if rank == 0:
            yield ".quant_map", 0, code_table(self.name, torch.device("cpu"))
            if self.double_quant:
                yield ".nested_quant_map", 0, dynamic_map(torch.device("cpu"))

    def state(self, partition: RowPartition, dtype: torch.dtype, shards: Mapping[str, Tensor]) -> dict[str, Any]:
        state = super().state(partition, dtype, shards)
        if self.double_quant:  # the shard of rank 0 begins with the offset
            offset = float(shards["weight_nested"].view(torch.float32)[0])
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        return state

    def nested_from_files(self, read: ReadFile, partition: RowPartition, rank: int) -> dict[str, Tensor]:
        if not self.double_quant:
            return {}
        start, stop = nested_partition(partition).bounds(rank)
        nested = read(".nested_absmax", max(start - 1, 0), max(stop - 1, 0))
        if start == 0:
            name = QUANT_STATES[self.name]
            state = read_quant_state(read(name, 0, None), name)
            nested = torch.cat([torch.tensor([state["nested_offset"]], dtype=torch.float32), nested])
        return {"weight_nested": nested.view(torch.uint8)}

    def _dequantize(self, packed: Tensor, absmax: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if 0 in shape:
            return torch.empty(shape, dtype=dtype, device=packed.device)
        # Blocks run over the flattened matrix, so it is passed as rows only if they consist of whole blocks.
        whole = shape[1] % self.block_size == 0
        flat = shape if whole else (shape[0] * shape[1],)
        bitsandbytes()
        out = torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, self.block_size, self.name, flat, dtype)
        return out if whole else out.view(shape)  # type: ignore[no-any-return]


def _first(tensor: Tensor, count: int) -> Tensor:
    """``tensor[:count]`` of a flat tensor, without a slice where there are no more."""
    return tensor if tensor.numel() == count else tensor[:count]


@cache
def _interprets_triton() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def code_table(name: str, device: torch.device) -> Tensor:
    """Values of the codes, ``[16]`` fp32."""
    return bitsandbytes().get_4bit_type(name, device=device)  # type: ignore[no-any-return]
