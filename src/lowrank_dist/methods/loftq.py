"""LoftQ: the adapter takes what quantization lost."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowrank_dist.errors import InputError
from lowrank_dist.methods.base import Decomposition, Factors, Matrix, quantization_error, residual_block
from lowrank_dist.methods.principal import AlternatingMethod, with_estimate_of
from lowrank_dist.quantization.format import ResidualFormat


@dataclass(frozen=True, kw_only=True)
class LoftQ(AlternatingMethod):
    """LoRA-fine-tuning-aware quantization: ``Q = quantize(W - B A)``, ``B A = SVD_r(W - Q)``, T times from B A = 0.

    At step 0 the model computes ``Q + scaling * B A``, the rank-r corrected quantization of W.

    Parameters
    ----------
    power_iterations, oversampling, tolerance, seed
        Options of the randomized SVD, see `PrincipalMethod`.
    quantization_iterations
        T, alternations of quantization and SVD.

    References
    ----------
    Y. Li, Y. Yu, C. Liang, P. He, N. Karampatziakis, W. Chen, T. Zhao, "LoftQ: LoRA-Fine-Tuning-Aware Quantization
    for Large Language Models", ICLR 2024, algorithm 1; arXiv:2310.08659.
    """

    def check(self, residual: ResidualFormat) -> None:
        if residual.exact:
            raise InputError(
                "LoftQ corrects a quantization error, but the residual is not quantized; pass quantization=NF4()"
            )

    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        encoded = residual.encode(matrix.block, matrix.partition, matrix.group)
        factors, first = self.principal_factors(matrix, quantization_error(matrix, encoded))
        svd = first
        encoded_from = Factors(left=torch.zeros_like(factors.left), right=torch.zeros_like(factors.right))
        for _ in range(self.quantization_iterations - 1):
            encoded_from = factors
            encoded = residual.encode(residual_block(matrix, factors), matrix.partition, matrix.group)
            factors, svd = self.refined_factors(matrix, quantization_error(matrix, encoded), svd)
        return Decomposition(
            factors=factors,
            residual=encoded,
            ended_on="decompose",
            svd=with_estimate_of(svd, first),
            encoded_from=encoded_from,
        )
