"""INT8: codes that are 127ths of a block's absolute maximum, the arithmetic of bitsandbytes' LLM.int8 by blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_dist.quantization.blocks import SizedBlocks
from lowrank_dist.quantization.elements import from_int8, to_int8
from lowrank_dist.quantization.scaled import ScaledFormat


@dataclass(frozen=True, kw_only=True)
class INT8(SizedBlocks, ScaledFormat):
    """Residual format: INT8 codes with block-wise absolute maxima (8.5 bits per weight with blocks of 64).

    LLM.int8 takes the maximum of a row; here it is that of `block_size` consecutive elements.

    Parameters
    ----------
    block_size
        Number of elements that share one absolute maximum.

    Raises
    ------
    InputError
        If `block_size` is not one of 64, 128, 256, 512, 1024, 2048 and 4096.

    See Also
    --------
    lowrank_dist.quantization.blocks.BlockFormat : What it has in common with the other formats.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist import INT8
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> residual, w = INT8(), torch.linspace(-1, 1, 32 * 64).view(32, 64)
    >>> partition = RowPartition(rows=32, columns=64, world_size=1, block=residual.block)
    >>> decoded = residual.encode(w, partition, ShardGroup.single()).decoded
    >>> bool((decoded - w).abs().max() <= 0.5001 / 127)
    True
    """

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8

    def encoded(self, values: Tensor) -> tuple[Tensor, Tensor]:
        maxima = values.abs().amax(1, keepdim=True)
        return to_int8(values, maxima).view(torch.uint8), maxima

    def values(self, codes: Tensor, scales: Tensor) -> Tensor:
        return from_int8(codes.view(torch.int8), scales[:, None])
