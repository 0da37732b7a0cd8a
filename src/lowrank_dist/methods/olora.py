"""OLoRA: the adapter takes the first columns of a QR decomposition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.linalg import full_fp32, orthonormalize
from lowrank_dist.methods.assembly import subtracted
from lowrank_dist.methods.base import Decomposition, Factors, Matrix, Method
from lowrank_dist.quantization.format import ResidualFormat


@dataclass(frozen=True, kw_only=True)
class OLoRA(Method):
    """Orthonormal low-rank adaptation: with ``W = Q R``, ``B = Q[:, :r]`` and ``A = R[:r]``.

    The first r columns of Q are an orthonormal basis of the first r columns of W, and ``R[:r] = B^T W``, so that no QR
    of the whole matrix is needed. The residual is ``W - scaling * B A``. At step 0 the model computes W, or
    ``Q(W_res) + scaling * B A`` if the residual is quantized. Neither factor is divided by `scaling`, as in PEFT: the
    residual vanishes in the first r columns only if ``scaling = 1``.

    The diagonal of R is nonnegative, which fixes the signs (LAPACK, hence PEFT, leaves them open). B A does not depend
    on them. If the first r columns of W are linearly dependent, B is completed by arbitrary orthonormal columns.

    See Also
    --------
    PiSSA : Takes the principal triplets instead.

    Notes
    -----
    The collectives are those of `orthonormalize` for r columns and one all-reduce of ``r x n`` fp32. Where rows are
    inputs (Conv1D), the first r columns of W are the first r stored rows: one reduce and one broadcast of ``r x n``
    fp32.

    References
    ----------
    K. Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024, section 3;
    arXiv:2406.01775.

    Examples
    --------
    Decompose one matrix on one rank:

    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.methods import Matrix, OLoRA
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
    >>> found = OLoRA().decompose(matrix, Dense(dtype=torch.float32))
    >>> torch.allclose(found.factors.left.mT @ found.factors.left, torch.eye(4), atol=1e-5)
    True
    """

    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        block, group, rank = matrix.block, matrix.group, matrix.rank
        with full_fp32():
            if matrix.input_first:
                start, stop = (min(bound, rank) for bound in matrix.partition.bounds(group.rank))
                first = block.new_zeros(rank, block.shape[1])
                first[start:stop] = block[: stop - start]
                basis = block.new_empty(block.shape[1], rank)
                group.reduce_once(first, basis, lambda rows: _basis(rows.mT.contiguous(), ShardGroup.single()))
                factors = Factors(left=block @ basis, right=basis.mT)
            else:
                basis = _basis(block[:, :rank].contiguous(), group)
                factors = Factors(left=basis, right=group.sum(basis.mT @ block))
        return subtracted(matrix, factors, residual)


def _basis(columns: Tensor, group: ShardGroup) -> Tensor:
    """Q of a thin QR with a nonnegative diagonal of R; shapes and collectives of `orthonormalize`."""
    q, r = orthonormalize(columns, group)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
