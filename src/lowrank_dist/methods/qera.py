"""QERA: the adapter takes the part of the quantization error that changes the layer's outputs most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowrank_dist.errors import InputError
from lowrank_dist.linalg import full_fp32, row_signs
from lowrank_dist.linalg.square_root import diagonal_of, multiply_transposed, square_root
from lowrank_dist.linalg.trailing import multiply
from lowrank_dist.methods.base import Decomposition, Factors, Matrix, quantization_error
from lowrank_dist.methods.calibrated import CalibratedMethod
from lowrank_dist.quantization.format import ResidualFormat

# Singular values below this share of the largest are rounding of the fp32 error.
_ZERO = 1e-6


@dataclass(frozen=True, kw_only=True)
class QERA(CalibratedMethod):
    """Quantization error reconstruction: B A minimises the expected error of the layer's output, not of its weight.

    With ``E = W - Q(W)`` and ``R = X^T X / tokens``, the expected squared error of the output is ``tr(D R D^T)``, where
    ``D = E - scaling * B A`` is the error of the weight. With ``U S V^T = SVD(E R^(1/2))``, ``B = U_r S_r / scaling``
    and ``A = V_r^T R^(-1/2)`` minimise it over all matrices of rank r. `approximate` takes the diagonal of R in place
    of R, as if the inputs were uncorrelated.

    At step 0 the model computes ``Q(W) + scaling * B A``. W is quantized once, and nothing alternates.

    No inverse is needed: ``U^T E R^(1/2) = S V^T`` implies ``A = S_r^-1 U_r^T E``. The root need not be the symmetric
    one either. Any T with ``T T^T = R`` gives the same U and S, and `square_root` computes one that is row-sharded. R
    is not damped. The authors' code replaces singular values of a singular root by the machine epsilon. Here directions
    in which the inputs vary by less than 1e-6 of their features count as absent, and rows of A whose singular value is
    below ``1e-6`` of the largest are zero.

    Parameters
    ----------
    approximate
        Whether to take the diagonal of R only (the paper's QERA-approx). The calibration pass measures R all the same.
    power_iterations, oversampling, tolerance, seed
        Options of the randomized SVD, see `PrincipalMethod`.

    See Also
    --------
    LoftQ : Minimises the error of the weight, and alternates.
    CorDA : Weights W itself with R.
    lowrank_dist.Calibration : The data that R is measured on.

    Notes
    -----
    The exact form takes memory for this rank's rows of R in fp64, for those of the root, and for the rows of one peer.
    It issues the collectives of `square_root`, those of `row_blocks` for the root (for E where rows are inputs), those
    of `randomized_svd`, and an all-reduce of ``r x n`` fp32. The approximate form issues the last two and an all-reduce
    of ``in`` fp64.

    References
    ----------
    C. Zhang, J. T. H. Wong, C. Xiao, G. A. Constantinides, Y. Zhao, "QERA: an Analytical Framework for Quantization
    Error Reconstruction", ICLR 2025, section 3; arXiv:2410.06040.

    Examples
    --------
    Decompose one matrix on one rank:

    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.methods import QERA, Matrix
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
    ...     statistic=torch.diag(torch.arange(32.0)),
    ... )
    >>> found = QERA().decompose(matrix, NF4())
    >>> found.factors.left.shape, found.ended_on
    (torch.Size([64, 4]), 'decompose')
    """

    statistic: ClassVar[Literal["covariance", "gradient"] | None] = "covariance"

    approximate: bool = False

    def check(self, residual: ResidualFormat) -> None:
        if residual.exact:
            raise InputError(
                "QERA corrects a quantization error, but the residual is not quantized; pass quantization=NF4()"
            )

    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        encoded = residual.encode(matrix.block, matrix.partition, matrix.group)
        error = quantization_error(matrix, encoded)
        svd = self.leading(matrix, self.weighted(matrix, error), matrix.rank, rows=matrix.partition.rows)
        scale = svd.s / matrix.scaling
        inverse = torch.where(svd.s > _ZERO * svd.s[0], 1 / svd.s, 0)
        with full_fp32():
            if matrix.input_first:  # E is stored as E^T, so that U is on the right
                factors = Factors(left=(error @ svd.vh.mT) * inverse, right=scale[:, None] * svd.vh)
            else:
                right = inverse[:, None] * matrix.group.sum(svd.u.mT @ error)
                signs = row_signs(right)  # those of V depend on the root, hence on the number of ranks
                factors = Factors(left=svd.u * scale * signs.mT, right=right * signs)
        factors = factors.rounded(matrix.factor_dtype)
        nothing = Factors(left=torch.zeros_like(factors.left), right=torch.zeros_like(factors.right))
        return Decomposition(factors=factors, residual=encoded, ended_on="decompose", encoded_from=nothing)

    def weighted(self, matrix: Matrix, error: Tensor) -> Tensor:
        """This rank's rows of ``E T`` with ``T T^T = R``, or of its transpose where rows are inputs: fp32.

        ``[out_p, in]`` sharded like E, or ``[in_p, out]`` in the sharding of R (of E if `approximate`). See `QERA` for
        the collectives.
        """
        covariance, group = self.measured(matrix), matrix.group
        moments = diagonal_of(covariance, group)
        self.check_seen(matrix, float(moments.sum()))
        if self.approximate:
            roots = moments.sqrt().float()
            return error * (roots[slice(*matrix.partition.bounds(group.rank)), None] if matrix.input_first else roots)
        root = square_root(covariance, moments, group)
        return multiply(root, error, group) if matrix.input_first else multiply_transposed(error, root, group)
