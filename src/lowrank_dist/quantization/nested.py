"""Double quantization: absolute maxima of blocks in 8 bits, 256 to a second-level block, as bitsandbytes does it.

The codes are those of bitsandbytes for the whole matrix, on any number of ranks. One all-reduce makes the maximum of a
second-level block that spans two ranks equal on both.

References
----------
T. Dettmers, A. Pagnoni, A. Holtzman, L. Zettlemoyer, "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023,
section 3; arXiv:2305.14314.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from lowrank_dist.distributed.exact_sum import exact_sum
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatPartition, RowPartition

NESTED_BLOCK = 256  # absolute maxima per second-level block, as in bitsandbytes' compress_statistics


@cache
def bitsandbytes() -> ModuleType:
    """Bitsandbytes' functions, which register its operators."""
    import bitsandbytes.functional

    module: ModuleType = bitsandbytes.functional
    return module


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """Values of the codes of maxima, ``[256]`` fp32."""
    return bitsandbytes().create_dynamic_map().to(device)  # type: ignore[no-any-return]


def nested_partition(partition: RowPartition) -> FlatPartition:
    """Even shards of ``[offset, second-level maxima]`` of the whole matrix."""
    return FlatPartition(numel=1 + -(-partition.blocks // NESTED_BLOCK), world_size=partition.world_size)


def quantize_absmax(absmax: Tensor, partition: RowPartition, group: ShardGroup) -> tuple[Tensor, Tensor]:
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
        quantized, _ = torch.ops.bitsandbytes.quantize_blockwise.default(whole, dynamic_map(whole.device), NESTED_BLOCK)
        codes[: last - first] = quantized[mine]
    return codes, torch.cat([offset, second])


def dequantize_absmax(codes: Tensor, nested: Tensor, blocks: Tensor) -> Tensor:
    """Decode `codes` of the absolute maxima of `blocks` (same shape) to fp32; padding uses the last second level."""
    scale = nested[1:][(blocks // NESTED_BLOCK).clamp_(max=nested.numel() - 2)]
    return dynamic_map(codes.device)[codes.int()] * scale + nested[0]


def dequantize_absmax_of_each(codes: Tensor, nested: Tensor) -> Tensor:
    """`dequantize_absmax` of all blocks of several matrices: codes ``[count, blocks]``, nested ``[count, ...]``."""
    blocks = torch.arange(codes.shape[1], device=codes.device) // NESTED_BLOCK
    absmax = dynamic_map(codes.device)[codes.int()]
    return absmax.mul_(nested[:, 1:][:, blocks.clamp_(max=nested.shape[1] - 2)]).add_(nested[:, :1])


def dequantize_all_absmax(codes: Tensor, nested: Tensor) -> Tensor:
    """`dequantize_absmax` of the first blocks of a matrix, in order, by one operator of bitsandbytes."""
    bitsandbytes()
    offset, maxima = nested.split_with_sizes([1, nested.numel() - 1])
    absmax: Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(
        codes, maxima, dynamic_map(codes.device), NESTED_BLOCK, torch.float32
    )
    return absmax.add_(offset)
