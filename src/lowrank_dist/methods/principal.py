"""Options and arithmetic shared by the methods that take the leading singular triplets of a matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lowrank_dist.linalg import randomized_svd, seed_from_name
from lowrank_dist.methods.base import Factors, Matrix, Method


@dataclass(frozen=True, kw_only=True)
class PrincipalMethod(Method):
    """Options of the randomized SVD.

    Parameters
    ----------
    power_iterations
        Passes over W W^T that sharpen the subspace. The excess residual they leave depends on the spectrum: on matrices
        of SmolLM2-135M 4e-4 to 2e-3 after 4, 2e-6 to 4e-4 after 8 (r = 64 and 16, oversampling r; docs/log.md).
    oversampling
        Directions carried beyond r and dropped at the end. Default: r.
    seed
        Mixed with the weight's name into the seed of the test matrix.
    """

    power_iterations: int = 4
    oversampling: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.power_iterations < 0:
            raise ValueError(f"{self}: power_iterations={self.power_iterations} must not be negative")
        if self.oversampling is not None and self.oversampling < 0:
            raise ValueError(f"{self}: oversampling={self.oversampling} must not be negative")

    def principal_factors(self, matrix: Matrix, block: Tensor, start: Tensor | None = None) -> tuple[Factors, Tensor]:
        """Rank-r factors of `block` (``[m_p, n]``, rows of a matrix partitioned like `matrix`).

        Both factors carry ``sqrt(S / scaling)``, so that ``scaling * left @ right = U S V^T`` ([PiSSA], eq. 2-3).

        Returns
        -------
        factors
            Rounded to ``matrix.factor_dtype``.
        right_vectors
            ``[n, r]`` fp32, replicated: a warm start for the next decomposition of a similar matrix.
        """
        svd = randomized_svd(
            block,
            matrix.rank,
            rows=matrix.partition.rows,
            group=matrix.group,
            seed=seed_from_name(matrix.name, self.seed),
            oversampling=self.oversampling,
            power_iterations=self.power_iterations,
            start=start,
        )
        root = (svd.s / matrix.scaling).sqrt()
        factors = Factors(left=svd.u * root, right=root[:, None] * svd.vh)
        return factors.rounded(matrix.factor_dtype), svd.vh.mT


@dataclass(frozen=True, kw_only=True)
class AlternatingMethod(PrincipalMethod):
    """A principal method that alternates with the quantization of the residual.

    The rounds after the first start from the right singular vectors of the round before and take two power iterations
    at most: the matrix has changed by a quantization error only, and more of them do not lower the error
    (docs/log.md).

    Parameters
    ----------
    quantization_iterations
        T, quantizations of the residual.
    """

    quantization_iterations: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantization_iterations < 1:
            raise ValueError(f"{self}: quantization_iterations={self.quantization_iterations} must be at least 1")

    def refined_factors(self, matrix: Matrix, block: Tensor, start: Tensor) -> tuple[Factors, Tensor]:
        """`principal_factors` of a `block` that differs little from the one that `start` came from."""
        return replace(self, power_iterations=min(self.power_iterations, 2)).principal_factors(matrix, block, start)
