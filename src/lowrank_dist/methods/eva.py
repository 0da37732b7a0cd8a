"""EVA: A takes the directions in which the layer's inputs vary most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lowrank_dist.methods.assembly import layer_shape, sharded, unchanged
from lowrank_dist.methods.base import Decomposition, Matrix
from lowrank_dist.methods.calibrated import CalibratedMethod
from lowrank_dist.quantization.format import ResidualFormat


@dataclass(frozen=True, kw_only=True)
class EVA(CalibratedMethod):
    """Explained variance adaptation: A = the r leading right singular vectors of the layer's inputs X, ``B = 0``.

    The vectors are the leading eigenvectors of ``X^T X / tokens``, which the calibration pass measures. The residual is
    W itself. At step 0 the model computes W, or its quantization.

    EVA differs from PEFT's in two ways. Ranks are those of the adapter configuration: the paper's redistribution of
    ranks over the layers (PEFT's ``rho > 1``) is not done. X is not centred, as in the paper; PEFT's incremental PCA
    subtracts the mean of the inputs.

    Parameters
    ----------
    power_iterations, oversampling, tolerance, seed
        Options of the randomized SVD of the covariance, see `PrincipalMethod`.

    See Also
    --------
    CorDA : Weights W with the covariance.
    lowrank_dist.Calibration : The data that the covariance is measured on.

    Notes
    -----
    The collectives are those of `randomized_svd` for an ``in x in`` matrix.

    References
    ----------
    F. Paischer, L. Hauzenberger, T. Schmied, B. Alkin, M. P. Deisenroth, S. Hochreiter, "Parameter Efficient
    Fine-tuning via Explained Variance Adaptation", NeurIPS 2025, section 3; arXiv:2410.07170.

    Examples
    --------
    Decompose one matrix on one rank:

    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.methods import EVA, Matrix
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
    ...     statistic=torch.diag(torch.arange(32.0)),
    ... )
    >>> found = EVA().decompose(matrix, Dense(dtype=torch.float32))
    >>> found.factors.left.shape, found.factors.right.shape
    (torch.Size([64, 4]), torch.Size([4, 32]))
    """

    statistic: ClassVar[Literal["covariance", "gradient"] | None] = "covariance"

    @property
    def starts_at_zero(self) -> bool:
        return True

    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        inputs, outputs = layer_shape(matrix)
        a = self.leading(matrix, self.measured(matrix), matrix.rank, rows=inputs).vh
        return unchanged(matrix, sharded(matrix, a, a.new_zeros(outputs, matrix.rank)), residual)
