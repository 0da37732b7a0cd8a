"""FP8: values in E4M3 with a scale in fp32 for every block, the arithmetic of compressed-tensors' groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_dist.quantization.blocks import SizedBlocks
from lowrank_dist.quantization.elements import E4M3_MAX, to_e4m3
from lowrank_dist.quantization.scaled import ScaledFormat

_SMALLEST_SCALE = torch.finfo(torch.float32).eps  # of a block of zeros, as in compressed-tensors


@dataclass(frozen=True, kw_only=True)
class FP8(SizedBlocks, ScaledFormat):
    """Residual format: FP8 (E4M3) values with block-wise scales (8.25 bits per weight with blocks of 128).

    The scale is the block's absolute maximum divided by 448, the largest value of E4M3.

    Parameters
    ----------
    block_size
        Number of elements that share one scale.

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
    >>> from lowrank_dist import FP8
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> residual, w = FP8(), torch.linspace(-1, 1, 32 * 128).view(32, 128)
    >>> partition = RowPartition(rows=32, columns=128, world_size=1, block=residual.block)
    >>> decoded = residual.encode(w, partition, ShardGroup.single()).decoded
    >>> bool((decoded - w).abs().max() <= 1 / 28)
    True
    """

    name: ClassVar[str] = "fp8"
    bits: ClassVar[int] = 8
    block_size: int = 128

    def encoded(self, values: Tensor) -> tuple[Tensor, Tensor]:
        scales = values.abs().amax(1, keepdim=True) / E4M3_MAX
        scales = torch.where(scales == 0, _SMALLEST_SCALE, scales)
        return to_e4m3(values, scales).view(torch.uint8), scales

    def values(self, codes: Tensor, scales: Tensor) -> Tensor:
        return codes.view(torch.float8_e4m3fn).to(torch.float32).mul_(scales[:, None])
