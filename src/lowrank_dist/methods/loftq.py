"""LoftQ: the adapter takes the quantization error."""

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
        T, the number of alternations of quantization and SVD.

    See Also
    --------
    PiSSA : Alternates too, starting from the principal triplets of W.

    References
    ----------
    Y. Li, Y. Yu, C. Liang, P. He, N. Karampatziakis, W. Chen, T. Zhao, "LoftQ: LoRA-Fine-Tuning-Aware Quantization
    for Large Language Models", ICLR 2024, algorithm 1; arXiv:2310.08659.

    Examples
    --------
    Decompose one matrix on one rank:

    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.methods import LoftQ, Matrix
    >>> from lowrank_dist.quantization import NF4
    >>> matrix = Matrix(
    ...     name="layer.weight",
    ...     block=torch.randn(64, 32),
    ...     partition=RowPartition(rows=64, columns=32, world_size=1, block=64),
    ...     group=ShardGroup.single(),
    ...     rank=4,
    ...     scaling=1.0,
    ...     input_first=False,
    ...     factor_dtype=torch.float32,
    ... )
    >>> found = LoftQ(quantization_iterations=5).decompose(matrix, NF4())
    >>> found.ended_on
    'decompose'
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
