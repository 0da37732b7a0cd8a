"""NF4: the 4-bit NormalFloat of QLoRA, encoded shard by shard with the kernels of bitsandbytes.

References
----------
T. Dettmers, A. Pagnoni, A. Holtzman, L. Zettlemoyer, "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023,
section 3; arXiv:2305.14314.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowrank_dist.quantization.four_bit import FourBit


@dataclass(frozen=True, kw_only=True)
class NF4(FourBit):
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

    name: ClassVar[str] = "nf4"
