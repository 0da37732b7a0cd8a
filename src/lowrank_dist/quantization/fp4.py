"""FP4: the 4-bit floating-point code table of bitsandbytes, encoded shard by shard with its kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowrank_dist.quantization.four_bit import FourBit


@dataclass(frozen=True, kw_only=True)
class FP4(FourBit):
    """Residual format: packed FP4 codes with block-wise absolute maxima (4.5 bits per weight; 4.127 double-quantized).

    Parameters
    ----------
    block_size
        Number of elements that share one absolute maximum.
    double_quant
        Quantize the absolute maxima to 8 bits too (bitsandbytes' ``compress_statistics``).

    Raises
    ------
    InputError
        If `block_size` is not one of 64, 128, 256, 512, 1024, 2048 and 4096.

    See Also
    --------
    lowrank_dist.quantization.nf4.NF4 : Smaller errors for normally distributed weights, in as many bytes.
    lowrank_dist.quantization.format.ResidualFormat : What a format implements.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist import FP4
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> residual, w = FP4(), torch.linspace(-1, 1, 32 * 64).view(32, 64)
    >>> partition = RowPartition(rows=32, columns=64, world_size=1, block=residual.block)
    >>> encoded = residual.encode(w, partition, ShardGroup.single())
    >>> bool((encoded.decoded - w).abs().max() <= 1 / 6)
    True
    """

    name: ClassVar[str] = "fp4"
