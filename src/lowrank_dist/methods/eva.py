"""EVA: A looks where the layer's inputs vary most."""

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

    They are the leading eigenvectors of ``X^T X / tokens``, which the calibration pass measures. The residual is W
    itself; at step 0 the model computes W, or its quantization.

    Two differences from PEFT's EVA. Ranks are the adapter's own: the paper's redistribution of ranks over the layers
    (PEFT's ``rho > 1``) is not done. X is taken as it is, as the paper writes it, while PEFT's incremental PCA
    subtracts the mean of the inputs.

    Parameters
    ----------
    power_iterations, oversampling, tolerance, seed
        Options of the randomized SVD of the covariance, see `PrincipalMethod`.

    Notes
    -----
    The collectives of `randomized_svd` for an ``in x in`` matrix.

    References
    ----------
    F. Paischer, L. Hauzenberger, T. Schmied, B. Alkin, M. P. Deisenroth, S. Hochreiter, "Parameter Efficient
    Fine-tuning via Explained Variance Adaptation", NeurIPS 2025, section 3; arXiv:2410.07170.
    """

    statistic: ClassVar[Literal["covariance", "gradient"] | None] = "covariance"

    @property
    def starts_at_zero(self) -> bool:
        return True

    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        inputs, outputs = layer_shape(matrix)
        a = self.leading(matrix, self.measured(matrix), matrix.rank, rows=inputs).vh
        return unchanged(matrix, sharded(matrix, a, a.new_zeros(outputs, matrix.rank)), residual)
