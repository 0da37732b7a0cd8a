"""A square root of a row-sharded positive semi-definite matrix, and products with it.

M is ``n x n``, sharded by rows over P ranks. The factor U with ``U^T U = M`` comes from a blocked Cholesky
factorization, whose pivot blocks are decomposed into eigenvectors, so that M may be singular. U has the sharding of M.

- Flops: ``n^3 / 3`` fp64 over all ranks, most of them on the last ranks.
- Memory: this rank's rows in fp64, and one panel of ``128 x n`` fp64.
- Collectives: one all-reduce of P integers and one broadcast of every panel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.linalg.precision import full_fp32
from lowrank_dist.linalg.trailing import own_rows, row_blocks, row_counts

# Rows that are eliminated together.
_PANEL = 128
# Directions of a pivot block with less than this share of the diagonal count as absent: M was summed up in fp32.
_ABSENT = 1e-6


def diagonal_of(block: Tensor, group: ShardGroup) -> Tensor:
    """Diagonal of a row-sharded square matrix: ``[n]`` fp64, replicated.

    Parameters
    ----------
    block
        This rank's rows, ``[n_p, n]`` fp32; zero rows are allowed.
    group
        The ranks that hold the rows. One all-reduce of P integers and one of n fp64.
    """
    start, stop = own_rows(block, group)
    diagonal = torch.zeros(block.shape[1], dtype=torch.float64, device=block.device)
    diagonal[start:stop] = block[:, start:stop].diagonal()
    return group.sum(diagonal)


def square_root(block: Tensor, diagonal: Tensor, group: ShardGroup) -> Tensor:
    """Compute U with ``U^T U = M`` for a row-sharded positive semi-definite M.

    Every panel of rows is divided by the root of its pivot block and subtracted from the rows below. M is scaled to a
    unit diagonal first. Directions of a pivot block whose eigenvalue is then below 1e-6 are dropped, since rounding of
    the fp32 values of M cannot be told from them: U has zero rows there.

    Parameters
    ----------
    block
        This rank's rows of M, ``[n_p, n]`` fp32; zero rows are allowed.
    diagonal
        `diagonal_of` M, ``[n]`` fp64, replicated.
    group
        The ranks that hold the rows. The module's docstring states costs and collectives.

    Returns
    -------
    Tensor
        This rank's rows of U, ``[n_p, n]`` fp32.
    """
    counts = row_counts(block, group)
    first, columns = sum(counts[: group.rank]), block.shape[1]
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0)
    rows = block.double() * scale * scale[first : first + len(block), None]
    start = 0
    for owner, count in enumerate(counts):
        for begin in range(start, start + count, _PANEL):
            end = min(begin + _PANEL, start + count)
            if owner == group.rank:
                mine = rows[begin - first : end - first]
                mine[:, :begin] = 0
                panel = _eliminated(mine[:, begin:])
                mine[:, begin:] = panel
            else:
                panel = rows.new_empty(end - begin, columns - begin)
            group.broadcast(panel, owner)
            below = max(end, first)  # the columns before are those of rows above
            if below < first + len(rows):
                across = panel[:, below - begin :]
                rows[below - first :, below:].addmm_(across[:, : first + len(rows) - below].mT, across, alpha=-1)
        start += count
    return (rows * diagonal.sqrt()).float()


def _eliminated(panel: Tensor) -> Tensor:
    """Rows of the root for the pivot rows ``[k, n]``, whose first k columns are the pivot block."""
    values, vectors = torch.linalg.eigh(panel[:, : len(panel)])
    inverse_root = torch.where(values > _ABSENT, values.rsqrt(), 0)
    rows: Tensor = (vectors * inverse_root).mT @ panel
    return rows


def multiply_transposed(left: Tensor, right: Tensor, group: ShardGroup) -> Tensor:
    """Multiply a row-sharded matrix by the transpose of another, in true fp32; the product is sharded like `left`.

    Parameters
    ----------
    left
        This rank's rows, ``[a_p, b]`` fp32.
    right
        This rank's rows, ``[c_p, b]`` fp32; they may be sharded differently from those of `left`.
    group
        The ranks that hold the rows of both. Issues the collectives of `row_blocks` for `right`.

    Returns
    -------
    Tensor
        ``[a_p, c]`` fp32, row-sharded.
    """
    with full_fp32():
        return torch.cat([left @ rows.mT for _, rows in row_blocks(right, group)], dim=1)
