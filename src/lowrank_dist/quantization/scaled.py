"""Residual formats whose codes are numbers of few bits, decoded with operators of torch: some blocks at a time."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_dist.quantization.blocks import BlockFormat

#: Elements that are decoded at a time, on the CPU and elsewhere: their fp32 values are temporary.
CHUNKS = {"cpu": 2**20, "": 2**25}


@dataclass(frozen=True, kw_only=True)
class ScaledFormat(BlockFormat):
    """A block format that decodes to ``values * scales`` in fp32, rounded to the dtype of the result."""

    @abstractmethod
    def values(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Decode codes ``[k, block_bytes]`` with scales ``[k]``: ``[k, block]`` in fp32."""

    def decoded(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        step = max(1, CHUNKS.get(codes.device.type, CHUNKS[""]) // self.block)
        if len(codes) <= step:
            return self.values(codes, scales).to(dtype)
        out = torch.empty(len(codes), self.block, dtype=dtype, device=codes.device)
        for start in range(0, len(codes), step):
            out[start : start + step] = self.values(codes[start : start + step], scales[start : start + step])
        return out

    def scratch_bytes(self, elements: int, *, stacked: bool = False) -> int:
        # codes of 4 bits are taken apart, become indices and then values; of 8 bits they become values
        return min(elements, max(CHUNKS.values())) * (10 if self.bits == 4 else 8)
