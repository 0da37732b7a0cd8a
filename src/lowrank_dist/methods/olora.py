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

    The first r columns of Q are an orthonormal basis of the first r columns of W, and ``R[:r] = B^T W``: no QR of the
    whole matrix is needed. The residual is ``W - scaling * B A``; at step 0 the model computes W, or
    ``Q(W_res) + scaling * B A`` where the residual is quantized. As in PEFT, neither factor is divided by `scaling`:
    only with ``scaling = 1`` does the residual vanish in the first r columns.

    Signs: the diagonal of R is not negative (LAPACK, hence PEFT, leaves them open); B A does not depend on them. Where
    the first r columns of W are dependent, the missing columns of B are some orthonormal completion.

    Notes
    -----
    The collectives of `orthonormalize` for r columns and one all-reduce of ``r x n`` fp32. Where rows are inputs
    (Conv1D), the first r columns of W are the first r stored rows: one reduce and one broadcast of ``r x n`` fp32.

    References
    ----------
    K. Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024, section 3;
    arXiv:2406.01775.
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
