"""PiSSA and QPiSSA: the adapter takes the principal singular triplets, the frozen residual the rest."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_dist.methods.base import Decomposition, Matrix, residual_block
from lowrank_dist.methods.principal import AlternatingMethod
from lowrank_dist.residual import ResidualFormat


@dataclass(frozen=True, kw_only=True)
class PiSSA(AlternatingMethod):
    """Principal singular values and singular vectors adaptation; QPiSSA where the residual is quantized.

    ``scaling * B A = U_r S_r V_r^T`` and ``W_res = W - scaling * B A``. With a quantized residual, T alternations
    ``B A = SVD_r(W - Q(W_res))``, ``W_res = W - scaling * B A`` shrink the error; the result ends on the quantization.
    At step 0 the model computes ``Q(W_res) + scaling * B A``: W itself without quantization.

    Parameters
    ----------
    power_iterations, oversampling, seed
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
            raise ValueError(
                f"PiSSA: quantization_iterations={self.quantization_iterations} alternates SVD and quantization, but "
                "the residual is not quantized; pass quantization=NF4() or leave it at 1"
            )

    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        factors, start = self.principal_factors(matrix, matrix.block)
        encoded = residual.encode(residual_block(matrix, factors), matrix.partition, matrix.group)
        for _ in range(self.quantization_iterations - 1):
            factors, start = self.refined_factors(matrix, matrix.block - encoded.decoded, start)
            encoded = residual.encode(residual_block(matrix, factors), matrix.partition, matrix.group)
        return Decomposition(factors=factors, residual=encoded)
