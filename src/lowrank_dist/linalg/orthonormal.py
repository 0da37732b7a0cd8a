"""Orthonormalization of row-sharded vectors: CholeskyQR2 in fp64 Grams, TSQR where that breaks down.

References
----------
.. [CQR] Y. Yamamoto, Y. Nakatsukasa, Y. Yanagisawa, T. Fukaya, "Roundoff error analysis of the CholeskyQR2
   algorithm", ETNA 44 (2015).
.. [TSQR] J. Demmel, L. Grigori, M. Hoemmen, J. Langou, "Communication-optimal parallel and sequential QR and LU
   factorizations", SIAM J. Sci. Comput. 34 (2012).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lowrank_dist.distributed.group import ShardGroup

# One pass of CholeskyQR leaves an orthogonality error of condition * 6e-8. For k equally long orthogonal vectors
# ||L|| ||L^-1|| is k; up to this multiple of k one pass is enough.
_ONE_PASS = 10.0
# A second pass repairs what the first left while that stays well below 1 [CQR]; beyond this condition number the
# Householder route takes over.
_MAX_CONDITION = 1e5
# Columns that are widened to fp64 at a time: on a CPU those that stay in a cache, on a device so many that it has work.
_PANEL, _DEVICE_PANEL = 2048, 2**16


def orthonormalize(y: Tensor, group: ShardGroup) -> tuple[Tensor, Tensor]:
    """Thin QR of a row-sharded tall matrix: CholeskyQR with fp64 Grams, once or twice, TSQR where that breaks down.

    Parameters
    ----------
    y
        ``[m_p, k]`` fp32, row-sharded, ``m >= k`` in total; a rank may hold no row.
    group
        The ranks that hold the rows; ``ShardGroup.single()`` where they are replicated.

    Returns
    -------
    q
        ``[m_p, k]`` fp32, row-sharded, orthonormal columns also where `y` is rank-deficient or zero.
    r
        ``[k, k]`` fp64, upper triangular, replicated, ``q @ r = y``.

    Notes
    -----
    A reduce + broadcast pair of ``k x k`` fp64 per pass ([CQR]): one if ``||R|| ||R^-1||`` shows that `y` is
    well-conditioned, two otherwise; a third, of ``P x k x k``, if `y` is too ill-conditioned for Cholesky ([TSQR]).
    Rank 0 factors and broadcasts, so that all ranks decide alike.
    """
    q, lower = orthonormal_rows(y.mT, group)
    return q.mT.contiguous(), lower.mT


def orthonormal_rows(y: Tensor, group: ShardGroup) -> tuple[Tensor, Tensor]:
    """`orthonormalize` for vectors as rows: ``[k, m_p]`` to ``q [k, m_p]`` and ``l [k, k]`` with ``l @ q = y``."""
    q, lower, condition = _cholesky_qr(y, group)
    if _ONE_PASS * len(y) <= condition < _MAX_CONDITION:
        q, rest, condition = _cholesky_qr(q, group)
        lower = lower @ rest
    return (q, lower) if condition < _MAX_CONDITION else _tsqr(y, group)


def _cholesky_qr(y: Tensor, group: ShardGroup) -> tuple[Tensor, Tensor, float]:
    """One pass: rows that are more nearly orthonormal, their factor, and its condition number, NaN where it broke."""
    k = len(y)
    packed = torch.empty(2 * k, k, dtype=torch.float64, device=y.device)
    group.reduce_once(gram(y, y), packed, _cholesky)
    lower, inverse = packed[:k], packed[k:]
    return inverse.float() @ y, lower, float(vector_norm(lower) * vector_norm(inverse))


def gram(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y.T`` in fp64 for vectors as rows; widens a panel of columns at a time."""
    total = torch.zeros(x.shape[0], y.shape[0], dtype=torch.float64, device=x.device)
    panel = _PANEL if x.device.type == "cpu" else _DEVICE_PANEL
    for first in range(0, y.shape[1], panel):
        wide = y[:, first : first + panel].double()
        total.addmm_(wide if x is y else x[:, first : first + panel].double(), wide.mT)
    return total


def row_signs(vectors: Tensor) -> Tensor:
    """Signs that make the largest entry of every row of `vectors`, ``[k, n]``, positive: ``[k, 1]``, never zero."""
    signs = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)).sign()
    return torch.where(signs == 0, 1, signs)


def _cholesky(gram: Tensor) -> Tensor:
    """``[L; L^-1]``, or NaNs where the Gram matrix has no Cholesky factor."""
    lower, info = torch.linalg.cholesky_ex(gram)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    both = torch.cat([lower, torch.linalg.solve_triangular(lower, eye, upper=False)])
    return both.masked_fill_(info != 0, torch.nan)


def _tsqr(y: Tensor, group: ShardGroup) -> tuple[Tensor, Tensor]:
    """Householder TSQR: local QR, then one QR of the stacked R factors on rank 0."""
    k, entries = y.shape
    local_q, local_r = torch.linalg.qr(y.mT.double())
    stacked = torch.zeros(group.size, k, k, dtype=torch.float64, device=y.device)
    stacked[group.rank, : local_r.shape[0]] = local_r

    def combine(blocks: Tensor) -> Tensor:
        q, r = torch.linalg.qr(blocks.reshape(-1, k))
        return torch.cat([q, r])

    solution = torch.empty((group.size + 1) * k, k, dtype=torch.float64, device=y.device)
    group.reduce_once(stacked, solution, combine)
    mine = solution[group.rank * k : group.rank * k + min(entries, k)]
    return (local_q @ mine).mT.float().contiguous(), solution[group.size * k :].mT
