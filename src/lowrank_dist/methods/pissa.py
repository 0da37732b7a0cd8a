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

    ``scaling * B A = U_r S_r V_r^T`` and ``W_res = W - scaling * B A``. If the residual is quantized, T alternations of
    ``B A = SVD_r(W - Q(W_res))`` and ``W_res = W - scaling * B A`` reduce the error. One more SVD follows the last
    quantization. Its factors usually fit the encoded residual better than those it was encoded for. The factors with
    the lower ``||W - (Q(W_res) + scaling * B A)||_F`` are kept, and ``Decomposition.ended_on`` says which. T = 1 ends
    on the quantization, without that SVD.

    At step 0 the model computes ``Q(W_res) + scaling * B A``, which is W if nothing is quantized.

    Parameters
    ----------
    power_iterations, oversampling, tolerance, seed
        Options of the randomized SVD, see `PrincipalMethod`.
    quantization_iterations
        T, the number of quantizations of the residual; 1 is plain PiSSA followed by one quantization.

    See Also
    --------
    LoftQ : Puts the quantization error into the adapter instead.
    MiLoRA : Trains the minor triplets.

    References
    ----------
    F. Meng, Z. Wang, M. Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language
    Models", NeurIPS 2024, equations 2-4 and algorithm 1; arXiv:2404.02948.

    Examples
    --------
    Decompose one matrix on one rank:

    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.methods import Matrix, PiSSA
    >>> from lowrank_dist.quantization import Dense
    >>> matrix = Matrix(
    ...     name="layer.weight",
    ...     block=torch.randn(64, 32),
    ...     partition=RowPartition(rows=64, columns=32, world_size=1),
    ...     group=ShardGroup.single(),
    ...     rank=4,
    ...     scaling=1.0,
    ...     input_first=False,
    ...     factor_dtype=torch.float32,
    ... )
    >>> found = PiSSA().decompose(matrix, Dense(dtype=torch.float32))
    >>> torch.allclose(found.factors.left @ found.factors.right, found.svd.u * found.svd.s @ found.svd.vh, atol=1e-5)
    True
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
        """``||W - (Q + scaling * left @ right)||_F^2`` of every candidate. One all-reduce of one number a candidate."""
        squares = []
        for factors in candidates:
            error = residual_block(matrix, factors)
            for rows in slabs(error):
                error[rows] -= encoded.rows(rows)
            squares.append(squared_norm(error))
        return matrix.group.sum(torch.stack(squares)).tolist()
