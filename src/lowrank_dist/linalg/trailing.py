"""Trailing singular triplets of a row-sharded matrix, and iteration over the rows of all ranks.

Randomized subspace iteration finds the large end of a spectrum; the small end is the large end of an inverse. Trailing
triplets are computed from the Gram matrix G of the short side of W, in fp64. G has the squared singular values of W, so
fp64 resolves sigma down to ``1e-8 sigma_1``, which is the precision of fp32 weights.

Notation: W is ``m x n``, sharded by rows over P ranks, ``s = min(m, n)``, ``k = 2 rank + 16``.

- Flops: ``2 m n s / P`` per rank for G. Rank 0 then takes about ``10 s^3`` for all eigenvectors if s is small or k is a
  large part of s. Otherwise it takes ``s^3 / 3`` for one Cholesky factorization and ``4 s^2 k`` per inverse iteration.
- Memory: ``s x s`` fp64 on every rank (512 MiB for s = 8192), and a few of these on rank 0 during the solution. Where
  rows are the short side, one peer's row block in addition.
- Collectives: where rows are the short side, first the row blocks of all ranks, one at a time. Then one reduce of
  ``s x s`` fp64 and a broadcast of ``s x rank`` fp64, and those of the QR and the ``rank x rank`` SVD in
  `randomized_svd`.

References
----------
.. [Parlett] B. N. Parlett, "The Symmetric Eigenvalue Problem", SIAM 1998, chapter 14 (subspace iteration with the
   inverse, Rayleigh-Ritz).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.linalg import SVD, full_fp32, orthonormalize, row_signs

# Rows (or columns) that are widened to fp64 at a time.
_CHUNK = 1024
#: Short sides up to which all eigenvectors are computed; longer ones take the inverse iteration.
DENSE_SIDE = 1024
# All eigenvectors cost about as much as 16 inverse iterations with k = s / 6.
_DENSE_SHARE = 6
# Vectors beyond 2 rank. With only a handful of vectors the iteration would stop before it has converged.
_EXTRA = 16
# The sum of the wanted eigenvalues decreases at every iteration, which ends once the relative decrease is below this
# value. Gaussian matrices twice as tall as wide take 8 to 18 iterations and end with an excess of 2e-5 to 2e-4 (r = 1
# to 128). Square ones take 3 to 6 and weights of SmolLM2-135M 3 to 9, with an excess below 7e-5.
_TOLERANCE = 1e-4
_MAX_ITERATIONS = 30


def row_blocks(block: Tensor, group: ShardGroup) -> Iterator[tuple[int, Tensor]]:
    """Iterate over the rows of all ranks, on all ranks, with memory for one peer's block at a time.

    Parameters
    ----------
    block
        This rank's rows, ``[m_p, n]``, row-sharded in rank order; zero rows are allowed.
    group
        The ranks that hold the rows. All of them must iterate to the end.

    Yields
    ------
    start
        Index of the first row.
    rows
        ``[m_q, n]``, replicated, read-only. Ranks without rows are skipped.

    Notes
    -----
    One all-reduce of P integers, then a broadcast of ``m_q x n`` from every rank that has rows.
    """
    if group.size == 1:
        yield 0, block
        return
    start = 0
    for owner, count in enumerate(row_counts(block, group)):
        if count:
            rows = block.contiguous() if owner == group.rank else block.new_empty(count, block.shape[1])
            yield start, group.broadcast(rows, owner)
        start += count


def multiply(left: Tensor, right: Tensor, group: ShardGroup) -> Tensor:
    """Multiply two row-sharded matrices in true fp32; the product is sharded like `left`.

    Parameters
    ----------
    left
        This rank's rows, ``[a_p, b]`` fp32.
    right
        This rank's rows, ``[b_p, c]`` fp32; they may be sharded differently from those of `left`.
    group
        The ranks that hold the rows of both. Issues the collectives of `row_blocks` for `right`.

    Returns
    -------
    Tensor
        ``[a_p, c]`` fp32, row-sharded.
    """
    product = left.new_zeros(left.shape[0], right.shape[1])
    with full_fp32():
        for start, rows in row_blocks(right, group):
            product.addmm_(left[:, start : start + rows.shape[0]], rows)
    return product


def trailing_svd(block: Tensor, rank: int, *, rows: int, group: ShardGroup, seed: int) -> SVD:
    """Compute the smallest `rank` of the ``min(m, n)`` singular triplets of a row-sharded matrix.

    Parameters
    ----------
    block
        This rank's rows, ``[m_p, n]`` fp32; zero rows are allowed.
    rank
        Number of triplets, at most ``min(m, n)``.
    rows
        m, the rows of all ranks together.
    group
        The ranks that hold the rows. The module's docstring states costs and collectives.
    seed
        Seed of the Gaussian start of the inverse iteration; the same on every rank (`seed_from_name`).

    Returns
    -------
    SVD
        ``u`` ``[m_p, rank]`` row-sharded, ``s`` ``[rank]`` and ``vh`` ``[rank, n]`` replicated, all fp32; ``s``
        descending, like the last columns of a full SVD. The largest entry of every row of ``vh`` is positive.

    Raises
    ------
    ValueError
        If `rank` is out of range.

    Notes
    -----
    Singular values have an absolute error of about ``1e-7 sigma_1``, the rounding of fp32 weights. ``u`` and ``vh`` are
    orthonormal to fp32 rounding in any case. If W is rank-deficient they contain an orthonormal basis of its null
    spaces, which is arbitrary and depends on rounding, hence on the world size. Vectors of nearly equal singular values
    are arbitrary within their span in the same way; the span itself is determined.
    """
    columns = block.shape[1]
    short = min(rows, columns)
    if not 0 < rank <= short:
        raise ValueError(f"rank={rank} must lie in 1..min(m, n)={short} of the {rows} x {columns} matrix")
    gram = short_gram(block, rows, group)
    basis = torch.empty(short, rank, dtype=torch.float64, device=block.device)
    group.reduce_once(gram, basis, lambda whole: _smallest_eigenvectors(whole, rank, seed))
    del gram
    with full_fp32():
        if columns == short:
            right = basis.float()
            # fp64, because rounding errors of fp32 are proportional to sigma_1 and the image may be far smaller.
            image = torch.cat([wide @ basis for wide in _widened(block)])
            left, middle = orthonormalize(image.float(), group)
        else:
            mine = basis[slice(*own_rows(block, group))]
            left = mine.float()
            image = torch.zeros(columns, rank, dtype=torch.float64, device=block.device)
            for wide, vectors in zip(_widened(block), _widened(mine), strict=True):
                image.addmm_(wide.mT, vectors)
            right, middle = orthonormalize(group.sum(image).float(), ShardGroup.single())
            middle = middle.mT
        return _rotated(left, middle, right, group)


def _rotated(left: Tensor, middle: Tensor, right: Tensor, group: ShardGroup) -> SVD:
    """SVD of ``left @ middle @ right^T`` from orthonormal `left` (row-sharded) and `right` (replicated).

    Rank 0 computes the ``r x r`` SVD of `middle`. One broadcast of ``2 r + 1`` rows.
    """
    r = middle.shape[0]
    small = torch.empty(2 * r + 1, r, dtype=torch.float64, device=middle.device)

    def solve() -> Tensor:
        u, s, vh = torch.linalg.svd(middle)
        return torch.cat([u, s[None], vh.mT])

    group.once(small, solve)
    u = left @ small[:r].float()
    vh = (right @ small[r + 1 :].float()).mT
    signs = row_signs(vh)
    return SVD(u * signs.mT, small[r].float(), (vh * signs).contiguous())


def own_rows(block: Tensor, group: ShardGroup) -> tuple[int, int]:
    """Half-open range of this rank's rows. One all-reduce of P integers."""
    first = sum(row_counts(block, group)[: group.rank])
    return first, first + block.shape[0]


def row_counts(block: Tensor, group: ShardGroup) -> list[int]:
    """Rows of every rank. One all-reduce of P integers."""
    counts = torch.zeros(group.size, dtype=torch.int64, device=block.device)
    counts[group.rank] = block.shape[0]
    return [int(count) for count in group.sum(counts)]


def _widened(tensor: Tensor, dim: int = 0) -> Iterator[Tensor]:
    """A matrix in fp64, a slab of rows (or columns) at a time; one empty slab for an empty matrix."""
    side = tensor.shape[dim]
    for start in range(0, max(side, 1), _CHUNK):
        yield tensor.narrow(dim, start, min(_CHUNK, side - start)).double()


def short_gram(block: Tensor, rows: int, group: ShardGroup) -> Tensor:
    """This rank's part of the Gram matrix of the short side, ``[min(m, n)] * 2`` fp64, to be summed over the ranks.

    Nothing is communicated where columns are the short side (``W^T W``). Otherwise (``W W^T``) every rank receives the
    rows of all ranks; see `row_blocks`.
    """
    return _column_gram(block) if block.shape[1] <= rows else _row_gram(block, rows, group)


def _column_gram(block: Tensor) -> Tensor:
    """This rank's part of ``W^T W``: ``[n, n]`` fp64, to be summed over the ranks."""
    gram = torch.zeros(block.shape[1], block.shape[1], dtype=torch.float64, device=block.device)
    for wide in _widened(block):
        gram.addmm_(wide.mT, wide)
    return gram


def _row_gram(block: Tensor, rows: int, group: ShardGroup) -> Tensor:
    """This rank's rows of ``W W^T``, the other rows zero: ``[m, m]`` fp64, to be summed over the ranks."""
    gram = torch.zeros(rows, rows, dtype=torch.float64, device=block.device)
    mine = gram[slice(*own_rows(block, group))]
    for start, peers in row_blocks(block, group):
        part = mine[:, start : start + peers.shape[0]]
        for ours, theirs in zip(_widened(block, 1), _widened(peers, 1), strict=True):
            part.addmm_(ours, theirs.mT)
    return gram


def _smallest_eigenvectors(gram: Tensor, rank: int, seed: int) -> Tensor:
    """Eigenvectors of the `rank` smallest eigenvalues of a positive semi-definite matrix: ``[s, rank]``."""
    side, k = gram.shape[0], min(2 * rank + _EXTRA, gram.shape[0])
    if side <= DENSE_SIDE or _DENSE_SHARE * k >= side:
        exact: Tensor = torch.linalg.eigh(gram).eigenvectors[:, :rank]
        return exact
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(side, k, generator=generator, dtype=torch.float64).to(gram.device)
    factor = _shifted_cholesky(gram)
    total = torch.inf
    for _ in range(_MAX_ITERATIONS):
        vectors = torch.linalg.qr(torch.cholesky_solve(vectors, factor)).Q
        values, turn = torch.linalg.eigh(vectors.mT @ (gram @ vectors))
        vectors = vectors @ turn
        before, total = total, float(values[:rank].sum())
        if not total < before * (1 - _TOLERANCE):
            break
    return vectors[:, :rank]


def _shifted_cholesky(gram: Tensor) -> Tensor:
    """Cholesky factor of ``G + shift I``; the shift starts at about the rounding of G and grows until it succeeds.

    Eigenvalues below the shift converge as if they were equal to it. Singular values below about ``1e-6 sigma_1`` are
    therefore found together, like a null space.
    """
    diagonal = gram.diagonal()
    shift = gram.shape[0] * torch.finfo(gram.dtype).eps * diagonal.mean()
    factor: Tensor
    while True:
        shifted = gram.clone()
        shifted.diagonal().add_(shift)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info) == 0:
            return factor
        shift = (shift * 10).clamp_min(torch.finfo(gram.dtype).tiny)
