"""MiLoRA: the adapter takes the minor singular triplets, the frozen residual the principal ones."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_dist.linalg import seed_from_name
from lowrank_dist.linalg.trailing import trailing_svd
from lowrank_dist.methods.assembly import subtracted
from lowrank_dist.methods.base import Decomposition, Matrix, Method
from lowrank_dist.methods.principal import balanced
from lowrank_dist.quantization.format import ResidualFormat


@dataclass(frozen=True, kw_only=True)
class MiLoRA(Method):
    """Minor singular components adaptation: ``scaling * B A = U_m S_m V_m^T``, the r smallest singular triplets of W.

    ``B = U_m sqrt(S_m / scaling)``, ``A = sqrt(S_m / scaling) V_m^T``. The residual ``W - scaling * B A`` keeps the
    principal components. At step 0 the model computes W, or ``Q(W_res) + scaling * B A`` if the residual is quantized.
    If W has r vanishing singular values, both factors are zero up to rounding, and training starts slowly.

    Cost, memory and collectives are those of `trailing_svd`: a Gram matrix of the short side in fp64, which takes
    512 MiB per rank if that side is 8192.

    Parameters
    ----------
    seed
        Mixed with the weight's name into the seed of the inverse iteration, which is used for large matrices.

    See Also
    --------
    PiSSA : Trains the principal triplets.

    References
    ----------
    H. Wang, Y. Li, S. Wang, G. Chen, Y. Chen, "MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM
    Finetuning", NAACL 2025, section 3; arXiv:2406.09044.

    Examples
    --------
    Decompose one matrix on one rank:

    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.methods import Matrix, MiLoRA
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
    >>> found = MiLoRA().decompose(matrix, Dense(dtype=torch.float32))
    >>> smallest = torch.linalg.svdvals(matrix.block)[-4:]
    >>> torch.allclose(torch.linalg.svdvals(found.factors.left @ found.factors.right)[:4], smallest, atol=1e-3)
    True
    """

    seed: int = 0

    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        svd = trailing_svd(
            matrix.block,
            matrix.rank,
            rows=matrix.partition.rows,
            group=matrix.group,
            seed=seed_from_name(matrix.name, self.seed),
        )
        return subtracted(matrix, balanced(svd, matrix.scaling), residual)
