"""CorDA: singular triplets of the weight times the covariance of the layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.errors import InputError
from lowrank_dist.linalg import full_fp32, seed_from_name
from lowrank_dist.linalg.trailing import multiply, trailing_svd
from lowrank_dist.methods.assembly import layer_shape, subtracted
from lowrank_dist.methods.base import Decomposition, Factors, Matrix
from lowrank_dist.methods.calibrated import CalibratedMethod
from lowrank_dist.quantization.format import ResidualFormat


@dataclass(frozen=True, kw_only=True)
class CorDA(CalibratedMethod):
    """Context-oriented decomposition: ``U S V^T = SVD(W C)`` with C the covariance of the layer's inputs.

    ``B = U_r sqrt(S_r / scaling)``, ``A = sqrt(S_r / scaling) V_r^T C^-1``, residual ``W - scaling * B A``. At step 0
    the model computes W, or ``Q(W_res) + scaling * B A`` if the residual is quantized.

    No inverse is needed. ``U^T W C = S V^T`` implies ``V_r^T C^-1 = S_r^-1 U_r^T W``, so that
    ``A = U_r^T W / sqrt(scaling * S_r)`` and ``scaling * B A = U_r U_r^T W``, the projection of W onto r directions of
    the output. Rows of A whose singular value is zero are set to zero, because ``U_r^T W`` is rounding error there.

    B A does not depend on the scale of C, but its split into B and A does: C times c multiplies B by ``sqrt(c)`` and
    divides A by it. C is ``X^T X / tokens`` here; PEFT divides the inputs by their largest entry and C by the number of
    batches.

    Parameters
    ----------
    corda_method : {"ipm", "kpm"}
        PEFT's name for the mode. Instruction-previewed ("ipm") trains the r largest triplets, with C from the data of
        the task. Knowledge-preserved ("kpm") trains the r smallest, with C from data whose knowledge is to be kept.
    damping
        C is replaced by ``C + damping * mean(diag C) * I``, which makes it positive definite. PEFT starts at 0.01 and
        doubles it until its inverse is accurate.
    power_iterations, oversampling, tolerance, seed
        Options of the randomized SVD of ``W C``, see `PrincipalMethod`; "kpm" uses `trailing_svd` and only the seed.

    See Also
    --------
    EVA : Takes A from the covariance alone.
    lowrank_dist.Calibration : The data that the covariance is measured on.

    Notes
    -----
    ``W C`` is formed by broadcasting the rows of C, or of W where rows are inputs (Conv1D), one rank at a time
    (`row_blocks`). That takes memory for ``W C``, for this rank's rows of C and for the rows of one peer. The
    collectives of the SVD and one all-reduce of ``r x n`` fp32 follow.

    References
    ----------
    Y. Yang, X. Li, Z. Zhou, S. L. Song, J. Wu, L. Nie, B. Ghanem, "CorDA: Context-Oriented Decomposition Adaptation of
    Large Language Models for Task-Aware Parameter-Efficient Fine-tuning", NeurIPS 2024, section 3; arXiv:2406.05223.

    Examples
    --------
    Decompose one matrix on one rank:

    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.methods import CorDA, Matrix
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
    ...     statistic=torch.eye(32),
    ... )
    >>> found = CorDA().decompose(matrix, Dense(dtype=torch.float32))
    >>> found.factors.left.shape, found.factors.right.shape
    (torch.Size([64, 4]), torch.Size([4, 32]))
    """

    statistic: ClassVar[Literal["covariance", "gradient"] | None] = "covariance"

    corda_method: Literal["ipm", "kpm"] = "ipm"
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damping < 0:
            raise InputError(f"{self}: damping={self.damping} must not be negative")

    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        block, group, rows = matrix.block, matrix.group, matrix.partition.rows
        covariance = self.damped_covariance(matrix)
        # where rows are inputs, C W^T = (W C)^T, since C is symmetric: left and right change places
        pair = (covariance, block) if matrix.input_first else (block, covariance)
        product = multiply(*pair, group)
        del covariance, pair
        if self.corda_method == "ipm":
            svd = self.leading(matrix, product, matrix.rank, rows=rows)
        else:
            seed = seed_from_name(matrix.name, self.seed)
            svd = trailing_svd(product, matrix.rank, rows=rows, group=group, seed=seed)
        root = (svd.s / matrix.scaling).sqrt()
        inverse_root = torch.where(svd.s > 0, (svd.s * matrix.scaling).rsqrt(), 0)
        with full_fp32():
            if matrix.input_first:
                factors = Factors(left=(block @ svd.vh.mT) * inverse_root, right=root[:, None] * svd.vh)
            else:
                right = inverse_root[:, None] * group.sum(svd.u.mT @ block)
                factors = Factors(left=svd.u * root, right=right)
        return subtracted(matrix, factors, residual)

    def damped_covariance(self, matrix: Matrix) -> Tensor:
        """This rank's rows of ``C + damping * mean(diag C) * I``, ``[in_p, in]``. One all-reduce of a scalar.

        Raises
        ------
        InputError
            On every rank, if C is zero: the layer saw no input in the calibration pass.
        """
        covariance, inputs = self.measured(matrix).clone(), layer_shape(matrix)[0]
        partition = RowPartition(rows=inputs, columns=inputs, world_size=matrix.group.size)
        diagonal = covariance[:, slice(*partition.bounds(matrix.group.rank))].diagonal()
        mean = matrix.group.sum(diagonal.double().sum()) / inputs
        self.check_seen(matrix, float(mean))
        diagonal.add_(self.damping * mean.to(diagonal.dtype))
        return covariance
