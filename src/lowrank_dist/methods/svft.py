"""SVFT: trained entries of a sparse core between frozen singular vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from lowrank_dist.errors import InputError
from lowrank_dist.methods.assembly import unchanged
from lowrank_dist.methods.base import Decomposition, Factors, Matrix
from lowrank_dist.methods.core import CoreMethod
from lowrank_dist.model.factor_layout import CorePattern, FactorLayout, SparseCore
from lowrank_dist.quantization.format import ResidualFormat


@dataclass(frozen=True, kw_only=True)
class SVFT(CoreMethod):
    """Singular vectors guided fine-tuning: ``W + scaling * U M V^T``, only the entries of a sparse M are trained.

    ``B = U_r`` and ``A = V_r^T`` of W are frozen, and M is zero at step 0. The residual is W itself, or its
    quantization. Checkpoints hold the LoRA with the factors A and ``B M``, which is for the original model.

    The paper takes all singular vectors, so that M has the short side of W and "plain" moves every singular value. Here
    M is ``r x r``: the rank of the adapter limits it to the r leading triplets, since U and V are as large as W. The
    options of the paper's code that add other directions are left out, as is its gate, a trained factor of all of M.

    Parameters
    ----------
    pattern : {"plain", "banded", "random"}
        Entries of M that are trained: the diagonal; the band ``|i - j| <= off_diagonal``; or as many as that band has,
        at random positions, the same in all matrices of equal rank. The paper's "top-k" is left out: it ranks entries
        by ``u_i^T v_j``, which exists for square W only.
    off_diagonal
        Number of diagonals on each side of the band.
    pattern_seed
        Seed of the random positions.
    power_iterations, oversampling, tolerance, seed
        Options of the randomized SVD, see `PrincipalMethod`.

    See Also
    --------
    LoRAXS : Trains all of the core.

    References
    ----------
    V. Lingam, A. Tejaswi, A. Vavre, A. Shetty, G. K. Gudur, J. Ghosh, A. Dimakis, E. Choi, A. Bojchevski, S. Sanghavi,
    "SVFT: Parameter-Efficient Fine-Tuning with Singular Vectors", NeurIPS 2024, section 3; arXiv:2405.19597.

    Examples
    --------
    Decompose one matrix on one rank:

    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.methods import SVFT, Matrix
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
    >>> found = SVFT(pattern="banded", off_diagonal=1).decompose(matrix, Dense(dtype=torch.float32))
    >>> torch.allclose(found.factors.left.mT @ found.factors.left, torch.eye(4), atol=1e-5)
    True
    """

    pattern: CorePattern = "plain"
    off_diagonal: int = 0
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern not in get_args(CorePattern):
            raise InputError(f"{self}: pattern={self.pattern!r} is none of {', '.join(get_args(CorePattern))}")
        if self.off_diagonal < 0:
            raise InputError(f"{self}: off_diagonal={self.off_diagonal} must not be negative")
        if self.pattern == "plain" and self.off_diagonal:
            raise InputError(
                f"{self}: off_diagonal={self.off_diagonal} has no effect with pattern='plain', which is the diagonal; "
                "choose 'banded' or 'random'"
            )

    @property
    def layout(self) -> FactorLayout:
        return SparseCore(pattern=self.pattern, off_diagonal=self.off_diagonal, seed=self.pattern_seed)

    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        _, svd = self.principal_factors(matrix, matrix.block)
        return unchanged(matrix, Factors(left=svd.u, right=svd.vh), residual, svd=svd)
