"""LoRA and QLoRA: a zero adapter beside the (quantized) weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lowrank_dist.linalg import seed_from_name
from lowrank_dist.methods.assembly import layer_shape, sharded, unchanged
from lowrank_dist.methods.base import Decomposition, Matrix, Method
from lowrank_dist.quantization.format import ResidualFormat


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """``A ~ U(-1/sqrt(in), 1/sqrt(in))`` (PEFT's Kaiming initialisation), ``B = 0``; QLoRA where W is quantized.

    Of embeddings, as in PEFT, A is zero and ``B ~ N(0, 1)``. At step 0 the model computes W, or its quantization.

    Parameters
    ----------
    seed
        Mixed with the weight's name into the seed of what is random.

    References
    ----------
    E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1; arXiv:2106.09685.
    T. Dettmers et al., "QLoRA", NeurIPS 2023, equation 5; arXiv:2305.14314.
    """

    seed: int = 0

    @property
    def starts_at_zero(self) -> bool:
        return True

    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        inputs, outputs = layer_shape(matrix)
        generator = torch.Generator().manual_seed(seed_from_name(matrix.name, self.seed))
        if matrix.lookup:
            a = torch.zeros(matrix.rank, inputs)
            b = torch.randn(outputs, matrix.rank, generator=generator)
        else:
            a = (torch.rand(matrix.rank, inputs, generator=generator) * 2 - 1).div_(math.sqrt(inputs))
            b = torch.zeros(outputs, matrix.rank)
        return unchanged(matrix, sharded(matrix, a, b), residual)
