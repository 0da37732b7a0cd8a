"""PiSSA and QPiSSA: the adapter takes the principal singular triplets, the frozen residual the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowrank_dist.errors import InputError
from lowrank_dist.linalg import slabs, squared_norm
from lowrank_dist.methods.assembly import subtracted
from lowrank_dist.methods.base import Decomposition, Factors, Matrix, quantization_error, residual_block
from lowrank_dist.methods.principal import AlternatingMethod, with_estimate_of
from lowrank_dist.quantization.format import Encoded, ResidualFormat


@dataclass(frozen=True, kw_only=True)
class PiSSA(AlternatingMethod):
    """Principal singular values and singular vectors adaptation; QPiSSA where the residual is quantized.

    ``scaling * B A = U_r S_r V_r^T`` and ``W_res = W - scaling * B A``. With a quantized residual, T alternations
    ``B A = SVD_r(W - Q(W_res))``, ``W_res = W - scaling * B A`` shrink the error. After the last quantization one
    more SVD gives the factors that fit it better than those it was made with, as a rule; whichever leaves the lower
    ``||W - (Q(W_res) + scaling * B A)||_F`` is kept, and ``Decomposition.ended_on`` says which. T = 1 is plain: it
    ends on the quantization.

    At step 0 the model computes ``Q(W_res) + scaling * B A``: W itself without quantization.

    Parameters
    ----------
    power_iterations, oversampling, tolerance, seed
        Options of the randomized SVD, see `PrincipalMethod`.
    quantization_iterations
        T, quantizations of the residual; 1 is plain PiSSA followed by one quantization.

    References
    ----------
    F. Meng, Z. Wang, M. Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language
    Models", NeurIPS 2024, equations 2-4 and algorithm 1; arXiv:2404.02948.
    """

    def check(self, residual: ResidualFormat) -> None:
        if residual.exact and self.quantization_iterations > 1:
            raise InputError(
                f"PiSSA: quantization_iterations={self.quantization_iterations} alternates SVD and quantization, but "
                "the residual is not quantized; pass quantization=NF4() or leave it at 1"
            )

    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        factors, first = self.principal_factors(matrix, matrix.block)
        if self.quantization_iterations == 1:
            return subtracted(matrix, factors, residual, svd=first)
        svd = first
        encoded = residual.encode(residual_block(matrix, factors), matrix.partition, matrix.group)
        for _ in range(self.quantization_iterations - 1):
            factors, svd = self.refined_factors(matrix, quantization_error(matrix, encoded), svd)
            encoded = residual.encode(residual_block(matrix, factors), matrix.partition, matrix.group)
        refitted, last = self.refined_factors(matrix, quantization_error(matrix, encoded), svd)
        kept, refit = self.errors(matrix, encoded, factors, refitted)
        if refit < kept:
            return Decomposition(
                factors=refitted,
                residual=encoded,
                ended_on="decompose",
                svd=with_estimate_of(last, first),
                encoded_from=factors,
            )
        return Decomposition(factors=factors, residual=encoded, svd=with_estimate_of(svd, first))

    @property
    def refinements(self) -> int:
        return 0 if self.quantization_iterations == 1 else self.quantization_iterations

    @staticmethod
    def errors(matrix: Matrix, encoded: Encoded, *candidates: Factors) -> list[float]:
        """``||W - (Q + scaling * left @ right)||_F^2`` for every candidate. One all-reduce of as many numbers."""
        squares = []
        for factors in candidates:
            error = residual_block(matrix, factors)
            for rows in slabs(error):
                error[rows] -= encoded.rows(rows)
            squares.append(squared_norm(error))
        return matrix.group.sum(torch.stack(squares)).tolist()
