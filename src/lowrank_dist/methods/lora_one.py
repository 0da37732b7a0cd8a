"""LoRA-One: the adapter starts with one step of full fine-tuning, as far as r directions hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lowrank_dist.errors import InputError
from lowrank_dist.methods.assembly import unchanged
from lowrank_dist.methods.base import Decomposition, Factors, Matrix
from lowrank_dist.methods.calibrated import CalibratedMethod
from lowrank_dist.quantization.format import ResidualFormat


@dataclass(frozen=True, kw_only=True)
class LoRAOne(CalibratedMethod):
    """One-step full gradient: A and B from the r leading singular triplets of the negative gradient of W.

    With ``-G = -dL/dW = U S V^T``, ``B = U_r S_r^(1/2) / sqrt(gamma S_1)`` and ``A = S_r^(1/2) V_r^T / sqrt(gamma
    S_1)``, S_1 the largest singular value. W stays as it is, so that at step 0 the model computes ``W + scaling * B A``
    and not W: a step of gradient descent of rank r, whose size in W is ``scaling / gamma`` whatever the size of the
    gradient. The adapter is an ordinary LoRA for the original model. The authors take rsLoRA's scaling with alpha = 16
    and gamma = 128.

    Their preconditioned optimizer, an option whose code they have not published, is not here: use AdamW, as they do
    without it.

    Parameters
    ----------
    stable_gamma
        The number gamma.
    power_iterations, oversampling, tolerance, seed
        Options of the randomized SVD, see `PrincipalMethod`.

    See Also
    --------
    LoRAGA : Takes other triplets of the same gradient for A and B, and keeps step 0.
    lowrank_dist.Calibration : The data that the gradient is measured on; the authors find 8 to 64 examples enough.

    Notes
    -----
    The collectives are those of `randomized_svd` for r triplets of G.

    References
    ----------
    Y. Zhang, F. Liu, Y. Chen, "LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models,
    Provably and Efficiently", ICML 2025, algorithm 1; arXiv:2502.01235. The scale is that of the authors' code,
    ``stable`` (github.com/YuanheZ/LoRA-One).

    Examples
    --------
    Decompose one matrix on one rank:

    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.methods import LoRAOne, Matrix
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
    ...     statistic=torch.randn(64, 32),
    ... )
    >>> found = LoRAOne().decompose(matrix, Dense(dtype=torch.float32))
    >>> torch.equal(found.residual.rows(slice(None)), matrix.block)
    True
    """

    statistic: ClassVar[Literal["covariance", "gradient"] | None] = "gradient"

    stable_gamma: float = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stable_gamma > 0:
            raise InputError(f"{self}: stable_gamma={self.stable_gamma} must be positive")

    @property
    def starts_at_zero(self) -> bool:
        return True

    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        svd = self.leading(matrix, self.measured(matrix), matrix.rank, rows=matrix.partition.rows)
        if not float(svd.s[0]) > 0:  # replicated
            raise InputError(
                f"{self}: the gradient of {matrix.name} is zero, so that both factors would be and stay zero; "
                "calibrate on more data or drop it from target_modules"
            )
        root = (svd.s / (self.stable_gamma * svd.s[0])).sqrt()
        left, right = svd.u * root, root[:, None] * svd.vh
        if matrix.input_first:  # the stored gradient is the transpose: left is A^T, right B^T
            return unchanged(matrix, Factors(left=left, right=-right), residual)
        return unchanged(matrix, Factors(left=-left, right=right), residual)
