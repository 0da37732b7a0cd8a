"""LoRA-XS: a trained r x r core between frozen principal factors."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_dist.errors import InputError
from lowrank_dist.methods.assembly import unchanged
from lowrank_dist.methods.base import Decomposition, Factors, Matrix
from lowrank_dist.methods.core import CoreMethod
from lowrank_dist.model.factor_layout import FactorLayout, TrainedCore
from lowrank_dist.quantization.format import ResidualFormat
from lowrank_dist.seeds import global_seed


@dataclass(frozen=True, kw_only=True)
class LoRAXS(CoreMethod):
    """Low-rank adaptation with an extremely small number of parameters: ``W + scaling * B R A``, only R is trained.

    ``B = U_r S_r`` and ``A = V_r^T`` of W are frozen. The core R is ``r x r`` and drawn from ``N(0, core_std^2)``. The
    residual is W itself, or its quantization; at step 0 the model differs from it by the order of
    ``scaling * core_std`` times W. Checkpoints hold the LoRA with the factors A and ``B R``, which is for the original
    model.

    Parameters
    ----------
    core_std
        Standard deviation of R at step 0.
    core_seed
        Mixed with the weight's name into the seed of R. None: that of ``lightning.seed_everything``, or 0.
    power_iterations, oversampling, tolerance, seed
        Options of the randomized SVD, see `PrincipalMethod`.

    See Also
    --------
    LoRA : Trains both factors.
    SVFT : Trains some entries of the core.
    PiSSA : Trains the principal factors themselves.

    References
    ----------
    K. Bałazy, M. Banaei, K. Aberer, J. Tabor, "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters",
    2024, section 3; arXiv:2405.17604.

    Examples
    --------
    Decompose one matrix on one rank:

    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.methods import LoRAXS, Matrix
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
    >>> found = LoRAXS().decompose(matrix, Dense(dtype=torch.float32))
    >>> torch.allclose(found.factors.right @ found.factors.right.mT, torch.eye(4), atol=1e-5)
    True
    """

    core_std: float = 1e-5
    core_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.core_seed is None:
            object.__setattr__(self, "core_seed", global_seed())
        if not self.core_std > 0:
            raise InputError(f"{self}: core_std={self.core_std} must be positive")

    @property
    def layout(self) -> FactorLayout:
        return TrainedCore(std=self.core_std, seed=self.core_seed or 0)

    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        _, svd = self.principal_factors(matrix, matrix.block)
        # B = U S and A = V^T, whichever way the weight is stored
        factors = Factors(left=svd.u, right=svd.s[:, None] * svd.vh)
        if not matrix.input_first:
            factors = Factors(left=svd.u * svd.s, right=svd.vh)
        return unchanged(matrix, factors, residual, svd=svd)
