"""Orthonormalization of row-sharded vectors: CholeskyQR2 with fp64 Gram matrices, TSQR where that breaks down.

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
# A second pass corrects the orthogonality error of the first as long as that is well below 1 [CQR]. Householder TSQR is
# used from this condition number on.
_MAX_CONDITION = 1e5
# Columns that are widened to fp64 at a time: few enough for the cache of a CPU, enough to occupy a device.
_PANEL, _DEVICE_PANEL = 2048, 2**16


def orthonormalize(y: Tensor, group: ShardGroup) -> tuple[Tensor, Tensor]:
    """Compute the thin QR of a row-sharded tall matrix by CholeskyQR with fp64 Gram matrices, or TSQR.

    Parameters
    ----------
    y
        ``[m_p, k]`` fp32, row-sharded, ``m >= k`` in total; a rank may hold no row.
    group
        The ranks that hold the rows; ``ShardGroup.single()`` where they are replicated.

    Returns
    -------
    q
        ``[m_p, k]`` fp32, row-sharded. Its columns are orthonormal even if `y` is rank-deficient or zero.
    r
        ``[k, k]`` fp64, upper triangular, replicated, ``q @ r = y``.

    See Also
    --------
    randomized_svd : Leading singular triplets of a row-sharded matrix.

    Notes
    -----
    Every pass of CholeskyQR issues a reduce + broadcast pair of ``k x k`` fp64 ([CQR]). One pass is enough if
    ``||R|| ||R^-1||`` shows that `y` is well-conditioned; otherwise there are two. If `y` is too ill-conditioned for
    Cholesky, TSQR follows with another pair, of ``P x k x k`` ([TSQR]). Rank 0 factors and broadcasts, so that all
    ranks decide alike.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.linalg import orthonormalize
    >>> y = torch.tensor([[3.0, 1.0], [4.0, 0.0], [0.0, 1.0]])
    >>> q, r = orthonormalize(y, ShardGroup.single())
    >>> torch.allclose(q.T @ q, torch.eye(2), atol=1e-6), torch.allclose(q @ r.float(), y, atol=1e-5)
    (True, True)
    """
    q, lower = orthonormal_rows(y.mT, group)
    return q.mT.contiguous(), lower.mT


def orthonormal_rows(y: Tensor, group: ShardGroup) -> tuple[Tensor, Tensor]:
    """`orthonormalize` for vectors as rows: from ``[k, m_p]``, ``q [k, m_p]`` and ``l [k, k]`` with ``l @ q = y``."""
    q, lower, condition = _cholesky_qr(y, group)
    if _ONE_PASS * len(y) <= condition < _MAX_CONDITION:
        q, rest, condition = _cholesky_qr(q, group)
        lower = lower @ rest
    return (q, lower) if condition < _MAX_CONDITION else _tsqr(y, group)


def _cholesky_qr(y: Tensor, group: ShardGroup) -> tuple[Tensor, Tensor, float]:
    """One pass: the rows, closer to orthonormal, their factor, and its condition number (NaN if Cholesky failed)."""
    k = len(y)
    packed = torch.empty(2 * k, k, dtype=torch.float64, device=y.device)
    group.reduce_once(gram(y, y), packed, _cholesky)
    lower, inverse = packed[:k], packed[k:]
    return inverse.float() @ y, lower, float(vector_norm(lower) * vector_norm(inverse))


def gram(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y.T`` in fp64 for vectors as rows; only a panel of columns is widened at a time."""
    total = torch.zeros(x.shape[0], y.shape[0], dtype=torch.float64, device=x.device)
    panel = _PANEL if x.device.type == "cpu" else _DEVICE_PANEL
    for first in range(0, y.shape[1], panel):
        wide = y[:, first : first + panel].double()
        total.addmm_(wide if x is y else x[:, first : first + panel].double(), wide.mT)
    return total


def row_signs(vectors: Tensor) -> Tensor:
    """Compute the signs that make the entry of largest magnitude in every row positive.

    Parameters
    ----------
    vectors
        ``[k, n]``, replicated: nothing is communicated.

    Returns
    -------
    Tensor
        ``[k, 1]`` of 1 and -1 in the dtype of `vectors`; 1 for a row of zeros.

    See Also
    --------
    randomized_svd : Fixes the signs of the singular vectors with it.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist.linalg import row_signs
    >>> row_signs(torch.tensor([[1.0, -3.0], [2.0, -1.0]]))
    tensor([[-1.],
            [ 1.]])
    """
    signs = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)).sign()
    return torch.where(signs == 0, 1, signs)


def _cholesky(gram: Tensor) -> Tensor:
    """``[L; L^-1]``, or NaNs if the Gram matrix has no Cholesky factor."""
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
