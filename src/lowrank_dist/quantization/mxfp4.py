"""MXFP4: codes of E2M1 in groups of 32 with a power of two as scale, the arithmetic of compressed-tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowrank_dist.quantization.blocks import BlockFormat
from lowrank_dist.quantization.elements import MX_GROUP, exponential, mx_exponents, packed, unpacked
from lowrank_dist.quantization.scaled import ScaledFormat


@dataclass(frozen=True, kw_only=True)
class MXFP4(ScaledFormat):
    """Residual format: E2M1 codes in groups of 32 with an exponent of two in a byte (4.25 bits per weight).

    See Also
    --------
    lowrank_dist.quantization.blocks.BlockFormat : What it has in common with the other formats.

    References
    ----------
    Open Compute Project, "OCP Microscaling Formats (MX) Specification", version 1.0, 2023.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist import MXFP4
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> residual, w = MXFP4(), torch.tensor([[0.5, -1.0, 3.0, 6.0, 0.3, 2.4, 5.0, -0.1] * 4])
    >>> partition = RowPartition(rows=1, columns=32, world_size=1, block=residual.block)
    >>> residual.encode(w, partition, ShardGroup.single()).decoded[0, :8]
    tensor([ 0.5000, -1.0000,  3.0000,  6.0000,  0.5000,  2.0000,  4.0000, -0.0000])
    """

    name: ClassVar[str] = "mxfp4"
    bits: ClassVar[int] = 4

    @property
    def block(self) -> int:
        return MX_GROUP

    @property
    def scale_bytes(self) -> int:
        return 1

    @classmethod
    def of(cls, block: int, *, nested: bool) -> BlockFormat:
        assert block == MX_GROUP
        assert not nested
        return cls()

    def encoded(self, values: Tensor) -> tuple[Tensor, Tensor]:
        exponents = mx_exponents(values.abs().amax(1))
        return packed(values / exponential(exponents)[:, None]), exponents

    def values(self, codes: Tensor, scales: Tensor) -> Tensor:
        return unpacked(codes).mul_(exponential(scales)[:, None])
