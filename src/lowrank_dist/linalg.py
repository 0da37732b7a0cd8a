"""Randomized SVD of a row-sharded matrix: only thin ``n x k`` and small ``k x k`` tensors cross the network.

Notation: W is ``m x n``, sharded by rows over P ranks; rank p holds ``W_p`` (``m_p x n``, possibly no row at
all). ``k = min(rank + oversampling, m, n)``. Everything is computed in true fp32 (no tf32), Gram matrices in
fp64. Cost for q power iterations and per rank: ``2 m_p n k (2 q + 1)`` flops for the products with W, and q
all-reduces of ``n x k`` fp32; on steep spectra two small collectives more per iteration.

References
----------
.. [HMT] N. Halko, P.-G. Martinsson, J. A. Tropp, "Finding structure with randomness", SIAM Review 53 (2011),
   algorithms 4.4 (randomized subspace iteration) and 5.1; arXiv:0909.4061.
.. [CQR] Y. Yamamoto, Y. Nakatsukasa, Y. Yanagisawa, T. Fukaya, "Roundoff error analysis of the CholeskyQR2
   algorithm", ETNA 44 (2015).
.. [TSQR] J. Demmel, L. Grigori, M. Hoemmen, J. Langou, "Communication-optimal parallel and sequential QR and LU
   factorizations", SIAM J. Sci. Comput. 34 (2012).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_dist.comm import ShardGroup

# One fp32 triangular solve leaves an orthogonality error of condition * 6e-8, which a second pass repairs while it
# stays well below 1 [CQR]; beyond this condition number the Householder route takes over.
_MAX_CONDITION = 1e5
# A power iteration may skip the orthonormalization between its two products while the square of the sketch's condition
# number stays well below _MAX_CONDITION. It saves two of three collectives.
_MAX_SKIPPED_CONDITION = 1e2


class SVD(NamedTuple):
    """Leading singular triplets of a row-sharded matrix.

    Attributes
    ----------
    u
        Left singular vectors, ``[m_p, r]``, fp32, row-sharded.
    s
        Singular values, ``[r]``, fp32, descending, replicated.
    vh
        Right singular vectors, ``[r, n]``, fp32, replicated. The largest entry of every row is positive.
    """

    u: Tensor
    s: Tensor
    vh: Tensor


def seed_from_name(name: str, salt: int = 0) -> int:
    """A 63-bit seed that depends on the weight's name only, so that results do not depend on order or world size."""
    return int.from_bytes(hashlib.sha256(f"{salt}:{name}".encode()).digest()[:8], "little") >> 1


@contextmanager
def full_fp32() -> Iterator[None]:
    """Matrix products in true fp32 inside (no tf32, no bf16 passes), whatever the process has chosen."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def orthonormalize(y: Tensor, group: ShardGroup, *, passes: int = 2) -> tuple[Tensor, Tensor]:
    """Thin QR of a row-sharded tall matrix: CholeskyQR2 in fp64 Grams, TSQR where that breaks down.

    Parameters
    ----------
    y
        ``[m_p, k]`` fp32, row-sharded, ``m >= k`` in total; a rank may hold no row.
    group
        The ranks that hold the rows.
    passes
        2 for orthonormality to fp32 rounding; 1 leaves an error of up to 1e-2, enough inside a power iteration,
        where only the span and its conditioning count.

    Returns
    -------
    q
        ``[m_p, k]`` fp32, row-sharded, orthonormal columns also where `y` is rank-deficient or zero.
    r
        ``[k, k]`` fp64, replicated, ``q @ r = y``.

    Notes
    -----
    A reduce + broadcast pair of ``k x k`` fp64 per pass ([CQR]); another of ``P x k x k`` if rank 0 finds the
    Gram matrix too ill-conditioned ([TSQR]). The decision is taken on rank 0 and broadcast with the result.
    """
    q, r = y, torch.eye(y.shape[1], dtype=torch.float64, device=y.device)
    for _ in range(passes):
        q, factor = _cholesky_pass(q, group)
        if factor is None:
            return _tsqr(y, group)
        r = factor @ r
    return q, r


def _cholesky_pass(y: Tensor, group: ShardGroup) -> tuple[Tensor, Tensor | None]:
    """One CholeskyQR pass: ``(y R^-1, R)``, or ``(y, None)`` where the Gram matrix is too ill-conditioned."""
    k = y.shape[1]
    wide = y.double()
    factor = torch.empty(k, k, dtype=torch.float64, device=y.device)
    group.reduce_once(wide.mT @ wide, factor, _cholesky_or_nan)
    if bool(factor[0, 0].isnan()):
        return y, None
    q: Tensor = torch.linalg.solve_triangular(factor.float(), y, upper=True, left=False)
    return q, factor


def _cholesky_or_nan(gram: Tensor) -> Tensor:
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(gram, upper=True)
    diagonal = factor.diagonal()
    if int(info) != 0 or not bool(diagonal.min() * _MAX_CONDITION > diagonal.max()):
        return torch.full_like(gram, torch.nan)
    return factor


def _tsqr(y: Tensor, group: ShardGroup) -> tuple[Tensor, Tensor]:
    """Householder TSQR: local QR, then one QR of the stacked R factors on rank 0."""
    rows, k = y.shape
    local_q, local_r = torch.linalg.qr(y.double())
    stacked = torch.zeros(group.size, k, k, dtype=torch.float64, device=y.device)
    stacked[group.rank, : local_r.shape[0]] = local_r

    def combine(blocks: Tensor) -> Tensor:
        q, r = torch.linalg.qr(blocks.reshape(-1, k))
        return torch.cat([q, r])

    solution = torch.empty((group.size + 1) * k, k, dtype=torch.float64, device=y.device)
    group.reduce_once(stacked, solution, combine)
    mine = solution[group.rank * k : group.rank * k + min(rows, k)]
    return (local_q @ mine).float(), solution[group.size * k :]


def randomized_svd(
    block: Tensor,
    rank: int,
    *,
    rows: int,
    group: ShardGroup,
    seed: int,
    oversampling: int | None = None,
    power_iterations: int = 4,
    start: Tensor | None = None,
) -> SVD:
    """Leading `rank` singular triplets of a row-sharded matrix by randomized subspace iteration ([HMT], 4.4 + 5.1).

    Parameters
    ----------
    block
        This rank's rows, ``[m_p, n]`` fp32; zero rows are allowed.
    rank
        Triplets wanted, at most ``min(m, n)``.
    rows
        m, the rows of all ranks together.
    group
        The ranks that hold the rows.
    seed
        Seed of the Gaussian test matrix; the same on every rank (`seed_from_name`).
    oversampling
        Extra directions carried along, then dropped. Default: `rank`.
    power_iterations
        Passes ``W^T W`` over the sketch. Each costs two products with W and one all-reduce of ``n x k``.
    start
        ``[n, j]`` replicated guess of leading right singular vectors; replaces the first j columns of the test
        matrix (warm start for a matrix that changed little).

    Returns
    -------
    SVD
        ``u`` row-sharded, ``s`` and ``vh`` replicated.

    Notes
    -----
    With ``k = min(m, n)`` the sketch spans the whole space and the result is exact to rounding. The expected
    error for oversampling p is bounded by ``(1 + sqrt(r / (p - 1)) + e sqrt(r + p) / p * sqrt(min(m, n) - r))``
    to the power ``1 / (2q + 1)``, times ``sigma_{r+1}`` ([HMT], corollary 10.10).
    """
    columns = block.shape[1]
    if not 0 < rank <= min(rows, columns):
        raise ValueError(f"rank={rank} must lie in 1..min(m, n)={min(rows, columns)} of the {rows} x {columns} matrix")
    k = min(rank + (rank if oversampling is None else oversampling), rows, columns)
    single = ShardGroup.single()
    with full_fp32():
        generator = torch.Generator().manual_seed(seed)
        sketch = torch.randn(columns, k, generator=generator).to(block.device)
        if start is not None:
            sketch[:, : start.shape[1]] = start[:, :k]
        right, _ = orthonormalize(sketch, single)
        steep = True
        for iteration in range(power_iterations if k < min(rows, columns) else 1):
            left = block @ right
            if iteration == 0 or steep:
                left, factor = orthonormalize(left, group, passes=1)
                steep = _condition(factor) > _MAX_SKIPPED_CONDITION
            right, _ = orthonormalize(group.sum(block.mT @ left), single, passes=1)
        right, _ = orthonormalize(right, single)
        left, r = orthonormalize(block @ right, group)
        small = torch.empty(2 * k + 1, k, dtype=torch.float64, device=block.device)
        group.once(small, lambda: _small_svd(r))
        u = left @ small[:k, :rank].float()
        vh = (right @ small[k + 1 :, :rank].float()).mT
        signs = vh.gather(1, vh.abs().argmax(dim=1, keepdim=True)).sign()
        signs[signs == 0] = 1
    return SVD(u * signs.mT, small[k, :rank].float(), (vh * signs).contiguous())


def _condition(factor: Tensor) -> float:
    """Condition number of a triangular factor as its diagonal shows it; the same on all ranks if `factor` is."""
    diagonal = factor.diagonal().abs()
    return float(diagonal.max() / diagonal.min()) if float(diagonal.min()) > 0 else float("inf")


def _small_svd(r: Tensor) -> Tensor:
    """``k x k`` SVD packed as rows ``[U; s; V]`` for one broadcast."""
    u, s, vh = torch.linalg.svd(r)
    return torch.cat([u, s[None], vh.mT])
