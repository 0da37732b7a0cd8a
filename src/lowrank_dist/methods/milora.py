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
    principal components; at step 0 the model computes W, or ``Q(W_res) + scaling * B A`` where it is quantized. Where
    W has r vanishing singular values, both factors are zero up to rounding and train from there, slowly.

    Cost, memory and collectives are those of `trailing_svd`: a Gram matrix of the short side in fp64, 512 MiB per rank
    for 8192.

    Parameters
    ----------
    seed
        Mixed with the weight's name into the seed of the inverse iteration, which large matrices take.

    References
    ----------
    H. Wang, Y. Li, S. Wang, G. Chen, Y. Chen, "MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM
    Finetuning", NAACL 2025, section 3; arXiv:2406.09044.
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
